"""All metrics of a set of generated images, each with what it depends on and with its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.cache import hash_of, remember
from spectralnorm.metrics.classes import class_statistics
from spectralnorm.metrics.distances import default_subset_size, frechet_distance, kernel_distance
from spectralnorm.metrics.extractors import FeatureExtractor, Features
from spectralnorm.metrics.wasserstein import WassersteinBound, wasserstein_lower_bound
from spectralnorm.records import Metric, Provenance

__all__ = ["evaluate"]


def evaluate(
    fake: Tensor,
    real: Tensor,
    *,
    extractors: Sequence[FeatureExtractor],
    split: str = "held-out",
    seed: int = 0,
    class_names: Sequence[str] = (),
    wasserstein: bool = False,
) -> tuple[Metric, ...]:
    """Measure generated images against real ones that no one has trained on.

    The real images are parted at random, always in the same way: some stand in for a generator, as many as there are
    generated images but at most half; the others are the reference. Both the generated images and the stand-ins are
    compared with the reference. The second number is the floor: what a perfect generator would score, at the same
    number of images as long as there are at most half as many generated as real ones. With more of them than
    that, the floor of the Fréchet distance is too high, for it falls as the number of images grows. Fewer than four
    real images cannot be parted: all of them are the reference, and there is no floor.

    Args:
        fake: uint8 (n, channels, height, width), at least 2 images.
        real: uint8 (m, channels, height, width), at least 2 images.
        extractors: what they are seen through; those that give logits add the metrics of classes.
        split: which real images, for the provenance.
        seed: of the kernel distance's subsets. The global random numbers are left alone.
        class_names: of the logits' classes, to name their shares; empty: they are numbered.
        wasserstein: whether to train a critic too, for a lower bound of the Wasserstein-1 distance between features
            that holds with 95 % confidence; needs twenty images or more on each side, and tens of seconds.

    Returns:
        For each extractor ``FD-<name>`` and ``KID-<name>``; for one with logits ``Class coverage``, ``Class entropy``
        and ``Confident share`` too. With ``wasserstein``, ``W1 lower bound-<name>`` for each.

    Raises:
        UserError: too few images, or of the wrong type or shape.
    """
    for name, images in (("generated", fake), ("real", real)):
        if len(images) < 2:
            raise UserError(f"Metrics need at least two {name} images, got {len(images)}.")
    if fake.shape[1:] != real.shape[1:]:
        raise UserError(
            "Generated and real images must have the same channels, height and width, "
            f"got {tuple(fake.shape[1:])} and {tuple(real.shape[1:])}."
        )
    metrics: list[Metric] = []
    for extractor in extractors:
        known = _see_real(extractor, real, num_fake=len(fake))
        seen = extractor(fake)
        channels, height, width = fake.shape[1:]
        provenance = Provenance(
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            num_real=len(known.reference.features),
            num_fake=len(fake),
            split=split,
            resize=extractor.resize_description(height, width, channels=channels),
        )
        metrics += _distance_metrics(seen, known, provenance, seed=seed)
        if wasserstein:
            metrics.append(_wasserstein_metric(seen, known, provenance, seed=seed))
        if seen.logits is not None:
            metrics += _class_metrics(seen.logits, known, provenance, class_names)
    return tuple(metrics)


class _Real(NamedTuple):
    """Features of the real images, in two parts."""

    key: str
    """Names the images, the extractor and how they are parted."""
    reference: Features
    stand_ins: Features | None
    """None if there are too few images to be parted."""


class _Floors(NamedTuple):
    frechet: float | None
    kernel: float | None


def _see_real(extractor: FeatureExtractor, real: Tensor, *, num_fake: int) -> _Real:
    _, channels, height, width = real.shape
    resize = extractor.resize_description(height, width, channels=channels)
    key = hash_of(extractor.name, extractor.weights_sha256, resize, images=real)
    seen = remember(key, lambda: {name: part for name, part in extractor(real)._asdict().items() if part is not None})
    features = Features(seen["features"], seen.get("logits"))
    num_stand_ins = min(num_fake, len(real) // 2)
    if num_stand_ins < 2:
        return _Real(key, features, None)
    # One fixed order for every evaluation, so that all of them compare with the same reference.
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    reference, stand_ins = _rows(features, order[num_stand_ins:]), _rows(features, order[:num_stand_ins])
    return _Real(hash_of(key, num_stand_ins), reference, stand_ins)


def _rows(features: Features, indices: Tensor) -> Features:
    logits = features.logits
    return Features(features.features[indices], None if logits is None else logits[indices])


def _distance_metrics(fake: Features, real: _Real, provenance: Provenance, *, seed: int) -> list[Metric]:
    # One size for value and floor: their subsets differ by chance alone.
    num_compared = len(fake.features) if real.stand_ins is None else len(real.stand_ins.features)
    subset_size = default_subset_size(len(real.reference.features), min(len(fake.features), num_compared))
    kernel, spread = kernel_distance(real.reference.features, fake.features, subset_size=subset_size, seed=seed)
    frechet = frechet_distance(real.reference.features, fake.features)
    floors = _floors(real, subset_size=subset_size, seed=seed)
    return [
        Metric(name=f"FD-{provenance.extractor}", value=frechet, floor=floors.frechet, provenance=provenance),
        Metric(
            name=f"KID-{provenance.extractor}",
            value=kernel,
            spread=spread,
            floor=floors.kernel,
            details={"subset size": subset_size},
            provenance=provenance,
        ),
    ]


def _floors(real: _Real, *, subset_size: int, seed: int) -> _Floors:
    if real.stand_ins is None:
        return _Floors(None, None)
    reference, stand_ins = real.reference.features, real.stand_ins.features

    def compute() -> dict[str, Tensor]:
        kernel, _ = kernel_distance(reference, stand_ins, subset_size=subset_size, seed=seed)
        floors = _Floors(frechet_distance(reference, stand_ins), kernel)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in floors._asdict().items()}

    found = remember(hash_of(real.key, subset_size, seed), compute)
    return _Floors(**{name: float(value) for name, value in found.items()})


def _wasserstein_metric(fake: Features, real: _Real, provenance: Provenance, *, seed: int) -> Metric:
    found = wasserstein_lower_bound(real.reference.features, fake.features, seed=seed)
    floor = None
    if real.stand_ins is not None:
        stand_ins = real.stand_ins.features

        def compute() -> dict[str, Tensor]:
            bound = wasserstein_lower_bound(real.reference.features, stand_ins, seed=seed).lower_confidence_bound
            return {"bound": torch.tensor(bound, dtype=torch.float64)}

        floor = float(remember(hash_of(real.key, "wasserstein", seed), compute)["bound"])
    return Metric(
        name=f"W1 lower bound-{provenance.extractor}",
        value=found.lower_confidence_bound,
        floor=floor,
        details=_wasserstein_details(found),
        provenance=provenance,
    )


def _wasserstein_details(found: WassersteinBound) -> dict[str, float]:
    return {
        "estimate": found.estimate,
        "confidence": found.confidence,
        "critic's constant": found.lipschitz,
        "real images for the bound": found.num_samples[0],
        "generated images for the bound": found.num_samples[1],
    }


def _class_metrics(logits: Tensor, real: _Real, provenance: Provenance, class_names: Sequence[str]) -> list[Metric]:
    found = class_statistics(logits)
    names = tuple(class_names) or tuple(map(str, range(len(found.shares))))
    if len(names) != len(found.shares):
        raise UserError(f"{provenance.extractor} knows {len(found.shares)} classes, but {len(names)} names were given.")
    floor = None
    if real.stand_ins is not None and real.stand_ins.logits is not None:
        floor = class_statistics(real.stand_ins.logits)
    return [
        Metric(
            name="Class coverage",
            value=found.coverage,
            floor=None if floor is None else floor.coverage,
            better="higher",
            details=dict(zip(names, found.shares, strict=True)),
            provenance=provenance,
        ),
        Metric(
            name="Class entropy",
            value=found.entropy,
            floor=None if floor is None else floor.entropy,
            better="higher",
            details={"if all were equally frequent": math.log(len(names))},
            provenance=provenance,
        ),
        Metric(
            name="Confident share",
            value=found.confident_share,
            floor=None if floor is None else floor.confident_share,
            better="higher",
            provenance=provenance,
        ),
    ]
