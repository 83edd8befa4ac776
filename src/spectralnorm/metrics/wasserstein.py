"""A lower bound of the Wasserstein-1 distance that holds with a stated probability: duality and a certified critic.

Kantorovich and Rubinstein: W1(P, Q) is the largest ``E_P f - E_Q f`` among functions f with Lipschitz constant 1. So
*every* f with a constant of at most K gives ``(E_P f - E_Q f) / K <= W1``, well trained or not. What is left is that
means are estimated from samples: the critic is chosen on some, and its means are bounded on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.confidence import MEAN_BOUNDS, paired_differences
from spectralnorm.metrics.critic import CriticOptions, train_critic

__all__ = ["WassersteinBound", "clipping_interval", "critic_lower_bound", "wasserstein_lower_bound"]

# Shares of the samples that are clipped at each end, among which the interval is chosen.
_CLIPPED_SHARES = (0.0, 0.001, 0.01, 0.05)


@dataclass(frozen=True, kw_only=True)
class WassersteinBound:
    """What a critic with a certified constant says of the Wasserstein-1 distance of two distributions."""

    estimate: float
    """Difference of the critic's means over held-out samples, divided by the constant; itself uncertain."""
    lower_confidence_bound: float
    """The distance is at least this, with probability ``confidence`` over the held-out samples; not below zero."""
    confidence: float
    range: tuple[float, float]
    """Interval to which the critic's values were clipped for the bound."""
    num_samples: tuple[int, int]
    """Held-out real and fake samples."""
    lipschitz: float
    """The critic's certified constant, by which all was divided."""


def critic_lower_bound(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    lipschitz: float,
    interval: tuple[float, float],
    confidence: float = 0.95,
    method: str = "betting",
    rounding_error: float = 0.0,
    seed: int = 0,
) -> WassersteinBound:
    """Bound W1 with a given critic and samples that had no part in choosing it.

    Values are clipped to the interval first. That keeps the constant, so the bound holds for any interval; but it must
    not be chosen with a look at these samples. Then real and fake values are paired, and the mean of their differences
    is bounded from below.

    Args:
        critic: maps (n, ...) to (n,) or (n, 1). It must treat each sample by itself: no batch norm in training mode.
        real: (n, ...) held-out samples, n >= 2: independent draws.
        fake: (m, ...) held-out samples, m >= 2, independent of the real ones too.
        lipschitz: a proved upper bound of the critic's constant, for example ``upper_bound`` of a certificate. In the
            norm of which the distance is wanted; certificates speak of the 2-norm.
        interval: to clip to, ends included; see :func:`clipping_interval`.
        confidence: probability with which the bound holds.
        method: ``betting`` (tighter) or ``bernstein``; see :data:`~spectralnorm.metrics.MEAN_BOUNDS`.
        rounding_error: how far computed values may be from the critic's true ones; taken off twice. Zero leaves it out
            of the account, which float64 makes nearly right and float32 does not.
        seed: of the order in which samples are taken, so that sorted ones do no harm.

    Raises:
        UserError: too few samples, values that are not finite, or options out of their range.
    """
    if not (math.isfinite(lipschitz) and lipschitz > 0):
        raise UserError(f"lipschitz must be the positive, finite constant of the critic, got {lipschitz}.")
    if method not in MEAN_BOUNDS:
        raise UserError(f"Unknown method {method!r}; choose one of {', '.join(MEAN_BOUNDS)}.")
    if not rounding_error >= 0:
        raise UserError(f"rounding_error must not be negative, got {rounding_error}.")
    generator = torch.Generator().manual_seed(seed)
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"The interval to clip to must be finite, with low below high, got [{low}, {high}].")
    values = [_shuffled(_values(critic, samples), generator) for samples in (real, fake)]
    clipped = [part.clamp(low, high) for part in values]
    # Wider by more than an average in float64 can be rounded.
    width = (high - low) * (1 + 2.0**-40)
    bound = MEAN_BOUNDS[method](paired_differences(*clipped), low=-width, high=width, confidence=confidence)
    bound = math.nextafter((bound - 2 * rounding_error) / lipschitz, -math.inf)
    return WassersteinBound(
        estimate=float(values[0].mean() - values[1].mean()) / lipschitz,
        lower_confidence_bound=max(0.0, bound),
        confidence=confidence,
        range=(low, high),
        num_samples=(len(real), len(fake)),
        lipschitz=lipschitz,
    )


