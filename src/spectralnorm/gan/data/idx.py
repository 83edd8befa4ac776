"""Images in IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.arrays import ArraySource

__all__ = ["is_idx_images", "open_idx", "read_idx"]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_IMAGES = re.compile(r"images?[-._]idx[34]-ubyte(\.gz)?$", re.IGNORECASE)


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
