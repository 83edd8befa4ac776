"""``spectralnorm sample``: parse, call, print."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.config import choose

# All else where it is used: a help page needs no torch.
if TYPE_CHECKING:
    from torch import Tensor

    from spectralnorm.gan.sampling import TrainedGenerator

__all__ = ["run"]

_MAX_SEEDS = 100_000


@dataclass(frozen=True)
class SampleOptions:
    """Generate images from a run folder or a generator.safetensors."""

    run: tyro.conf.Positional[Path]
    """Run folder, or generator.safetensors."""
    num: int | None = None
    """How many images, by default 64; walks with --interpolate, by default 8, and with --video, by default 9."""
    seed: int = 0
    """Of the latents: the same seed gives the same images."""
    seeds: str | None = None
    """One image for each of these seeds, such as 0,1,5-9, in place of --num and --seed."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Of a conditional generator: name or number of the class of all images; none: drawn as in the training data."""
    truncation: float = 1.0
    """Below 1: more typical images that vary less; styles of StyleGAN2, latents of the others."""
    out: Path | None = None
    """PNG file of the grid, or folder of the single images; none: samples.png or samples/ here."""
    format: str = "grid"
    """grid: one PNG; png: single PNGs."""
    interpolate: bool = False
    """Walks between random latents, one a row."""
    video: Path | None = None
    """File of a video of walks side by side, .gif, .webp or .mp4, which ends where it began."""
    frames: int = 120
    """Of the video."""
    fps: float = 30.0
    """Frames a second of the video."""
    columns: int | None = None
    """Images in a row of the grid; none: a square grid, or 12 steps a walk."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(words: list[str]) -> int:
    """Write the images and say where they are."""
    options = parse(SampleOptions, words, prog="spectralnorm sample")
    seeds = _check(options)
    from spectralnorm.gan.inputs import resolve_device
    from spectralnorm.gan.sampling import load

    generator = load(options.run, device=str(resolve_device(options.device)))
    try:
        if options.video is not None:
            if generator.makes_points:
                raise UserError("This run makes points, which do not move as images do; leave out --video.")
            _write_video(generator, options, options.video)
        else:
            _write_images(generator, options, seeds)
    except OSError as error:
        raise UserError(
            f"Cannot write {error.filename or options.video or options.out} ({error.strerror}); choose another --out."
        ) from error
    return 0


def _check(options: SampleOptions) -> list[int] | None:
    """The seeds of --seeds; what cannot be meant is refused before the generator is read."""
    choose("format", options.format, ("grid", "png"))
    choose("device", options.device, ("auto", "cpu", "cuda"))
    for name in ("num", "columns"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    if options.video is not None:
        if options.interpolate or options.out is not None or options.format != "grid":
            raise UserError("--video is the whole output; leave out --interpolate, --out and --format.")
        if options.frames < 2:
            raise UserError(f"frames must be at least 2, got {options.frames}.")
        from spectralnorm.gan.video import check_video

        check_video(options.video, fps=options.fps)
    elif options.format == "grid" and options.out is not None and options.out.suffix.lower() != ".png":
        raise UserError(
            f"--out of a grid must end in .png, got '{options.out}'; single images go into a folder with --format png."
        )
    if options.seeds is None:
        return None
    if options.num is not None or options.seed != 0 or options.interpolate or options.video is not None:
        raise UserError("--seeds names single images; leave out --num, --seed, --interpolate and --video.")
    return _read_seeds(options.seeds)


def _read_seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UserError(f"seeds must be whole numbers and ranges such as 0,1,5-9, got '{text}'.")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UserError(f"The seeds {first}-{last} run backwards; write {last}-{first}.")
        if last - first >= _MAX_SEEDS - len(seeds):
            raise UserError(f"seeds may name at most {_MAX_SEEDS:,} images, got '{text}'.")
        seeds += range(first, last + 1)
    return seeds


def _write_images(generator: TrainedGenerator, options: SampleOptions, seeds: list[int] | None) -> None:
    from spectralnorm.gan.inputs import prepare_data
    from spectralnorm.gan.pictures import image_grid, save_png
    from spectralnorm.gan.run_pictures import NUM_POINTS
    from spectralnorm.gan.scatter import scatter

    if generator.makes_points:
        if options.interpolate or options.format == "png":
            raise UserError("This run makes points, which become one picture; leave out --interpolate and --format.")
        file = options.out or Path("samples.png")
        num = (NUM_POINTS if options.num is None else options.num) if seeds is None else None
        points = generator.sample(num, seed=options.seed, seeds=seeds)
        real, _ = prepare_data(generator.config).examples(NUM_POINTS)
        save_png(file, scatter(points.flatten(1), real=real.flatten(1)))
        print(f"{file}")
        return
    images, columns = _images(generator, options, seeds)
    if options.format == "png":
        folder = options.out or Path("samples")
        # With seeds a file is named after what it can be made from again.
        names = range(len(images)) if seeds is None else seeds
        digits = len(str(max(names)))
        for name, image in zip(names, images, strict=True):
            save_png(folder / f"{name:0{digits}d}.png", image)
        print(f"{len(set(names))} images in {folder}")
    else:
        file = options.out or Path("samples.png")
        save_png(file, image_grid(images, columns=columns))
        print(f"{file}")


def _images(generator: TrainedGenerator, options: SampleOptions, seeds: list[int] | None) -> tuple[Tensor, int]:
    """The images, and how many go into a row."""
    if options.interpolate:
        columns = options.columns or 12
        walks = generator.interpolate(
            8 if options.num is None else options.num,
            columns,
            seed=options.seed,
            labels=options.class_,
            truncation=options.truncation,
        )
        return walks, columns
    num = len(seeds) if seeds is not None else 64 if options.num is None else options.num
    images = generator.sample(
        num, seed=options.seed, seeds=seeds, labels=options.class_, truncation=options.truncation
    )  # fmt: skip
    return images, options.columns or math.ceil(math.sqrt(num))


def _write_video(generator: TrainedGenerator, options: SampleOptions, file: Path) -> None:
    from spectralnorm.gan.pictures import image_grid
    from spectralnorm.gan.video import save_video

    num = 9 if options.num is None else options.num
    columns = options.columns or math.ceil(math.sqrt(num))
    walks = generator.walk(
        num, options.frames, seed=options.seed, labels=options.class_, truncation=options.truncation
    )  # fmt: skip
    frames = [image_grid(walks[:, frame], columns=columns) for frame in range(options.frames)]
    save_video(file, frames, fps=options.fps)
    print(f"{file}")
