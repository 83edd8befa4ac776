"""Images kept as arrays: IDX files (the format of MNIST), ``.npy``, ``.npz``, tensors.

Values: uint8, or any integers within 0 to 255; bool; floats in [0, 1], or in [-1, 1] when any is negative. Everything
else is refused rather than guessed at. Layouts: (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels, the
last taken as transparency; where both readings are possible the channels are last.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, fit

__all__ = ["ArraySource", "is_idx_images", "open_idx", "open_npy", "open_npz", "read_idx"]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_IMAGES = re.compile(r"images?[-._]idx[34]-ubyte(\.gz)?$", re.IGNORECASE)

_IMAGE_KEYS = ("images", "x_train", "train_images", "X_train", "x", "X", "data", "arr_0")
_LABEL_KEYS = ("labels", "y_train", "train_labels", "Y_train", "y", "Y", "label", "arr_1")
_TEST_IMAGE_KEYS = ("x_test", "test_images", "X_test")
_TEST_LABEL_KEYS = ("y_test", "test_labels", "Y_test")

_VALUES = "expected uint8, integers within 0 to 255, bool, or floats in [0, 1] or [-1, 1]"


class ArraySource:
    """Images of one array, and where given those of a second one that the data set itself holds out.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W); see the module for values and layouts.
        labels: (N,) integers, or (N, 1).
        test: images and labels that come held out.
        what: how messages name the data, for example ``'digits.npy'``.
        files: what the arrays were read from, which is their identity in the cache; () is never cached.
        pad_28: zero-pad 28 x 28 images to 32 before anything else, as is customary for the MNIST family.
        channels_last: fixes the layout of 4-D arrays; None finds it from the shape.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        test: tuple[np.ndarray, np.ndarray | None] | None = None,
        what: str,
        files: tuple[Path, ...] = (),
        pad_28: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        self._parts = [_ImageArray(images, what=what, channels_last=channels_last)]
        part_labels = [_checked_labels(labels, len(images), what=what)]
        if test is not None:
            self._parts.append(_ImageArray(test[0], what=f"the test images of {what}", channels_last=channels_last))
            part_labels.append(_checked_labels(test[1], len(test[0]), what=f"the test images of {what}"))
        self.files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.ignored: Counter[str] = Counter()
        self.held_out: np.ndarray | None = None
        if test is not None:
            self.held_out = np.arange(len(self)) >= len(images)
        self._pad = 2 if pad_28 and all(part.size == (28, 28) for part in self._parts) else 0
        self.padding = "zero-padded 28 -> 32" if self._pad else None
        known = [part for part in part_labels if part is not None]
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if len(known) == len(part_labels):
            values, positions = np.unique(np.concatenate(known), return_inverse=True)
            self.labels = positions.astype(np.int64)
            self.class_names = tuple(map(str, values.tolist()))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def file_name(self, index: int) -> str:
        return f"image {index}"

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        """Whether preparing the images costs so much that it should not be done twice."""
        return any(part.cost(image_size - 2 * self._pad, channels) for part in self._parts)

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """The image ``index``, counted through the training and then the test images."""
        for part in self._parts:
            if index < len(part):
                return part.read(index, image_size=image_size, channels=channels, pad=self._pad)
            index -= len(part)
        raise IndexError(index)


class _ImageArray:
    """A checked array of images that hands out single ones as uint8."""

    def __init__(self, array: np.ndarray, *, what: str, channels_last: bool | None) -> None:
        self._array, self._channels_first = _layout(array, what=what, channels_last=channels_last)
        self._scale, self._offset = _value_range(self._array, what=what)
        height, width = array.shape[2:4] if self._channels_first else array.shape[1:3]
        self.size = (width, height)
        channels = 1 if array.ndim == 3 else array.shape[1 if self._channels_first else 3]
        self._mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]

    def __len__(self) -> int:
        return len(self._array)

    def cost(self, image_size: int, channels: int) -> bool:
        return self.size != (image_size, image_size) or self._mode != ("L" if channels == 1 else "RGB")

    def read(self, index: int, *, image_size: int, channels: int, pad: int) -> Decoded:
        pixels = self._array[index]
        if self._channels_first:
            pixels = pixels.transpose(1, 2, 0)
        if self._scale != 1 or self._offset:
            pixels = np.rint(pixels.astype(np.float32) * self._scale + self._offset)
        pixels = pixels.reshape(self.size[1], self.size[0], -1).astype(np.uint8, copy=False)
        if pad:
            padded = np.zeros((pixels.shape[0] + 2 * pad, pixels.shape[1] + 2 * pad, pixels.shape[2]), np.uint8)
            padded[pad:-pad, pad:-pad] = pixels
            pixels = padded
        if pixels.shape == (image_size, image_size, channels):
            ready = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        elif pixels.shape == (image_size, image_size, 1):
            ready = np.repeat(pixels.transpose(2, 0, 1), channels, axis=0)
        else:
            image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
            ready = fit(image, image_size=image_size, channels=channels)
        return Decoded(ready, f"{self.size[0]}x{self.size[1]}", self._mode)


