"""What a config names, made real: its images and its device."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, from_tensors, load_images

__all__ = ["GIVEN_DATA", "prepare_data", "resolve_device"]

GIVEN_DATA = "given-from-python"
"""What ``config.data`` says when the images were passed as objects: no path leads back to them."""


def prepare_data(config: Config, data: Any = None) -> ImageSet:
    """The images a config asks for, or what was given instead, at the config's size and channels.

    Raises:
        UserError: they cannot be read or used.
    """
    load = partial(load_images, image_size=config.image_size, channels=config.channels)
    wrap = partial(from_tensors, image_size=config.image_size, channels=config.channels)
    if isinstance(data, ImageSet):
        return data
    if data is None or isinstance(data, str | os.PathLike):
        path = config.data if data is None else os.fspath(data)
        if path == GIVEN_DATA:
            raise UserError("This run was trained on images given from Python; give them again as data=.")
        return load(path)
    if isinstance(data, torch.Tensor):
        return wrap(data)
    items = [data[index] for index in range(len(data))]
    if items and isinstance(items[0], tuple | list):
        images, labels = zip(*items, strict=True)
        return wrap(torch.stack(images), torch.tensor([int(label) for label in labels]))
    return wrap(torch.stack(items))


def resolve_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else MPS (a Mac's GPU) where there is one, else the CPU.

    Raises:
        UserError: what was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        what = {"cuda": "CUDA GPU", "mps": "GPU of a Mac"}[name]
        raise UserError(f"device '{name}' was asked for, but torch finds no {what} here; use --device cpu or auto.")
    return torch.device(name)
