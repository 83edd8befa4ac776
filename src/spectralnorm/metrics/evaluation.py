"""All metrics of a set of generated images, each with what it depends on and with its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.classes import class_statistics
from spectralnorm.metrics.distances import default_subset_size, frechet_distance, kernel_distance
from spectralnorm.metrics.extractors import FeatureExtractor, Features
from spectralnorm.metrics.feature_cache import cached_features
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

    Returns:
        For each extractor ``FD-<name>`` and ``KID-<name>``; for one with logits ``Class coverage``, ``Class entropy``
        and ``Confident share`` too.

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
    sizes = _sizes(len(fake), len(real))
    metrics: list[Metric] = []
    for extractor in extractors:
        seen = _Seen(extractor(fake), *_parted(cached_features(extractor, real), sizes))
        height, width = fake.shape[2:]
        provenance = Provenance(
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            num_real=sizes.reference,
            num_fake=len(fake),
            split=split,
            resize=extractor.resize_description(height, width, channels=fake.shape[1]),
        )
        metrics += _distances(seen, provenance, seed=seed)
        if seen.fake.logits is not None:
            metrics += _class_metrics(seen, provenance, class_names)
    return tuple(metrics)


class _Sizes(NamedTuple):
    """How many real images have which part; ``stand_ins`` is 0 if there are too few to be parted."""

    stand_ins: int
    reference: int


class _Seen(NamedTuple):
    fake: Features
    reference: Features
    stand_ins: Features | None


def _sizes(num_fake: int, num_real: int) -> _Sizes:
    stand_ins = min(num_fake, num_real // 2)
    if stand_ins < 2:
        stand_ins = 0
    return _Sizes(stand_ins, num_real - stand_ins)


def _parted(real: Features, sizes: _Sizes) -> tuple[Features, Features | None]:
    """The reference and the stand-ins, or all and None."""
    if not sizes.stand_ins:
        return real, None
    # One fixed order for every evaluation, so that all of them compare with the same reference.
    order = torch.randperm(len(real.features), generator=torch.Generator().manual_seed(0))
    return _rows(real, order[sizes.stand_ins :]), _rows(real, order[: sizes.stand_ins])


def _rows(features: Features, indices: Tensor) -> Features:
    logits = features.logits
    return Features(features.features[indices], None if logits is None else logits[indices])


def _distances(seen: _Seen, provenance: Provenance, *, seed: int) -> list[Metric]:
    fake, reference = seen.fake.features, seen.reference.features
    stand_ins = None if seen.stand_ins is None else seen.stand_ins.features
    # The same for the floor, so that its subsets are no larger.
    num_stand_ins = len(fake) if stand_ins is None else len(stand_ins)
    subset_size = default_subset_size(len(reference), min(len(fake), num_stand_ins))
    kernel_value, kernel_spread = kernel_distance(reference, fake, subset_size=subset_size, seed=seed)
    frechet_floor = kernel_floor = None
    if stand_ins is not None:
        frechet_floor = frechet_distance(reference, stand_ins)
        kernel_floor, _ = kernel_distance(reference, stand_ins, subset_size=subset_size, seed=seed)
    return [
        Metric(
            name=f"FD-{provenance.extractor}",
            value=frechet_distance(reference, fake),
            floor=frechet_floor,
            provenance=provenance,
        ),
        Metric(
            name=f"KID-{provenance.extractor}",
            value=kernel_value,
            spread=kernel_spread,
            floor=kernel_floor,
            details={"subset_size": subset_size},
            provenance=provenance,
        ),
    ]


def _class_metrics(seen: _Seen, provenance: Provenance, class_names: Sequence[str]) -> list[Metric]:
    assert seen.fake.logits is not None
    found = class_statistics(seen.fake.logits)
    names = tuple(class_names) or tuple(map(str, range(len(found.shares))))
    if len(names) != len(found.shares):
        raise UserError(f"{provenance.extractor} knows {len(found.shares)} classes, but {len(names)} names were given.")
    floor = None
    if seen.stand_ins is not None and seen.stand_ins.logits is not None:
        floor = class_statistics(seen.stand_ins.logits)
    shares = dict(zip(names, found.shares, strict=True))
    most = {"most_possible": math.log(len(names))}
    return [
        Metric(
            name="Class coverage",
            value=found.coverage,
            floor=None if floor is None else floor.coverage,
            better="higher",
            details=shares,
            provenance=provenance,
        ),
        Metric(
            name="Class entropy",
            value=found.entropy,
            floor=None if floor is None else floor.entropy,
            better="higher",
            details=most,
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
