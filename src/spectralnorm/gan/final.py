"""What a finished run shows: its samples, their nearest training images, walks between latents, spectra and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectralnorm.gan.data import ImageSet, ImageStream
from spectralnorm.gan.evaluation import MOST_SEARCHED, measure, metrics_of
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.observers import RecordLog, trained_generator
from spectralnorm.gan.run_pictures import NUM_POINTS, save_grid, save_points
from spectralnorm.gan.sampling import TrainedGenerator
from spectralnorm.gan.trainer import Trainer
from spectralnorm.gan.weight_norms import spectra
from spectralnorm.metrics import FeatureExtractor, nearest_neighbours
from spectralnorm.records import Evaluation, Spectra

__all__ = ["finish"]


def finish(
    folder: Path,
    log: RecordLog,
    trainer: Trainer,
    images: ImageSet | ImageStream,
    extractors: Sequence[FeatureExtractor],
    *,
    measured: bool = True,
) -> None:
    """Draw and measure the trained generator.

    Args:
        folder: the run folder.
        log: its records.
        trainer: the run, done.
        images: what it was trained on, with the held-out images to measure against.
        extractors: what the metrics see images through.
        measured: whether to measure them at all.
    """
    layers = spectra(trainer.discriminator)  # gathered by all processes, where they hold it in parts
    if not trainer.processes.is_first:
        return
    generator = trained_generator(trainer)
    if ARCHITECTURES[trainer.config.architecture].makes_points:
        _draw_points(folder, log, trainer.step, generator, images)
    else:
        _draw_images(folder, log, trainer.step, generator, images)
    log.append(Spectra(step=trainer.step, layers=layers))
    if measured:
        metrics = measure(
            generator,
            images,
            extractors=extractors,
            num=trainer.config.num_evaluation_samples,
            metrics=metrics_of(trainer.config),
        )
        log.append(
            Evaluation(
                step=trainer.step,
                images_seen=trainer.images_seen,
                training_seconds=trainer.clock.seconds,
                final=True,
                metrics=metrics,
            )
        )


def _draw_images(
    folder: Path, log: RecordLog, step: int, generator: TrainedGenerator, images: ImageSet | ImageStream
) -> None:
    def save(role: str, shown: Tensor, *, columns: int = 16, caption: str = "") -> None:
        file = f"samples/{role}.png"
        log.append(save_grid(folder, shown, file=file, step=step, role=role, columns=columns, caption=caption))

    seed = generator.config.seed
    known, _ = images.examples(MOST_SEARCHED)
    samples = generator.sample(128, seed=seed)
    save("final", samples)
    save("real", known[:128])
    chosen = samples[:16]
    indices, distances = nearest_neighbours(chosen, known)
    caption = f"mean distance {float(distances.mean()):.1f} (root of summed squared pixel differences, levels 0-255)"
    if len(known) < images.num_training:
        caption += f", looked for among {len(known):,} of the {images.num_training:,} training images"
    save("neighbours", torch.cat([chosen, known[indices.flatten()]]), caption=caption)
    save("interpolation", generator.interpolate(rows=6, columns=12, seed=seed + 1), columns=12)


def _draw_points(
    folder: Path, log: RecordLog, step: int, generator: TrainedGenerator, images: ImageSet | ImageStream
) -> None:
    for role, shown in (("final", generator), ("real", None)):
        file = f"samples/{role}.png"
        log.append(save_points(folder, shown, images.examples(NUM_POINTS)[0], file=file, step=step, role=role))
