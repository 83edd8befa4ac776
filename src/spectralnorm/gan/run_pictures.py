"""Pictures in a run folder, each with the record that describes it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from spectralnorm.gan.pictures import image_grid, save_png
from spectralnorm.gan.sampling import TrainedGenerator
from spectralnorm.gan.scatter import SIDE, scatter
from spectralnorm.records import Picture

__all__ = ["NUM_POINTS", "save_grid", "save_points"]

NUM_POINTS = 2500
"""That are drawn of each kind."""


def save_grid(
    run: Path, images: Tensor, *, file: str, step: int, role: str, columns: int, caption: str = ""
) -> Picture:
    """Save a grid of images, uint8 ``(num, channels, height, width)``, as ``file`` in the run folder."""
    save_png(run / file, image_grid(images, columns=columns))
    num, _, height, width = images.shape
    return Picture(
        step=step,
        role=role,
        file=file,
        rows=-(-num // columns),
        columns=columns,
        tile_height=height,
        tile_width=width,
        caption=caption,
    )


def save_points(
    run: Path, generator: TrainedGenerator | None, real: Tensor, *, file: str, step: int, role: str
) -> Picture:
    """Save a picture of generated points on top of real ones ``(num, 2, 1, 1)``; None: the real ones."""
    points = None if generator is None else generator.sample(NUM_POINTS, seed=generator.config.seed).flatten(1)
    save_png(run / file, scatter(points, real=real[:NUM_POINTS].flatten(1)))
    caption = "gray: real points" + ("" if points is None else f"; red: {NUM_POINTS:,} generated ones")
    return Picture(
        step=step, role=role, file=file, rows=1, columns=1, tile_height=SIDE, tile_width=SIDE, caption=caption
    )
