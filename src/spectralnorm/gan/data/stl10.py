"""STL-10 (Coates, Ng and Lee 2011) in its binary form.

Images are 3 x 96 x 96 bytes, each channel column by column. The 100,000 unlabelled and the 5,000 training images are
trained on; the 8,000 test images are held out. Labels are bytes from 1; here classes count from 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.archives import read_members
from spectralnorm.gan.data.arrays import ArraySource

__all__ = ["STL10_FOLDER", "is_stl10", "open_stl10"]

STL10_FOLDER = "stl10_binary"
"""What the archive unpacks to."""

_SIDE = 96
_NEEDED = ("train_X.bin", "train_y.bin", "test_X.bin")
_OTHERS = ("unlabeled_X.bin", "test_y.bin", "class_names.txt")


def is_stl10(names: set[str]) -> bool:
    """Whether these files belong to STL-10."""
    return bool(names & {"train_X.bin", "test_X.bin", "unlabeled_X.bin"})


def open_stl10(path: Path) -> ArraySource:
    """The images of ``stl10_binary.tar.gz`` or of the folder it unpacks to.

    Raises:
        UserError: a file is missing or damaged.
    """
    found = read_members(path, (*_NEEDED, *_OTHERS))
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise UserError(f"{str(path)!r} lacks {', '.join(missing)} of STL-10; download or unpack it again.")
    names = found.get("class_names.txt")
    test_labels = found.get("test_y.bin")
    test_images = _images(found["test_X.bin"], what="test_X.bin")
    return ArraySource(
        _images(found["train_X.bin"], what="train_X.bin"),
        _labels(found["train_y.bin"]),
        unlabelled=_images(found["unlabeled_X.bin"], what="unlabeled_X.bin") if "unlabeled_X.bin" in found else None,
        # Without their labels, which is rare, they still serve the metrics.
        test=(test_images, np.full(len(test_images), -1) if test_labels is None else _labels(test_labels)),
        class_names=list(map(str, range(1, 11)))
        if names is None
        else names.tobytes().decode("utf-8", "replace").split(),
        what=repr(path.name),
        files=(path,) if path.is_file() else tuple(path / name for name in sorted(found)),
        channels_last=False,
        costs_unpacking=path.is_file(),
    )


def _images(data: np.ndarray, *, what: str) -> np.ndarray:
    """uint8 (N, 3, 96, 96)."""
    size = 3 * _SIDE * _SIDE
    if not len(data) or len(data) % size:
        raise UserError(
            f"{what!r} is damaged: {len(data):,} bytes are no multiple of the {size:,} of an image; "
            "download or unpack it again."
        )
    # Column by column: the last axis in the file is the height.
    return data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 1, 3, 2)


def _labels(data: np.ndarray) -> np.ndarray:
    return data.astype(np.int64) - 1
