"""How many modes are there: of toy distributions whose modes are known, and by a classifier's vote."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["ClassModes", "Modes", "class_modes", "count_modes"]


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Samples of a mixture of Gaussians, such as a ring or a grid."""

    covered: int
    """Modes that are the nearest one of at least one sample of high quality."""
    high_quality_share: float
    """Of the samples, those within so many standard deviations of a mode."""
    counts: tuple[int, ...]
    """High-quality samples of each mode."""


@dataclass(frozen=True, kw_only=True)
class ClassModes:
    """Votes of a classifier, one mode each."""

    covered: int
    """Modes with at least one vote."""
    num_modes: int
    divergence: float
    """``KL(votes || uniform)`` in nats: 0 when all modes are equally frequent, ``log(num_modes)`` when there is one."""
    shares: tuple[float, ...]
    """Of the images, by mode."""


def count_modes(samples: Tensor, centers: Tensor, *, standard_deviation: float, threshold: float = 3.0) -> Modes:
    """Count the modes of a mixture that samples reach (Srivastava et al. 2017, VEEGAN, sec. 5.1).

    Args:
        samples: (n, d), n >= 1.
        centers: of the modes, (modes, d).
        standard_deviation: of each mode, in every direction.
        threshold: a sample is of high quality within so many of them; 3 in the paper.

    Raises:
        UserError: the shapes do not fit together, or a number is not positive.
    """
    shapes = tuple(samples.shape), tuple(centers.shape)
    if samples.ndim != 2 or centers.ndim != 2 or shapes[0][1] != shapes[1][1] or 0 in shapes[0] + shapes[1]:
        raise UserError(f"samples and centers must be matrices of as many columns, got {shapes[0]} and {shapes[1]}.")
    if not (standard_deviation > 0 and threshold > 0):
        raise UserError(f"standard_deviation and threshold must be positive, got {standard_deviation} and {threshold}.")
    # Not the expansion of the square: modes are few, and a sample may lie on one.
    distances = torch.cdist(samples.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest, mode = distances.min(dim=1)
    good = nearest <= threshold * standard_deviation
    counts = torch.bincount(mode[good], minlength=len(centers))
    return Modes(
        covered=int((counts > 0).sum()),
        high_quality_share=float(good.double().mean()),
        counts=tuple(counts.tolist()),
    )


def class_modes(logits: Tensor) -> ClassModes:
    """Count the classes that a classifier votes for, or combinations of classes.

    Stacked MNIST has a digit in each of three channels, and 1,000 modes (Metz et al. 2017, sec. 3.3.1): give a
    classifier's logits of each channel.

    Args:
        logits: (n, classes), or (n, parts, classes) for ``classes ** parts`` modes; n >= 1.

    Raises:
        UserError: another shape.
    """
    if logits.ndim not in (2, 3) or not logits.numel():
        raise UserError(
            f"logits must have the shape (n, classes) or (n, parts, classes) with n > 0, got {tuple(logits.shape)}."
        )
    votes = logits.argmax(dim=-1).reshape(len(logits), -1)
    num_classes, num_parts = logits.shape[-1], votes.shape[1]
    places = num_classes ** torch.arange(num_parts - 1, -1, -1, device=votes.device)
    num_modes = num_classes**num_parts
    shares = torch.bincount((votes * places).sum(1), minlength=num_modes).double() / len(logits)
    # Rounding can leave zero a little below.
    divergence = max(0.0, math.log(num_modes) - float(torch.special.entr(shares).sum()))
    return ClassModes(
        covered=int((shares > 0).sum()), num_modes=num_modes, divergence=divergence, shares=tuple(shares.tolist())
    )
