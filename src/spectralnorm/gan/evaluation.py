"""Measuring a generator against held-out real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, ImageStream, builtin
from spectralnorm.gan.point_metrics import measure_points
from spectralnorm.gan.sampling import TrainedGenerator
from spectralnorm.metrics import (
    MEASURES,
    FeatureExtractor,
    NetworkExtractor,
    Progress,
    evaluate,
    load_extractor,
    path_length,
)
from spectralnorm.records import Metric, Provenance

__all__ = ["MOST_SEARCHED", "PATH_LENGTH", "extractors_for", "measure", "metrics_of", "require_measurable", "searched"]

MOST_SEARCHED = 100_000
"""Training images among which copies are looked for; the first are a fair sample."""
PATH_LENGTH = "ppl"
"""The name that asks for the path length: the one metric that needs the generator itself."""


def extractors_for(images: ImageSet | ImageStream, *, device: torch.device) -> list[FeatureExtractor]:
    """What can judge these images, quickest first: the classifier knows garments only, SqueezeNet sees any image."""
    # By what they are: names are those of the user's folders.
    if images.summary.channels == 2:  # points are seen as they are
        return []
    names = ["classifier", "squeezenet"] if images.summary.source == builtin.SOURCE else ["squeezenet"]
    return [load_extractor(name, device=device) for name in names]


def searched(images: ImageSet | ImageStream, metrics: Sequence[str]) -> Tensor | None:
    """Training images among which copies are looked for, which take long to read; None where no metric needs them."""
    return images.examples(MOST_SEARCHED)[0] if {"copying", "all"} & set(metrics) else None


def metrics_of(config: Config) -> tuple[str, ...]:
    """What a run measures while it trains and at its end."""
    return ("default", "wasserstein") if config.critic == "strict" else ("default",)


def require_measurable(config: Config, images: ImageSet | ImageStream) -> None:
    """Check before a run that it will not fail at what it measures.

    Raises:
        UserError: there are too few held-out images for a critic.
    """
    # Half of them stand in for generated ones and give the floor.
    num_held_out, fewest = images.summary.num_held_out, 2 * max(MEASURES["wasserstein"].fewest)
    if config.critic == "strict" and num_held_out < fewest:
        raise UserError(
            f"critic strict needs at least {fewest} held-out images, and {images.name} has {num_held_out}; take more "
            "images, or leave out critic."
        )


def measure(
    generator: TrainedGenerator,
    images: ImageSet | ImageStream,
    *,
    extractors: Sequence[FeatureExtractor],
    num: int,
    seed: int | None = None,
    metrics: Sequence[str] = ("default",),
    with_intervals: bool = False,
    progress: Progress | None = None,
) -> tuple[Metric, ...]:
    """Compare generated images with the held-out ones.

    Args:
        generator: what is measured.
        images: the data, at the generator's size and channels.
        extractors: what the metrics see images through.
        num: generated images; the path length takes half as many steps.
        seed: of their latents; None: another one than that of the sample grids, so nothing is judged by what was shown.
        metrics: as `spectralnorm.metrics.evaluate` takes them, and ``ppl``.
        with_intervals: whether to find 95 % intervals of the distances.
        progress: told what is being done.

    Raises:
        UserError: a metric is not known or not possible.
    """
    seed = generator.config.seed + 1_000_003 if seed is None else seed
    of_images = tuple(name for name in metrics if name != PATH_LENGTH)
    if generator.makes_points:
        _check_possible_of_points(metrics, extractors)
        return measure_points(
            generator.sample(num, seed=seed),
            images.held_out,
            mixture=images.name,
            seed=generator.config.seed,
            modes=not {"default", "all"}.isdisjoint(metrics),
            wasserstein=not {"wasserstein", "all"}.isdisjoint(metrics),
        )
    found: tuple[Metric, ...] = ()
    if of_images:
        if progress is not None:
            progress("generating images", 0, num)
        samples = generator.sample(num, seed=seed)
        if progress is not None:
            progress("generating images", num, num)
        found = evaluate(
            samples,
            images.held_out,
            extractors=extractors,
            metrics=of_images,
            training=searched(images, metrics),
            seed=generator.config.seed,
            class_names=images.class_names,
            with_intervals=with_intervals,
            progress=progress,
        )
    if not {PATH_LENGTH, "all"} & set(metrics):
        return found
    # Small differences between images are lost where an extractor takes levels, rounded to whole numbers.
    able = [extractor for extractor in extractors if isinstance(extractor, NetworkExtractor)]
    if not able and PATH_LENGTH in metrics:
        raise UserError(f"The metric '{PATH_LENGTH}' needs the classifier, SqueezeNet or DINOv2; leave it out.")
    for extractor in able:
        found += _path_lengths(generator, extractor, num=max(2, num // 2), seed=seed, progress=progress)
    return found


def _check_possible_of_points(metrics: Sequence[str], extractors: Sequence[FeatureExtractor]) -> None:
    for name in metrics:
        if name not in ("default", "all", "wasserstein"):
            raise UserError(f"The metric '{name}' is one of images; of points choose default, wasserstein or all.")
    if extractors:
        raise UserError(f"Points are seen as they are, without {extractors[0].name}; leave the extractor out.")


def _path_lengths(
    generator: TrainedGenerator, extractor: NetworkExtractor, *, num: int, seed: int, progress: Progress | None
) -> tuple[Metric, ...]:
    """In z for every generator; in w too for one that has styles."""
    device = next(generator.network.parameters()).device
    starts, ends = (part.to(device) for part in generator.latents(2 * num, seed=seed).chunk(2))
    # A path stays within one class.
    labels = generator.draw_labels(num, seed=seed)
    # Typed loosely: what more than forward() it has is asked below.
    network: Any = generator.network

    def images(latents: Tensor, rows: slice) -> Tensor:
        drawn = network(latents) if labels is None else network(latents, labels[rows].to(device))
        return (drawn.float() * 127.5 + 127.5).clamp(0, 255).to(extractor.device)

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{extractor.name}: {what}", done, total)

    provenance = Provenance(
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        num_real=0,
        num_fake=2 * num,
        split="none",
        resize=extractor.resize_description(
            generator.config.image_size, generator.config.image_size, channels=generator.config.channels
        ),
    )
    found = path_length(
        images,
        extractor.of_floats,
        starts,
        ends,
        spherical=True,
        seed=seed,
        progress=lambda done, total: tell("path length in z", done, total),
    )
    metrics = [_path_metric("z", found.mean, found.standard_error, found.num, provenance)]
    if labels is None and hasattr(network, "styles") and hasattr(network, "synthesize"):
        with torch.inference_mode():
            # One style for all layers, as the latent gives it.
            styles = [network.styles(part)[:, 0] for part in (starts, ends)]
        layers = network.num_styles

        def images_of_styles(latents: Tensor, rows: slice) -> Tensor:
            drawn = network.synthesize(latents[:, None].expand(-1, layers, -1))
            return (drawn.float() * 127.5 + 127.5).clamp(0, 255).to(extractor.device)

        found = path_length(
            images_of_styles,
            extractor.of_floats,
            *styles,
            spherical=False,
            seed=seed,
            progress=lambda done, total: tell("path length in w", done, total),
        )
        metrics.append(_path_metric("w", found.mean, found.standard_error, found.num, provenance))
    return tuple(metrics)


def _path_metric(space: str, mean: float, error: float, num: int, provenance: Provenance) -> Metric:
    return Metric(
        name=f"Path length in {space}-{provenance.extractor}",
        value=mean,
        interval=(mean - 1.96 * error, mean + 1.96 * error),
        details={"steps": num, "epsilon": 1e-4},
        provenance=provenance,
    )
