"""Lower confidence bounds of a mean, from finitely many values in a known interval. No value may look at a later one.

Both hold for every distribution on the interval and every number of values; neither assumes a normal distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["MEAN_BOUNDS", "betting_bound", "empirical_bernstein_bound", "paired_differences"]

_UNIT = 2.0**-53
_BISECTIONS = 50
# The largest share of the capital that one bet may lose; Waudby-Smith & Ramdas 2023 use 1/2 or 3/4 (their sec. 4.2).
_LARGEST_LOSS = 0.75


def empirical_bernstein_bound(values: Tensor, *, low: float, high: float, confidence: float = 0.95) -> float:
    """One-sided bound of Maurer & Pontil 2009 (theorem 11): the mean is above it with the asked probability.

    With values scaled to [0, 1], their unbiased variance V and ``L = ln(2 / (1 - confidence))``:
    ``mean - sqrt(2 V L / n) - 7 L / (3 (n - 1))``.

    Args:
        values: (n,), independent, all within [low, high], n >= 2. What is bounded is the mean of their expectations.
        low: smallest value that could have come, known without looking at them.
        high: the largest one.
        confidence: probability that the bound is not above the mean.

    Raises:
        UserError: fewer than two values, one outside the interval, or a confidence that is none.
    """
    scaled = _scaled(values, low, high, confidence)
    num = len(scaled)
    log_term = math.log(2 / (1 - confidence))
    bound = float(scaled.mean()) - math.sqrt(2 * float(scaled.var()) * log_term / num) - 7 * log_term / (3 * (num - 1))
    # Sums of n numbers of at most 1 in float64 are off by less than n units each.
    return _unscaled(bound - 8 * num * _UNIT, low, high)


def betting_bound(values: Tensor, *, low: float, high: float, confidence: float = 0.95) -> float:
    """One-sided bound by betting against each candidate for the mean (Waudby-Smith & Ramdas 2023, theorem 3).

    Against a candidate m, a gambler with capital 1 stakes before each value X the amount ``b(m)`` on X being above m:
    the capital becomes ``K(m) = prod (1 + b_t(m) (X_t - m))``. If the mean is at most m, it is a nonnegative
    supermartingale, so it ever reaches ``1 / (1 - confidence)`` with at most the probability ``1 - confidence``
    (Ville's inequality). Every m against which it does is excluded. ``b_t(m) = min(b_t, c / m)``, where ``b_t`` follows
    from the variance of the values before the t-th (their eq. 26, with ``ln(1 / (1 - confidence))``, being one-sided).
    As ``K(m)`` falls in m, the bound is found by halving intervals.

    Close to ``mean - s sqrt(2 ln(1 / (1 - confidence)) / n)`` with the values' standard deviation s; the interval costs
    little, unlike in the empirical Bernstein bound.

    Args:
        values: (n,), all within [low, high], n >= 2, each with the same mean given the ones before it: independent
            draws in the order of drawing, or shuffled, not sorted.
        low: smallest value that could have come, known without looking at them.
        high: the largest one.
        confidence: probability that the bound is not above the mean.

    Raises:
        UserError: fewer than two values, one outside the interval, or a confidence that is none.
    """
    scaled = _scaled(values, low, high, confidence)
    stakes = _stakes(scaled, confidence)
    needed = math.log(1 / (1 - confidence))

    def excluded(mean: float) -> bool:
        """Whether the capital against this mean reaches what it needs, at any time and beyond doubt of rounding."""
        gains = torch.log1p(stakes.clamp(max=_LARGEST_LOSS / mean) * (scaled - mean))
        # A sum of n terms is off by n units of the sum of their sizes; each by a few units of 1/(1 - c).
        doubt = len(gains) * _UNIT * (float(gains.abs().sum()) + 32)
        return float(gains.cumsum(0).max()) > needed + doubt

    outside, inside = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (outside + inside) / 2
        if excluded(middle):
            outside = middle
        else:
            inside = middle
    return _unscaled(outside, low, high)


MEAN_BOUNDS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {"betting": betting_bound, "bernstein": empirical_bernstein_bound}
)
"""Lower bounds of a mean by name."""


def paired_differences(first: Tensor, second: Tensor) -> Tensor:
    """As many differences as the smaller set has members: independent, each with the difference of the means.

    Each member of the smaller set meets the average of its own block of the larger one, so that no value is wasted; the
    sizes of blocks differ by at most one. With this, the variance of a difference is the sum of both variances where
    the sets are of one size. Bounds of both means, at half of the risk each, would be further from the truth.

    Args:
        first: (n,) independent draws.
        second: (m,) independent draws, and independent of the first.

    Returns:
        (min(n, m),) float64. If each set lies within an interval of length r, all are within [-r, r].
    """
    num = min(len(first), len(second))
    return _block_means(first.double(), num) - _block_means(second.double(), num)


def _block_means(values: Tensor, num_blocks: int) -> Tensor:
    if len(values) == num_blocks:
        return values
    return torch.stack([block.mean() for block in values.tensor_split(num_blocks)])


def _stakes(values: Tensor, confidence: float) -> Tensor:
    """What the gambler stakes at each time, from the values before it alone."""
    num = len(values)
    counts = torch.arange(1, num + 1, dtype=torch.float64, device=values.device)
    # As if one value of 1/2 had come first, with a variance of 1/4 (Waudby-Smith & Ramdas 2023, eq. 15).
    means = (0.5 + values.cumsum(0)) / (counts + 1)
    variances = (0.25 + (values - means).square().cumsum(0)) / (counts + 1)
    before = torch.cat([variances.new_tensor([0.25]), variances[:-1]])
    return (2 * math.log(1 / (1 - confidence)) / (num * before)).sqrt()


def _scaled(values: Tensor, low: float, high: float, confidence: float) -> Tensor:
    """Values as float64 in [0, 1], after a look at whether all is as promised."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, got {confidence}.")
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"A bound of a mean needs a vector of at least two values, got shape {tuple(values.shape)}.")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"The interval of the values must be finite, with low below high, got [{low}, {high}].")
    values = values.detach().double()
    if not bool(((values >= low) & (values <= high)).all()):
        raise UserError(
            f"All values must be within [{low}, {high}], got {float(values.min())} to {float(values.max())}; "
            "clip them to an interval that is chosen on other data."
        )
    return ((values - low) / (high - low)).clamp(0, 1)


def _unscaled(bound: float, low: float, high: float) -> float:
    """Back from [0, 1], rounded down."""
    size = max(abs(low), abs(high))
    return max(low, low + (high - low) * bound - 8 * _UNIT * size)