def clipping_interval(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    confidence: float = 0.95,
    method: str = "betting",
) -> tuple[float, float]:
    """Choose the interval for :func:`critic_lower_bound` on samples that the critic was trained on.

    Between the smallest and largest values, or with a part of them clipped at both ends, whichever would give the
    best bound on these samples: rare and large values can cost more than they bring.

    Args:
        critic: maps (n, ...) to (n,) or (n, 1).
        real: (n, ...) samples that are **not** those of the bound.
        fake: (m, ...) samples that are not those of the bound.
        confidence: that will be asked.
        method: that will be used.

    Raises:
        UserError: too few samples, or values that are not finite.
    """
    values = [_values(critic, samples) for samples in (real, fake)]
    pooled = torch.cat(values).sort().values
    # Not torch.quantile, which refuses more than 16 million values.
    ends = [int(share * (len(pooled) - 1)) for share in _CLIPPED_SHARES]
    candidates = [(float(pooled[end]), float(pooled[len(pooled) - 1 - end])) for end in dict.fromkeys(ends)]
    candidates = [(low, high) for low, high in candidates if low < high]
    if not candidates:
        return float(pooled[0]) - 1.0, float(pooled[-1]) + 1.0

    def bound(interval: tuple[float, float]) -> float:
        found = critic_lower_bound(
            _identity, *values, lipschitz=1.0, interval=interval, confidence=confidence, method=method
        )
        return found.lower_confidence_bound

    return max(candidates, key=bound)


def wasserstein_lower_bound(
    real: Tensor,
    fake: Tensor,
    *,
    held_out_share: float = 0.5,
    confidence: float = 0.95,
    method: str = "betting",
    options: CriticOptions | None = None,
    seed: int = 0,
) -> WassersteinBound:
    """Train a critic on one part of the samples, prove its constant, and bound W1 (in the 2-norm) on the other part.

    Args:
        real: (n, ...) independent samples of one distribution, vectors or images; n >= 20 or so.
        fake: (m, ...) of the other.
        held_out_share: of each set, drawn at random, for the bound; the rest is for the critic.
        confidence: probability with which the bound holds.
        method: ``betting`` or ``bernstein``.
        options: of the critic.
        seed: of everything random; the global random numbers are left alone.

    Raises:
        UserError: the samples do not fit together or are too few, or an option is out of its range.
    """
    if not 0 < held_out_share < 1:
        raise UserError(f"held_out_share must be between 0 and 1, got {held_out_share}.")
    generator = torch.Generator().manual_seed(seed)
    real, fake = _shuffled(real.detach(), generator), _shuffled(fake.detach(), generator)
    num_real, num_fake = (round(held_out_share * len(samples)) for samples in (real, fake))
    critic = train_critic(real[num_real:], fake[num_fake:], options=options, seed=seed)
    interval = clipping_interval(critic, real[num_real:], fake[num_fake:], confidence=confidence, method=method)
    real, fake = real[:num_real], fake[:num_fake]
    # A larger constant is true as well, and a critic of zeros has none to divide by.
    lipschitz = max(critic.lipschitz_bound(), 1.0)
    return critic_lower_bound(
        critic,
        real,
        fake,
        lipschitz=lipschitz,
        interval=interval,
        confidence=confidence,
        method=method,
        rounding_error=max(critic.rounding_error_bound(real), critic.rounding_error_bound(fake)),
        seed=seed,
    )


@torch.no_grad()
def _values(critic: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """(n,) float64."""
    values = critic(samples)
    if values.shape not in ((len(samples),), (len(samples), 1)):
        raise UserError(
            "A critic must give one value a sample, (n,) or (n, 1), "
            f"got {tuple(values.shape)} for {len(samples)} samples."
        )
    values = values.flatten().double()
    if not bool(values.isfinite().all()):
        raise UserError("The critic's values must be finite, but some are infinite or NaN.")
    return values


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator).to(values.device)]


def _identity(values: Tensor) -> Tensor:
    return values
