"""Images that are measured, not trained on: all that lie in a place, at one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, UnreadableError
from spectralnorm.gan.data.opening import open_source
from spectralnorm.gan.data.prepare import Source, read_sample
from spectralnorm.gan.data.summary import printable

__all__ = ["all_images", "size_of_first"]

_GRAY = frozenset({"1", "L", "LA", "I", "I;16", "F"})


def all_images(path: Path, *, image_size: int, channels: int) -> Tensor:
    """Every image of whatever `spectralnorm.gan.data.load_images` takes: uint8 (n, channels, image_size, image_size).

    There may be few, or copies of one: that is for the metrics to say.

    Raises:
        UserError: they cannot be read.
    """
    source = open_source(path)
    found = read_sample(
        source, np.arange(len(source)), image_size=image_size, channels=channels, what=printable(str(path))
    )
    # By what they show, which looks random: by name, the first ones may be all of one class.
    order = sorted(range(len(found.facts)), key=lambda index: found.facts[index].digest)
    return torch.from_numpy(found.pixels[order])


def size_of_first(path: Path) -> tuple[int, int]:
    """The shorter side of the first image, and whether it is gray (1) or colour (3).

    Raises:
        UserError: there is none that can be read.
    """
    source = open_source(path)
    first = _first(source)
    if first is None:
        raise UserError(f"None of the {len(source):,} images in {printable(str(path))!r} can be read; replace them.")
    channels = 1 if first.mode in _GRAY else 3
    # Padded ones are read at the size that they are padded to.
    size = first.pixels.shape[-1] if source.padding else min(map(int, first.size.split("x")))
    return size, channels


def _first(source: Source) -> Decoded | None:
    for index in range(len(source)):
        try:
            return source.read(index, image_size=32, channels=3)
        except UnreadableError:
            continue
    return None
