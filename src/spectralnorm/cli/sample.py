"""``spectralnorm sample``: parse, call, print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.config import choose
from spectralnorm.gan.inputs import resolve_device
from spectralnorm.gan.pictures import image_grid, save_png
from spectralnorm.gan.sampling import load

__all__ = ["run"]


@dataclass(frozen=True)
class SampleOptions:
    """Generate images from a run folder or a generator.safetensors."""

    run: tyro.conf.Positional[Path]
    """Run folder, or generator.safetensors."""
    num: int | None = None
    """How many images, by default 64; with --interpolate, how many walks, by default 8."""
    seed: int = 0
    """Of the latents: the same seed gives the same images."""
    out: Path | None = None
    """PNG file of the grid, or folder of the single images; none: samples.png or samples/ here."""
    format: str = "grid"
    """grid: one PNG; png: single PNGs."""
    interpolate: bool = False
    """Walks between random latents, one a row."""
    columns: int | None = None
    """Images in a row of the grid; none: a square grid, or 12 steps a walk."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(words: list[str]) -> int:
    """Write the images and say where they are."""
    options = parse(SampleOptions, words, prog="spectralnorm sample")
    choose("format", options.format, ("grid", "png"))
    choose("device", options.device, ("auto", "cpu", "cuda"))
    num = (8 if options.interpolate else 64) if options.num is None else options.num
    if num < 1:
        raise UserError(f"num must be at least 1, got {num}.")
    if options.columns is not None and options.columns < 1:
        raise UserError(f"columns must be at least 1, got {options.columns}.")
    generator = load(options.run, device=str(resolve_device(options.device)))
    if options.interpolate:
        columns = options.columns or 12
        images = generator.interpolate(num, columns, seed=options.seed)
    else:
        columns = options.columns or math.ceil(math.sqrt(num))
        images = generator.sample(num, seed=options.seed)
    try:
        if options.format == "png":
            folder = options.out or Path("samples")
            digits = len(str(len(images) - 1))
            for index, image in enumerate(images):
                save_png(folder / f"{index:0{digits}d}.png", image)
            print(f"{len(images)} images in {folder}")
        else:
            file = options.out or Path("samples.png")
            save_png(file, image_grid(images, columns=columns))
            print(f"{file}")
    except OSError as error:
        raise UserError(
            f"Cannot write {error.filename or options.out} ({error.strerror}); choose another --out."
        ) from error
    return 0
