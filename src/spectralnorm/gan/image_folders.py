"""Images that are measured, not trained on: all that lie in a place, at one size."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data import load_images
from spectralnorm.gan.data.files import IMAGE_EXTENSIONS

__all__ = ["all_images", "size_of_first"]


def all_images(path: Path, *, image_size: int, channels: int) -> Tensor:
    """Every image of a folder, ZIP, IDX or NumPy file: uint8 (n, channels, image_size, image_size).

    Raises:
        UserError: they cannot be read or used.
    """
    found = load_images(path, image_size=image_size, channels=channels)
    # In both parts the order looks random, but which image is in which part does not depend on chance.
    images = torch.cat([found.images, found.held_out])
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def size_of_first(path: Path) -> tuple[int, int]:
    """The shorter side of the first image, and whether it is gray (1) or colour (3).

    Raises:
        UserError: it cannot be told without reading everything.
    """
    try:
        found = _look(path)
    except (OSError, ValueError, UnidentifiedImageError, zipfile.BadZipFile, StopIteration):
        found = None
    if found is None:
        raise UserError(
            f"The size of the images in {str(path)!r} cannot be told from the first one; give --image-size."
        )
    return found


def _look(path: Path) -> tuple[int, int] | None:
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if _is_image(file.name))
        return _look_at(Image.open(next(iter(names))))
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if _is_image(name))
            with archive.open(next(iter(names))) as stream:
                return _look_at(Image.open(stream))
    if path.suffix.lower() == ".npy":
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        if len(shape) == 4:
            first = shape[1] in (1, 3) and shape[3] not in (1, 3)
            return min(shape[2:] if first else shape[1:3]), shape[1] if first else shape[3]
        return min(shape[1:]), 1
    return None


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_EXTENSIONS and not Path(name).name.startswith(".")


def _look_at(image: Image.Image) -> tuple[int, int]:
    with image:
        return min(image.size), 1 if image.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
