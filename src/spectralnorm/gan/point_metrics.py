"""Measuring generated points against the mixture that the real ones were drawn from."""

from __future__ import annotations

from torch import Tensor

from spectralnorm.gan.data.points import MIXTURES
from spectralnorm.metrics.modes import Modes, count_modes
from spectralnorm.metrics.wasserstein import wasserstein_lower_bound
from spectralnorm.records import Metric, Provenance

__all__ = ["measure_points"]


def measure_points(
    points: Tensor,
    held_out: Tensor,
    *,
    mixture: str,
    seed: int = 0,
    modes: bool = True,
    wasserstein: bool = False,
) -> tuple[Metric, ...]:
    """Count the modes that generated points reach, as the mixtures' publications do.

    Args:
        points: generated, float32 ``(n, 2, 1, 1)``.
        held_out: real, float32 ``(m, 2, 1, 1)``; as many as there are generated ones give the floors.
        mixture: a name in `spectralnorm.gan.data.points.MIXTURES`.
        seed: of the critic.
        modes: whether to count them.
        wasserstein: whether to bound the Wasserstein-1 distance from below too, in the plane itself.

    Returns:
        ``Modes covered`` (a mode is covered by one point within 3 standard deviations of it), ``High-quality share``
        (of the points, those within 3 standard deviations of a mode) and, if asked for, ``W1 lower bound-points``.
    """
    fake, real = points.flatten(1), held_out.flatten(1)
    provenance = Provenance(
        extractor="points",
        weights_sha256="",
        num_real=len(real),
        num_fake=len(fake),
        split="held-out",
        resize="none",
    )
    metrics: list[Metric] = []
    if modes:
        metrics += _coverage(_modes(fake, mixture), _modes(real[: len(fake)], mixture), provenance)
    if wasserstein:
        bound = wasserstein_lower_bound(real, fake, seed=seed)
        details = {"estimate": bound.estimate, "confidence": bound.confidence}
        metrics.append(
            Metric(
                name="W1 lower bound-points",
                value=bound.lower_confidence_bound,
                details=details,
                provenance=provenance,
            )
        )
    return tuple(metrics)


def _coverage(found: Modes, floor: Modes, provenance: Provenance) -> list[Metric]:
    return [
        Metric(
            name="Modes covered",
            value=found.covered,
            floor=floor.covered,
            better="higher",
            details={str(mode): count for mode, count in enumerate(found.counts)},
            provenance=provenance,
        ),
        Metric(
            name="High-quality share",
            value=found.high_quality_share,
            floor=floor.high_quality_share,
            better="higher",
            provenance=provenance,
        ),
    ]


def _modes(points: Tensor, mixture: str) -> Modes:
    known = MIXTURES[mixture]
    return count_modes(points, known.centers, standard_deviation=known.standard_deviation)
