"""Grids of images as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

__all__ = ["encode_png", "image_grid", "save_png", "to_pillow"]


def image_grid(images: Tensor, *, columns: int) -> Tensor:
    """Tile images row after row, without gaps; a last row that is not full ends in black.

    Args:
        images: uint8 ``(num, channels, height, width)``.
        columns: tiles a row.

    Returns:
        uint8 ``(channels, rows * height, columns * width)``.
    """
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    padding = images.new_zeros(rows * columns - num, channels, height, width)
    tiles = torch.cat([images, padding]).view(rows, columns, channels, height, width)
    return tiles.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def to_pillow(image: Tensor) -> Image.Image:
    """One uint8 image ``(1 or 3, height, width)`` as Pillow's, gray or RGB."""
    return Image.fromarray(image[0].numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy())


def encode_png(image: Tensor) -> bytes:
    """One uint8 image ``(1 or 3, height, width)`` as a PNG file."""
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: Path, image: Tensor) -> None:
    """Write one image so that its final name never stands on half a file.

    Args:
        path: final name; its folder is made if absent.
        image: uint8 ``(1 or 3, height, width)``.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(encode_png(image))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