def read_idx(file: Path) -> np.ndarray:
    """Read an IDX file, compressed or not.

    The format: two zero bytes, a byte for the type, one for the number of dimensions, each dimension as a big-endian
    32-bit integer, then the values, big-endian.

    Raises:
        UserError: the file is not IDX, is damaged, or holds more or less than its header says.
    """
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the IDX file {str(file)!r} cannot be read ({error}); download or copy it again.") from error
    if not data:
        raise UserError(f"the IDX file {str(file)!r} is empty; download or copy it again.")
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{str(file)!r} is not an IDX file: it does not begin with an IDX header; check the path.")
    dtype, ndim = np.dtype(_IDX_TYPES[data[2]]), data[3]
    shape = struct.unpack(f">{ndim}I", data[4 : 4 + 4 * ndim])
    body = len(data) - 4 - 4 * ndim
    if body != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"the IDX file {str(file)!r} is damaged: its header promises {math.prod(shape) * dtype.itemsize:,} bytes "
            f"and {body:,} follow; download or copy it again."
        )
    return np.frombuffer(data, dtype, offset=4 + 4 * ndim).reshape(shape)


def is_idx_images(name: str) -> bool:
    """Whether a file is named as the images of an IDX set, such as ``train-images-idx3-ubyte.gz``."""
    return _IDX_IMAGES.search(name) is not None


def open_idx(file: Path) -> ArraySource:
    """Images of an IDX file, with the labels and the test images that lie beside it under the customary names.

    For ``train-images-idx3-ubyte.gz`` these are ``train-labels-idx1-ubyte``, ``t10k-...`` or ``test-...``, compressed
    or not. Images of 28 x 28 pixels are zero-padded to 32, not resized, like the built-in ones.
    """
    images, labels, files = _idx_part(file)
    test = None
    if "train" in file.name:
        for name in ("t10k", "test"):
            test_file = _beside(file, file.name.replace("train", name))
            if test_file is not None:
                test_images, test_labels, test_files = _idx_part(test_file)
                test = (test_images, test_labels)
                files += test_files
                break
    return ArraySource(images, labels, test=test, what=repr(file.name), files=tuple(files), pad_28=True)


def _idx_part(file: Path) -> tuple[np.ndarray, np.ndarray | None, list[Path]]:
    images = read_idx(file)
    if images.ndim not in (3, 4):
        raise UserError(
            f"{file.name!r} holds an array of shape {images.shape} where images (number, height, width) are expected; "
            "give the file of the images, the labels beside it are found by themselves."
        )
    # "images-idx3" -> "labels-idx1", keeping capitals and separators as they are.
    name = re.sub(r"images?", "labels", re.sub(r"idx[34]", "idx1", file.name))
    labels_file = _beside(file, name) if name != file.name else None
    if labels_file is None:
        return images, None, [file]
    return images, read_idx(labels_file), [file, labels_file]


def _beside(file: Path, name: str) -> Path | None:
    """The file ``name`` in the same folder, with or without ``.gz``; never ``file`` itself."""
    plain = name.removesuffix(".gz")
    candidates = (file.with_name(plain), file.with_name(plain + ".gz"))
    return next((path for path in candidates if path.is_file() and path.name != file.name), None)


def open_npy(file: Path) -> ArraySource:
    """Images of a ``.npy`` file."""
    return ArraySource(_load_numpy(file, mmap_mode="r"), None, what=repr(file.name), files=(file,))


