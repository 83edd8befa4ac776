"""Which classes a classifier sees in generated images: whether all are there, evenly, and clearly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["ClassStatistics", "class_statistics"]

COVERED_SHARE = 0.02
"""A class counts as covered from this share of the images on: a fifth of its part when ten are equally frequent."""
CONFIDENT_PROBABILITY = 0.9
"""An image counts as recognised when its class gets at least this probability."""


@dataclass(frozen=True, kw_only=True)
class ClassStatistics:
    """Votes of a classifier on a set of images."""

    coverage: int
    """Classes that have at least 2 % of the images each."""
    entropy: float
    """Of the shares, in nats: ``log(classes)`` when all are equally frequent, 0 when there is only one."""
    confident_share: float
    """Share of the images whose class has a probability of at least 0.9."""
    shares: tuple[float, ...]
    """Of the images, by the class with the largest logit."""


def class_statistics(logits: Tensor) -> ClassStatistics:
    """Count what a classifier sees.

    Args:
        logits: (n, classes), n >= 1.

    Raises:
        UserError: they are not a matrix, or empty.
    """
    if logits.ndim != 2 or not logits.numel():
        raise UserError(f"logits must be a matrix of at least one row, got shape {tuple(logits.shape)}.")
    probabilities = logits.double().softmax(dim=1)
    shares = torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]).double() / len(logits)
    return ClassStatistics(
        coverage=int((shares >= COVERED_SHARE).sum()),
        entropy=float(torch.special.entr(shares).sum()),
        confident_share=float((probabilities.amax(dim=1) >= CONFIDENT_PROBABILITY).double().mean()),
        shares=tuple(shares.tolist()),
    )
