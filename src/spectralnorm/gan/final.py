"""What a finished run shows: its samples, their nearest training images, walks between latents, spectra and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectralnorm.gan.data import ImageSet
from spectralnorm.gan.evaluation import measure
from spectralnorm.gan.observers import RecordLog, trained_generator
from spectralnorm.gan.pictures import image_grid, save_png
from spectralnorm.gan.trainer import Trainer
from spectralnorm.gan.weight_norms import spectra
from spectralnorm.metrics import FeatureExtractor, nearest_neighbours
from spectralnorm.records import Evaluation, Picture, Spectra

__all__ = ["finish"]


def finish(
    folder: Path,
    log: RecordLog,
    trainer: Trainer,
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
) -> None:
    """Draw and measure the trained generator.

    Args:
        folder: the run folder.
        log: its records.
        trainer: the run, done.
        images: what it was trained on, with the held-out images to measure against.
        extractors: what the metrics see images through; empty: no metrics.
    """
    layers = spectra(trainer.discriminator)  # gathered by all processes, where they hold it in parts
    if not trainer.processes.is_first:
        return
    generator = trained_generator(trainer)
    samples = generator.sample(128, seed=trainer.config.seed)
    _save(folder, log, trainer.step, "final", samples, columns=16)
    _save(folder, log, trainer.step, "real", images.images[:128], columns=16)
    chosen = samples[:16]
    indices, distances = nearest_neighbours(chosen, images.images)
    pairs = torch.cat([chosen, images.images[indices.flatten()]])
    caption = f"mean distance {float(distances.mean()):.1f} (root of summed squared pixel differences, levels 0-255)"
    _save(folder, log, trainer.step, "neighbours", pairs, columns=16, caption=caption)
    walks = generator.interpolate(rows=6, columns=12, seed=trainer.config.seed + 1)
    _save(folder, log, trainer.step, "interpolation", walks, columns=12)
    log.append(Spectra(step=trainer.step, layers=layers))
    if extractors:
        metrics = measure(generator, images, extractors=extractors, num=trainer.config.num_evaluation_samples)
        log.append(
            Evaluation(
                step=trainer.step,
                images_seen=trainer.images_seen,
                training_seconds=trainer.clock.seconds,
                final=True,
                metrics=metrics,
            )
        )


def _save(
    folder: Path, log: RecordLog, step: int, role: str, images: Tensor, *, columns: int, caption: str = ""
) -> None:
    file = f"samples/{role}.png"
    save_png(folder / file, image_grid(images, columns=columns))
    num, _, height, width = images.shape
    log.append(
        Picture(
            step=step,
            role=role,
            file=file,
            rows=-(-num // columns),
            columns=columns,
            tile_height=height,
            tile_width=width,
            caption=caption,
        )
    )