def open_npz(file: Path) -> ArraySource:
    """Images of a ``.npz`` file.

    They are found under ``images`` and ``labels``, or the names of Keras (``x_train``, ``y_train``, and ``x_test``,
    ``y_test`` as the held-out images), or are the only array in it.
    """
    archive = _load_numpy(file)
    try:
        names = archive.files
        images_key = _first(names, _IMAGE_KEYS) or (names[0] if len(names) == 1 else None)
        if images_key is None:
            raise UserError(
                f"{file.name!r} holds the arrays {', '.join(names) or 'nothing'}; expected the images under the name "
                "'images' (and, if there are any, labels under 'labels')."
            )
        test = None
        if images_key in ("x_train", "X_train", "train_images"):
            test_key = _first(names, _TEST_IMAGE_KEYS)
            if test_key is not None:
                test = (archive[test_key], _optional(archive, _first(names, _TEST_LABEL_KEYS)))
        labels = _optional(archive, _first(names, _LABEL_KEYS))
        return ArraySource(archive[images_key], labels, test=test, what=repr(file.name), files=(file,))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise _broken_numpy(file, error) from error
    finally:
        archive.close()


def _load_numpy(file: Path, mmap_mode: str | None = None):
    """``numpy.load`` without pickles, which could run code."""
    try:
        return np.load(file, mmap_mode=mmap_mode, allow_pickle=False)  # pyright: ignore[reportArgumentType]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _broken_numpy(file, error) from error


def _broken_numpy(file: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{str(file)!r} is not a NumPy file of plain numbers that can be read ({reason}); save it again.")


def _first(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _optional(archive: Mapping[str, np.ndarray], key: str | None) -> np.ndarray | None:
    return None if key is None else archive[key]


def _layout(array: np.ndarray, *, what: str, channels_last: bool | None) -> tuple[np.ndarray, bool]:
    """The array, and whether its channels come first."""
    shape = array.shape
    looks_single = array.ndim == 2 or (array.ndim == 3 and (shape[-1] in (3, 4) or shape[0] in (1, 3)))
    if array.ndim in (3, 4) and 0 in shape:
        raise UserError(f"{what} holds no images: its shape is {shape}.")
    if array.ndim == 3 and not looks_single:
        return array, False
    if array.ndim == 4:
        if channels_last is not False and shape[3] in (1, 3, 4):
            return array, False
        if channels_last is not True and shape[1] in (1, 3, 4):
            return array, True
    hint = "; one image is not a data set" if array.ndim == 3 else ""
    if array.ndim == 2:
        hint = "; reshape flattened images first"
    raise UserError(
        f"{what} has the shape {shape}; expected images as (number, height, width), (number, height, width, channels) "
        f"or (number, channels, height, width) with 1, 3 or 4 channels{hint}."
    )


def _value_range(array: np.ndarray, *, what: str) -> tuple[float, float]:
    """Scale and offset that bring the values to 0 to 255."""
    kind = array.dtype.kind
    if kind == "b":
        return 255.0, 0.0
    if kind not in "uif":
        raise UserError(f"{what} holds values of type {array.dtype}; {_VALUES}.")
    # In blocks, because a memory-mapped array may not fit into memory.
    step = max(1, 2**24 // max(1, array[0].size))
    blocks = [array[start : start + step] for start in range(0, len(array), step)]
    # NumPy's min and max keep a NaN, which then fits no range; Python's may lose it.
    low = float(np.min([block.min() for block in blocks]))
    high = float(np.max([block.max() for block in blocks]))
    if kind == "f":
        if 0 <= low and high <= 1:
            return 255.0, 0.0
        if -1 <= low and high <= 1:
            return 127.5, 127.5
    elif low >= 0 and high <= 255:
        if high == 1:
            raise UserError(f"{what} holds only 0 and 1 as whole numbers, nearly black as pixels; save it as bool.")
        return 1.0, 0.0
    raise UserError(f"{what} holds {array.dtype} values from {low:g} to {high:g}; {_VALUES}.")


def _checked_labels(labels: np.ndarray | None, num_images: int, *, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        kind = f"{labels.dtype} of shape {labels.shape}"
        raise UserError(f"the labels of {what} are {kind}; expected one whole number for each image.")
    if len(labels) != num_images:
        raise UserError(
            f"{what}: {num_images:,} images and {len(labels):,} labels do not match; give one label for each image."
        )
    return labels.astype(np.int64)
