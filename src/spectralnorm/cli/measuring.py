"""What ``spectralnorm evaluate`` measures, and with which images and extractors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, choose
from spectralnorm.gan.data import ImageSet, ImageStream, open_images
from spectralnorm.gan.data.points import MIXTURES
from spectralnorm.gan.evaluation import PATH_LENGTH, extractors_for, measure, searched
from spectralnorm.gan.image_folders import all_images, size_of_first
from spectralnorm.gan.inputs import check_run_data, open_run_data
from spectralnorm.gan.run_folder import CONFIG_FILE
from spectralnorm.gan.sampling import GENERATOR_FILE, TrainedGenerator, load
from spectralnorm.metrics import MEASURES, FeatureExtractor, Progress, evaluate, load_extractor
from spectralnorm.records import Metric

if TYPE_CHECKING:
    from spectralnorm.cli.evaluate import EvaluateOptions

__all__ = ["is_run", "measure_images", "measure_run", "metric_names"]


def metric_names(options: EvaluateOptions) -> tuple[str, ...]:
    """What was asked for."""
    names = tuple(name.strip() for name in options.metrics.split(",") if name.strip())
    for name in names:
        choose("metric", name, ("default", "all", *MEASURES, PATH_LENGTH))
    names = (*names, "wasserstein") if options.wasserstein else names
    if not names:
        raise UserError(f"--metrics names none; choose of default, all, {', '.join(MEASURES)}, {PATH_LENGTH}.")
    return names


def is_run(target: Path) -> bool:
    """Whether it is a run or a generator of one, and not images."""
    if not target.exists():
        raise UserError(f"{target} does not exist; give a run folder, a {GENERATOR_FILE}, or images.")
    if target.is_dir():
        return (target / CONFIG_FILE).exists() or (target / GENERATOR_FILE).exists()
    return target.suffix == ".safetensors"


def measure_run(
    options: EvaluateOptions, names: tuple[str, ...], *, device: torch.device, progress: Progress
) -> tuple[tuple[Metric, ...], TrainedGenerator]:
    """Measure a run's samples; returns its generator as well."""
    if options.against is not None:
        raise UserError("--against is for two folders of images; a run is compared with its own data, or --data.")
    if options.image_size is not None:
        raise UserError("--image-size is for folders of images; a run has its own size.")
    generator = load(options.target, device=str(device))
    if generator.makes_points and options.data is not None and str(options.data) not in MIXTURES:
        raise UserError(f"This run makes points, which are compared with {' or '.join(MIXTURES)}; leave out --data.")
    images = _images_for(options, generator.config)
    metrics = measure(
        generator,
        images,
        extractors=_extractors(options, device) or extractors_for(images, device=device),
        num=5000 if options.num is None else options.num,
        seed=options.seed,
        metrics=names,
        with_intervals=options.intervals,
        progress=progress,
    )
    return metrics, generator


def measure_images(
    options: EvaluateOptions, names: tuple[str, ...], *, device: torch.device, progress: Progress
) -> tuple[Metric, ...]:
    """Measure images against others."""
    if options.data is None and options.against is None:
        raise UserError(
            f"{options.target} is not a run folder; to measure the images in it, say what to compare them with: --data "
            "for the part of real images that training would hold out, or --against for all of them."
        )
    if PATH_LENGTH in names:
        raise UserError(f"The metric '{PATH_LENGTH}' needs a generator; give a run instead of images.")
    size, channels = size_of_first(options.target) if options.image_size is None else (options.image_size, 3)
    progress("reading images", 0, 2)
    fake = all_images(options.target, image_size=size, channels=channels)[: options.num]
    progress("reading images", 1, 2)
    if options.against is not None:
        real, training = all_images(options.against, image_size=size, channels=channels), None
        split = options.against.resolve().name
        class_names: tuple[str, ...] = ()
        extractors = _extractors(options, device) or [load_extractor("squeezenet", device=device)]
    else:
        images = open_images(options.data, image_size=size, channels=channels)
        real, training, class_names, split = images.held_out, searched(images, names), images.class_names, "held-out"
        extractors = _extractors(options, device) or extractors_for(images, device=device)
    progress("reading images", 2, 2)
    return evaluate(
        fake,
        real,
        extractors=extractors,
        metrics=names,
        training=training,
        split=split,
        seed=options.seed or 0,
        class_names=class_names,
        with_intervals=options.intervals,
        progress=progress,
    )


def _images_for(options: EvaluateOptions, config: Config) -> ImageSet | ImageStream:
    """What a run is compared with: its own data, parted as when it was trained, or what was given instead."""
    run = options.target if options.target.is_dir() else options.target.parent
    # The same data may lie elsewhere now; only loaded as they were do they hold out the same images.
    images = open_run_data(run, config, options.data)
    if options.data is None:
        check_run_data(run, images, advice="give what to compare with as --data")
    return images


def _extractors(options: EvaluateOptions, device: torch.device) -> list[FeatureExtractor]:
    """Those that were named; none for ``auto``."""
    names = [] if options.extractor == "auto" else [name.strip() for name in options.extractor.split(",")]
    if options.weights is not None and len(names) != 1:
        raise UserError("--weights is the file of one extractor; name it alone, as in --extractor dinov2.")
    return [load_extractor(name, device=device, weights=options.weights) for name in names]
