"""All metrics of a set of generated images, each with what it depends on and with its floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.cache import hash_of, remember
from spectralnorm.metrics.measures import MEASURES, Seen
from spectralnorm.metrics.network_extractor import FeatureExtractor, Features
from spectralnorm.records import Metric, Provenance

__all__ = ["DEFAULT_METRICS", "Progress", "evaluate"]

DEFAULT_METRICS = ("fd", "kid", "classes")
"""What takes seconds; ``classes`` for extractors with logits alone."""
MOST_TRAINING_IMAGES = 100_000
"""Among so many, the first ones, copies are looked for: images are in an order that looks random."""

_CHUNK = 1024


class Progress(Protocol):
    """Called with what is being done, how much of it is done, and how much there is."""

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """Tell it."""
        ...


def evaluate(
    fake: Tensor,
    real: Tensor,
    *,
    extractors: Sequence[FeatureExtractor],
    metrics: Sequence[str] = ("default",),
    training: Tensor | None = None,
    split: str = "held-out",
    seed: int = 0,
    class_names: Sequence[str] = (),
    with_intervals: bool = False,
    progress: Progress | None = None,
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
        extractors: what they are seen through.
        metrics: of ``fd``, ``kid``, ``wasserstein`` (needs twenty images on each side, and tens of seconds),
            ``classes`` and ``is`` (need logits), ``pr`` and ``dc`` (need six real images beside those that stand in),
            ``diversity`` (needs real images that differ) and ``copying`` (needs ``training``);
            ``all`` stands for all that are possible, ``default`` for those of `DEFAULT_METRICS` that are.
        training: images that were trained on, uint8, among which to look for copies.
        split: which real images, for the provenance.
        seed: of everything random. The global random numbers are left alone.
        class_names: of the logits' classes, to name their shares; empty: they are numbered.
        with_intervals: whether to find 95 % intervals of the distances by drawing images again; takes seconds.
        progress: told what is being done.

    Returns:
        For each extractor its metrics, named by it: ``FD-SqueezeNet``.

    Raises:
        UserError: too few images, or of the wrong type or shape; a metric that is not known, or not possible with any
            of the extractors.
    """
    for name, images in (("generated", fake), ("real", real)):
        if len(images) < 2:
            raise UserError(f"Metrics need at least two {name} images, got {len(images)}.")
    if fake.shape[1:] != real.shape[1:]:
        raise UserError(
            "Generated and real images must have the same channels, height and width, "
            f"got {tuple(fake.shape[1:])} and {tuple(real.shape[1:])}."
        )
    names, named = _chosen(metrics)
    results: list[Metric] = []
    computed: set[str] = set()
    lacking: dict[str, str] = {}
    for extractor in extractors:
        tell = _told_by(extractor, progress)
        # Looking at all that was trained on takes longest, and only one metric needs it.
        trained_on = training if "copying" in names else None
        seen = _see(extractor, fake, real, trained_on, split=split, seed=seed, progress=tell)
        seen = replace(seen, class_names=class_names, with_intervals=with_intervals)
        lacked = {name: MEASURES[name].lacks(seen) for name in names}
        lacking |= {name: lack for name, lack in lacked.items() if lack is not None}
        possible = [name for name in names if lacked[name] is None]
        for name in possible:
            tell(name, 0, 1)
            results += MEASURES[name].compute(seen)
            tell(name, 1, 1)
        computed.update(possible)
    for name in names:
        if name in named and name not in computed:
            raise UserError(f"The metric '{name}' needs {lacking.get(name, 'an extractor')}; leave it out.")
    return tuple(results)


def _chosen(metrics: Sequence[str]) -> tuple[list[str], set[str]]:
    """Names of measures in their order, and those of them that must be possible."""
    named = set(metrics) - {"all", "default"}
    for name in metrics:
        if name in named and name not in MEASURES:
            raise UserError(f"Unknown metric '{name}'; choose of {', '.join(MEASURES)}, default, or all.")
    wanted = named | set(MEASURES if "all" in metrics else DEFAULT_METRICS if "default" in metrics else ())
    return [name for name in MEASURES if name in wanted], named


def _told_by(extractor: FeatureExtractor, progress: Progress | None) -> Progress:
    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{extractor.name}: {what}", done, total)

    return tell


def _see(
    extractor: FeatureExtractor,
    fake: Tensor,
    real: Tensor,
    training: Tensor | None,
    *,
    split: str,
    seed: int,
    progress: Progress,
) -> Seen:
    key, of_real = _remembered(extractor, real, "real images", progress)
    training_key, of_training = "", None
    if training is not None:
        training_key, of_training = _remembered(extractor, training[:MOST_TRAINING_IMAGES], "training images", progress)
    of_fake = _look(extractor, fake, "generated images", progress)
    reference, stand_ins = of_real, None
    num_stand_ins = min(len(fake), len(real) // 2)
    if num_stand_ins >= 2:
        # One fixed order for every evaluation, so that all of them compare with the same reference.
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        reference, stand_ins = _rows(of_real, order[num_stand_ins:]), _rows(of_real, order[:num_stand_ins])
        key = hash_of(key, num_stand_ins)
    channels, height, width = fake.shape[1:]
    return Seen(
        extractor=extractor,
        provenance=Provenance(
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            num_real=len(reference.features),
            num_fake=len(fake),
            split=split,
            resize=extractor.resize_description(height, width, channels=channels),
        ),
        fake=of_fake,
        reference=reference,
        stand_ins=stand_ins,
        training=of_training,
        key=key,
        training_key=training_key,
        seed=seed,
    )


def _remembered(extractor: FeatureExtractor, images: Tensor, what: str, progress: Progress) -> tuple[str, Features]:
    """Features of images that do not change from one evaluation to the next, with what names them."""
    _, channels, height, width = images.shape
    resize = extractor.resize_description(height, width, channels=channels)
    key = hash_of(extractor.name, extractor.weights_sha256, resize, images=images)

    def look() -> dict[str, Tensor]:
        seen = _look(extractor, images, what, progress)
        return {name: part for name, part in seen._asdict().items() if part is not None}

    seen = remember(key, look)
    return key, Features(seen["features"], seen.get("logits"))


def _look(extractor: FeatureExtractor, images: Tensor, what: str, progress: Progress) -> Features:
    """Features in parts, so that it can be told how far one is."""
    parts: list[Features] = []
    for start in range(0, len(images), _CHUNK):
        progress(what, start, len(images))
        parts.append(extractor(images[start : start + _CHUNK]))
    progress(what, len(images), len(images))
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)


def _rows(features: Features, indices: Tensor) -> Features:
    logits = features.logits
    return Features(features.features[indices], None if logits is None else logits[indices])
