"""Images kept as arrays: ``.npy``, ``.npz``, tensors, and what other files hold as one array.

Values: uint8, or any integers within 0 to 255; bool; floats in [0, 1], or in [-1, 1] when any is negative. Everything
else is refused rather than guessed at. Layouts: (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels, the
last taken as transparency; where both readings are possible the channels are last.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, fit

__all__ = ["ArraySource", "open_npy", "open_npz"]

_IMAGE_KEYS = ("images", "x_train", "train_images", "X_train", "x", "X", "data", "arr_0")
_LABEL_KEYS = ("labels", "y_train", "train_labels", "Y_train", "y", "Y", "label", "arr_1")
_TEST_IMAGE_KEYS = ("x_test", "test_images", "X_test")
_TEST_LABEL_KEYS = ("y_test", "test_labels", "Y_test")

_VALUES = "expected uint8, integers within 0 to 255, bool, or floats in [0, 1] or [-1, 1]"


class ArraySource:
    """Images of one array, and where given those of others: some without a class, some that the set holds out itself.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W); see the module for values and layouts.
        labels: (N,) integers, or (N, 1).
        unlabelled: more images to train on, without a class.
        test: images and labels that come held out.
        class_names: of the labels 0, 1, ...; None: each value found among the labels is a class, named as it is.
        what: how messages name the data, for example ``'digits.npy'``.
        files: what the arrays were read from, which is their identity in the cache; () is never cached.
        pad_28: zero-pad 28 x 28 images to 32 before anything else, as is customary for the MNIST family.
        channels_last: fixes the layout of 4-D arrays; None finds it from the shape.
        costs_unpacking: the arrays come out of something compressed, which should not be done twice.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        unlabelled: np.ndarray | None = None,
        test: tuple[np.ndarray, np.ndarray | None] | None = None,
        class_names: Sequence[str] | None = None,
        what: str,
        files: tuple[Path, ...] = (),
        pad_28: bool = False,
        channels_last: bool | None = None,
        costs_unpacking: bool = False,
    ) -> None:
        self._parts = [_ImageArray(images, what=what, channels_last=channels_last)]
        part_labels = [_checked_labels(labels, len(images), what=what)]
        if unlabelled is not None:
            self._parts.append(
                _ImageArray(unlabelled, what=f"the unlabelled images of {what}", channels_last=channels_last)
            )
            part_labels.append(np.full(len(unlabelled), -1, np.int64))
        self.held_out: np.ndarray | None = None
        if test is not None:
            num_training = len(self)
            self._parts.append(_ImageArray(test[0], what=f"the test images of {what}", channels_last=channels_last))
            part_labels.append(_checked_labels(test[1], len(test[0]), what=f"the test images of {what}"))
            self.held_out = np.arange(len(self)) >= num_training
        self.files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.ignored: Counter[str] = Counter()
        self._pad = 2 if pad_28 and all(part.size == (28, 28) for part in self._parts) else 0
        self.padding = "zero-padded 28 -> 32" if self._pad else None
        self._costs_unpacking = costs_unpacking
        known = [part for part in part_labels if part is not None]
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if len(known) == len(part_labels):
            self.labels, self.class_names = _classes(np.concatenate(known), class_names, what=what)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def file_name(self, index: int) -> str:
        return f"image {index}"

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        """Whether preparing the images costs so much that it should not be done twice."""
        return self._costs_unpacking or any(part.cost(image_size - 2 * self._pad, channels) for part in self._parts)

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
    if "pickle" in reason:  # its advice is to load the file unsafely, and it says so of any file that is not NumPy's
        reason = "it holds Python objects, or was not written by NumPy"
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


def _classes(labels: np.ndarray, class_names: Sequence[str] | None, *, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as positions in the names of the classes, and these."""
    if class_names is None:
        values, positions = np.unique(labels, return_inverse=True)
        return positions.astype(np.int64), tuple(map(str, values.tolist()))
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= len(class_names):
        raise UserError(
            f"the labels of {what} reach from {low} to {high}, but it names {len(class_names)} classes; "
            "download or copy it again."
        )
    return labels, tuple(class_names)
