"""Measuring a generator against held-out real images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectralnorm.gan.data import ImageSet
from spectralnorm.gan.data.points import MIXTURES
from spectralnorm.gan.point_metrics import measure_points
from spectralnorm.gan.sampling import TrainedGenerator
from spectralnorm.metrics import FeatureExtractor, evaluate, load_extractor
from spectralnorm.records import Metric

__all__ = ["extractors_for", "measure"]


def extractors_for(images: ImageSet, *, device: torch.device) -> list[FeatureExtractor]:
    """What can judge these images, quickest first: the classifier knows garments only, SqueezeNet sees any image."""
    if images.name in MIXTURES:  # points are seen as they are
        return []
    names = ["classifier", "squeezenet"] if images.name == "fashion-mnist" else ["squeezenet"]
    return [load_extractor(name, device=device) for name in names]


def measure(
    generator: TrainedGenerator,
    images: ImageSet,
    *,
    extractors: Sequence[FeatureExtractor],
    num: int,
    seed: int | None = None,
    wasserstein: bool = False,
) -> tuple[Metric, ...]:
    """Compare generated images with the held-out ones.

    Args:
        generator: what is measured.
        images: the data, at the generator's size and channels.
        extractors: what the metrics see images through.
        num: generated images.
        seed: of their latents; None: another one than that of the sample grids, so nothing is judged by what was shown.
        wasserstein: whether to bound the Wasserstein-1 distance of features too, with a critic trained for it.
    """
    samples = generator.sample(num, seed=generator.config.seed + 1_000_003 if seed is None else seed)
    if images.name in MIXTURES:
        return measure_points(
            samples, images.held_out, mixture=images.name, seed=generator.config.seed, wasserstein=wasserstein
        )
    return evaluate(
        samples,
        images.held_out,
        extractors=extractors,
        seed=generator.config.seed,
        class_names=images.class_names,
        wasserstein=wasserstein,
    )
