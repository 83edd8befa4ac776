"""The Inception Score's formula, for the logits of any classifier."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["inception_score"]


def inception_score(logits: Tensor, *, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """``exp(E_x KL(p(y | x) || p(y)))`` (Salimans et al. 2016, sec. 4): classes that are clear, and all of them there.

    From 1 (all images look alike to the classifier, or none looks like anything) to the number of classes. Only with
    the logits of the Inception network of that paper is it the published score.

    Args:
        logits: (n, classes), n >= splits.
        splits: parts of which the score is computed, and then averaged. The score of few images is too low, so it
            depends on how many a part has.
        seed: of the order in which images are parted; None: as they come. The global random numbers are left alone.

    Returns:
        Mean over the parts, and their standard deviation (of the parts as the whole population).

    Raises:
        UserError: the logits are no matrix, or there are fewer images than parts.
    """
    if logits.ndim != 2 or not logits.numel():
        raise UserError(f"logits must be a matrix of at least one row, got shape {tuple(logits.shape)}.")
    if not 1 <= splits <= len(logits):
        raise UserError(f"splits must be from 1 to the {len(logits)} images, got {splits}.")
    if seed is not None:
        logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)]
    logs = logits.double().log_softmax(dim=1)
    ends = [len(logs) * number // splits for number in range(splits + 1)]
    scores = torch.stack([_score(logs[start:end]) for start, end in pairwise(ends)])
    return float(scores.mean()), float(scores.std(unbiased=False))


def _score(logs: Tensor) -> Tensor:
    probabilities = logs.exp()
    # A class that no image has adds 0 log 0 to the entropy, which is 0.
    entropy = torch.special.entr(probabilities.mean(0)).sum() - torch.special.entr(probabilities).sum(1).mean()
    return entropy.exp()
