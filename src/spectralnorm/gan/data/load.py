"""From a path, or nothing, or tensors, to the images that training sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data import builtin, cache
from spectralnorm.gan.data.arrays import ArraySource
from spectralnorm.gan.data.huggingface import HuggingFaceSource
from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.opening import identity, open_source
from spectralnorm.gan.data.prepare import Progress, Source, image_set_of, prepare
from spectralnorm.gan.data.stream import ImageStream, open_stream
from spectralnorm.gan.data.stream_cache import STREAM_CACHE_BYTES
from spectralnorm.gan.data.summary import printable
from spectralnorm.gan.data.tars import TarSource

__all__ = ["LOADING", "STREAM_BYTES", "from_huggingface", "from_tensors", "load_images", "open_images"]

LOADING = ("auto", "prepare", "stream")
"""How images may be loaded."""

STREAM_BYTES = 2**33
"""What a set may take when prepared before it is streamed."""


def load_images(
    path: str | Path | None, *, image_size: int, channels: int, progress: Progress | None = None
) -> ImageSet:
    """Load images, prepared for training.

    Args:
        path: a folder of images, a ZIP or tars of images, what CIFAR, STL-10, ImageNet and LSUN are distributed as, an
            IDX file or a folder of them, a ``.npy``, ``.npz`` or Parquet file, ``hf:name`` for a data set of Hugging
            Face; None for the built-in Fashion-MNIST.
        image_size: height and width to train at, in pixels.
        channels: 1 (gray) or 3 (RGB).
        progress: called with the number of images read so far and their total while images are decoded.

    Raises:
        UserError: there are no images, too few different ones, more than 5 % of them cannot be read, labels do
            not match them, or a package that this kind of data needs is not installed.
    """
    images = open_images(path, image_size=image_size, channels=channels, loading="prepare", progress=progress)
    assert isinstance(images, ImageSet)
    return images


def open_images(
    path: str | Path | None,
    *,
    image_size: int,
    channels: int,
    loading: str = "auto",
    cache_bytes: int = STREAM_CACHE_BYTES,
    progress: Progress | None = None,
) -> ImageSet | ImageStream:
    """Open images to train on: prepared beforehand, or read while training goes on.

    Args:
        path: as `load_images` takes it.
        image_size: height and width to train at, in pixels.
        channels: 1 (gray) or 3 (RGB).
        loading: ``prepare``: decode all once, into memory or the cache; ``stream``: decode while training goes on, and
            keep what was decoded in the cache as far as it may grow; ``auto``: stream tars that would be larger than
            8 GB when prepared, and whatever is so large that neither memory nor the disk of the cache has room for it;
            but what the cache holds prepared is used.
        cache_bytes: what the kept images of all streamed sets may take together on the disk; 0: none are kept.
        progress: called with the number of images read so far and their total while images are decoded.

    Raises:
        UserError: as `load_images` does.
    """
    _check_shape(image_size, channels)
    if loading not in LOADING:
        raise UserError(f"Unknown data loading {loading!r}; choose one of {', '.join(LOADING)}.")
    if cache_bytes < 0:
        raise UserError(f"cache_bytes must be at least 0, got {cache_bytes}.")
    if path is None:
        # Already in memory: there is nothing to stream.
        return prepare(
            builtin.open_builtin(),
            name=builtin.NAME,
            source_text=builtin.SOURCE,
            licence=builtin.LICENCE,
            image_size=image_size,
            channels=channels,
        )
    path = Path(path).expanduser()
    name, source_text = printable(path.resolve().name or str(path)), printable(str(path))
    files = identity(path)
    if files is not None and loading != "stream":
        stored = cache.find(cache.cache_key(path, files, image_size=image_size, channels=channels))
        if stored is not None:
            return image_set_of(stored, name=name, source_text=source_text)
    source = open_source(path)
    key = cache.cache_key(path, source.files, image_size=image_size, channels=channels)
    if loading == "stream" or (loading == "auto" and _must_stream(source, key, len(source) * channels * image_size**2)):
        return open_stream(
            source,
            name=name,
            source_text=source_text,
            image_size=image_size,
            channels=channels,
            key=key,
            cache_bytes=cache_bytes,
            progress=progress,
        )
    return _prepared(
        source, path, name=name, source_text=source_text, image_size=image_size, channels=channels, progress=progress
    )


def from_huggingface(data: Any, *, image_size: int, channels: int, progress: Progress | None = None) -> ImageSet:
    """Use a ``Dataset`` or ``DatasetDict`` of Hugging Face's ``datasets``.

    Args:
        data: with a column of images, and perhaps one of classes; of a dictionary, ``train`` is trained on, and
            ``test`` or ``validation`` held out.
        image_size: height and width to train at, in pixels; images of another size are cut square and resized.
        channels: 1 (gray) or 3 (RGB) to train with.
        progress: called with the number of images read so far and their total.

    Raises:
        UserError: it holds no images, or is an ``IterableDataset``.
    """
    _check_shape(image_size, channels)
    source = HuggingFaceSource(data, what="the given data set")
    return _prepared(
        source,
        # No file has this name: what tells such data apart is the fingerprint that they bring.
        Path("/:given"),
        name="huggingface",
        source_text="a data set given from Python",
        image_size=image_size,
        channels=channels,
        progress=progress,
    )


def _must_stream(source: Source, key: cache.CacheKey, num_bytes: int) -> bool:
    # A set that was prepared has itself taken up room that there was for it.
    if num_bytes <= STREAM_BYTES or cache.find(key) is not None:
        return False
    return isinstance(source, TarSource) or not (cache.has_room(num_bytes) or num_bytes < cache.free_memory() / 2)


def _prepared(
    source: Source,
    path: Path,
    *,
    name: str,
    source_text: str,
    image_size: int,
    channels: int,
    progress: Progress | None,
) -> ImageSet:
    """The images of a source, from the cache if they are there."""
    num_bytes = len(source) * channels * image_size**2
    key = None
    if source.costs_decoding(image_size, channels) or num_bytes > cache.MEMORY_MAP_BYTES:
        key = cache.cache_key(path, source.files, image_size=image_size, channels=channels)
        stored = cache.find(key)
        if stored is not None:
            # The same data may be reached by another way of writing its path.
            return image_set_of(stored, name=name, source_text=source_text)
    return prepare(
        source,
        name=name,
        source_text=source_text,
        image_size=image_size,
        channels=channels,
        key=key,
        progress=progress,
    )


def from_tensors(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int,
    channels: int,
    name: str = "tensors",
) -> ImageSet:
    """Use images already in memory.

    Args:
        images: ``(N, 1 or 3, height, width)``, uint8, or floats in [0, 1], or in [-1, 1] when any is negative.
        labels: integers ``(N,)``.
        class_names: of the labels 0, 1, ..., where -1 means no class; None: each value is a class, named as it is.
        image_size: height and width to train at, in pixels; images of another size are cut square and resized.
        channels: 1 (gray) or 3 (RGB) to train with.
        name: shown in tables.

    Raises:
        UserError: another shape, type or range of values, or labels that do not match.
    """
    _check_shape(image_size, channels)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"images have the shape {tuple(images.shape)}; expected (number, 1 or 3 channels, height, width)."
        )
    # NumPy knows no bfloat16.
    floats = images.is_floating_point() and images.dtype != torch.float64
    array = images.detach().to("cpu", torch.float32 if floats else images.dtype).numpy()
    label_array = None if labels is None else labels.detach().cpu().numpy()
    source = ArraySource(array, label_array, class_names=class_names, what=name, channels_last=False)
    return prepare(source, name=name, source_text="tensors in memory", image_size=image_size, channels=channels)


def _check_shape(image_size: int, channels: int) -> None:
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {channels}.")
    if image_size < 1:
        raise UserError(f"image_size must be a positive number of pixels, got {image_size}.")
