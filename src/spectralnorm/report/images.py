"""Pictures of a run folder as data URIs: cropped to whole tiles, and compressed until they fit a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from spectralnorm.records import Picture

__all__ = ["Grid", "InlineImage", "UnusablePicture", "inline", "open_grid"]

_QUALITIES = (None, 90, 75, 55)
"""Tried in this order until a set of images fits its budget; None is lossless."""


class UnusablePicture(Exception):
    """A picture that its record tells of cannot be shown; the message is for the reader of the report."""


@dataclass(frozen=True)
class Grid:
    """An image made of equal tiles."""

    image: Image.Image
    rows: int
    columns: int

    @property
    def tile_size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.width // self.columns, self.image.height // self.rows

    def crop(self, *, left: int = 0, top: int = 0, rows: int, columns: int) -> Grid:
        """The part of ``rows`` x ``columns`` tiles that begins at tile ``(top, left)``, as far as there are tiles."""
        rows, columns = min(rows, self.rows - top), min(columns, self.columns - left)
        width, height = self.tile_size
        box = (left * width, top * height, (left + columns) * width, (top + rows) * height)
        return Grid(self.image.crop(box), rows, columns)

    def within(self, *, width: int, height: int) -> Grid:
        """The first rows and columns, as many as fit into so many pixels; at least one of each."""
        tile_width, tile_height = self.tile_size
        return self.crop(rows=max(1, height // tile_height), columns=max(1, width // tile_width))

    def panels(self, *, columns: int) -> list[Grid]:
        """Side by side parts of at most so many columns, so that a page can put them below one another."""
        starts = range(0, self.columns, columns)
        return [self.crop(left=start, rows=self.rows, columns=columns) for start in starts]


@dataclass(frozen=True)
class InlineImage:
    """An image as text for ``src``, with its size in pixels."""

    uri: str
    width: int
    height: int


def open_grid(run: Path, picture: Picture) -> Grid:
    """Read a picture of a run.

    Raises:
        UnusablePicture: it is absent, broken, outside of the run folder, or not of the size its record tells.
    """
    path = (run / picture.file).resolve()
    if not path.is_relative_to(run.resolve()):
        raise UnusablePicture(f"{picture.file} lies outside of the run folder.")
    size = (picture.columns * picture.tile_width, picture.rows * picture.tile_height)
    if min(size) < 1:
        raise UnusablePicture(f"{picture.file} has no tiles.")
    try:
        with Image.open(path) as image:
            if image.size != size:
                raise UnusablePicture(
                    f"{picture.file} is {image.width} x {image.height} pixels, but its record tells of {size[0]} x "
                    f"{size[1]}."
                )
            loaded = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except FileNotFoundError as error:
        raise UnusablePicture(f"{picture.file} is missing.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusablePicture(f"{picture.file} is not a readable image.") from error
    return Grid(loaded, picture.rows, picture.columns)


def inline(images: Sequence[Image.Image], *, budget: int) -> list[InlineImage]:
    """Compress images alike, losslessly if they fit, and with as little loss as fits otherwise.

    Args:
        images: modes L or RGB.
        budget: bytes that all of them together should take; exceeded only when the lowest quality does not fit.

    Returns:
        The images in the same order.
    """
    if not images:
        return []
    # All frames of a run look alike: a few of them tell what the rest will take.
    probes = images[:: max(1, len(images) // 4)]
    share = budget * len(probes) / len(images)
    for quality in _QUALITIES:
        kind, encode = _encoder(quality)
        if quality == _QUALITIES[-1] or sum(len(encode(image)) for image in probes) <= share:
            break
    return [InlineImage(_data_uri(kind, encode(image)), image.width, image.height) for image in images]


def _encoder(quality: int | None) -> tuple[str, Callable[[Image.Image], bytes]]:
    webp = features.check("webp")
    if webp and quality is None:
        return "webp", lambda image: _encode(image, "WEBP", lossless=True, quality=60, method=4)
    if webp:
        return "webp", lambda image: _encode(image, "WEBP", quality=quality, method=4)
    if quality is None:
        return "png", lambda image: _encode(image, "PNG", optimize=True)
    return "jpeg", lambda image: _encode(image, "JPEG", quality=quality, subsampling=0)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
