"""From a path, or nothing, or tensors, to the images that training sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data import builtin, cache
from spectralnorm.gan.data.arrays import ArraySource, is_idx_images, open_idx, open_npy, open_npz
from spectralnorm.gan.data.files import IMAGE_EXTENSIONS, open_folder, open_zip
from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.prepare import Progress, Source, image_set_of, prepare
from spectralnorm.gan.data.summary import printable

__all__ = ["from_tensors", "load_images"]


def load_images(
    path: str | Path | None, *, image_size: int, channels: int, progress: Progress | None = None
) -> ImageSet:
    """Load images, prepared for training.

    Args:
        path: a folder of images, a ZIP of images, an IDX file or a folder of them, a ``.npy`` or ``.npz`` file; None
            for the built-in Fashion-MNIST.
        image_size: height and width to train at, in pixels.
        channels: 1 (gray) or 3 (RGB).
        progress: called with the number of images read so far and their total while images are decoded.

    Raises:
        UserError: there are no images, too few different ones, more than 5 % of them cannot be read, or labels do
            not match them.
    """
    _check_shape(image_size, channels)
    if path is None:
        return prepare(
            builtin.open_builtin(),
            name=builtin.NAME,
            source_text=builtin.SOURCE,
            licence=builtin.LICENCE,
            image_size=image_size,
            channels=channels,
        )
    path = Path(path).expanduser()
    source = _open(path)
    name, source_text = printable(path.resolve().name or str(path)), printable(str(path))
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
    images: Tensor, labels: Tensor | None = None, *, image_size: int, channels: int, name: str = "tensors"
) -> ImageSet:
    """Use images already in memory.

    Args:
        images: ``(N, 1 or 3, height, width)``, uint8, or floats in [0, 1], or in [-1, 1] when any is negative.
        labels: integers ``(N,)``.
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
    source = ArraySource(array, label_array, what=name, channels_last=False)
    return prepare(source, name=name, source_text="tensors in memory", image_size=image_size, channels=channels)


def _check_shape(image_size: int, channels: int) -> None:
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {channels}.")
    if image_size < 1:
        raise UserError(f"image_size must be a positive number of pixels, got {image_size}.")


def _open(path: Path) -> Source:
    """Find out what lies at a path."""
    kinds = "a folder of images, a ZIP of images, an IDX, .npy or .npz file"
    try:
        if not path.exists():
            raise UserError(f"there is nothing at the data path {str(path)!r}; give {kinds}.")
        if path.is_dir():
            idx = sorted(file for file in path.iterdir() if is_idx_images(file.name))
            # Beside training images the others of the set are found by their names.
            chosen = next((file for file in idx if "train" in file.name), idx[0] if idx else None)
            return open_folder(path) if chosen is None else open_idx(chosen)
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise UserError(f"the data path {str(path)!r} cannot be read: {error.strerror or error}.") from error
    extension = path.suffix.lower()
    if not head:
        raise UserError(f"the data file {str(path)!r} is empty; give {kinds}.")
    if extension in _OPENERS:
        return _OPENERS[extension](path)
    if extension in IMAGE_EXTENSIONS:
        raise UserError(f"the data path {str(path)!r} is a single image, and training needs many; give {kinds}.")
    # IDX: two zero bytes and the type of the values, perhaps compressed.
    if is_idx_images(path.name) or head[:3] == b"\0\0\x08" or (head[:2] == b"\x1f\x8b" and ".tar" not in path.suffixes):
        return open_idx(path)
    raise UserError(f"the data path {str(path)!r} is a file of an unknown kind; give {kinds}.")


_OPENERS: Mapping[str, Callable[[Path], Source]] = {".zip": open_zip, ".npy": open_npy, ".npz": open_npz}
