"""What a config names, made real: its images and its device."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectralnorm.errors import UserError
from spectralnorm.gan.config import GIVEN_DATA, Config
from spectralnorm.gan.data import ImageSet, ImageStream, from_huggingface, from_tensors, load_images, open_images
from spectralnorm.gan.data.huggingface import is_huggingface
from spectralnorm.gan.data.items import from_items
from spectralnorm.gan.data.points import MIXTURES, open_points
from spectralnorm.gan.run_folder import recorded_data

__all__ = ["GIVEN_DATA", "check_run_data", "open_data", "open_run_data", "prepare_data", "resolve_device"]


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
        if path is not None and path in MIXTURES:
            return open_points(path)
        if path == GIVEN_DATA:
            raise UserError("This run was trained on images given from Python; give them again as data=.")
        return load(path)
    if is_huggingface(data):
        return from_huggingface(data, image_size=config.image_size, channels=config.channels)
    if isinstance(data, torch.Tensor):
        return wrap(data)
    return from_items(data, image_size=config.image_size, channels=config.channels)


def open_data(config: Config, data: Any = None, *, loading: str = "auto") -> ImageSet | ImageStream:
    """As `prepare_data`, but a set that is too large, or asked to be, is read while training goes on.

    Args:
        config: the settings.
        data: what was given instead of ``config.data``; an `ImageStream`, too.
        loading: ``auto``, ``prepare`` or ``stream``, as `spectralnorm.gan.data.open_images` takes it. What is given as
            an object is in memory already.

    Raises:
        UserError: they cannot be read or used.
    """
    if isinstance(data, ImageStream):
        return data
    path = config.data
    if data is not None:
        path = os.fspath(data) if isinstance(data, str | os.PathLike) else GIVEN_DATA
    if path != GIVEN_DATA and path not in MIXTURES:
        return open_images(
            path,
            image_size=config.image_size,
            channels=config.channels,
            loading=loading,
            cache_bytes=round(1e9 * config.stream_cache_gb),
        )
    return prepare_data(config, data)


def open_run_data(folder: Path, config: Config, data: Any = None) -> ImageSet | ImageStream:
    """As `open_data`, and as a run in ``folder`` has loaded them before, on which it depends what is held out.

    Raises:
        UserError: they cannot be read or used.
    """
    streamed = recorded_data(folder).get("streamed")
    loading = config.data_loading if streamed is None else "stream" if streamed else "prepare"
    return open_data(config, data, loading=loading)


def check_run_data(folder: Path, images: ImageSet | ImageStream, *, advice: str) -> None:
    """Check that these are the images that a run was trained on, parted as they were.

    Args:
        folder: of the run.
        images: opened now.
        advice: what to do unless they can be restored.

    Raises:
        UserError: they are others.
    """
    if recorded_data(folder).get("fingerprint", images.fingerprint) != images.fingerprint:
        raise UserError(
            f"The images of {images.name} are not those that {folder} was trained on; restore them, or {advice}."
        )


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
