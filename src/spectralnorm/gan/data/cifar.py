"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are distributed: the binary and the Python version.

A record of the binary version is its labels, a byte each, and the 3072 bytes of a 3 x 32 x 32 image; CIFAR-100 has two
labels, of which the second, the fine one, is taken. The test images are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.archives import read_members
from spectralnorm.gan.data.arrays import ArraySource
from spectralnorm.gan.data.pickles import read_pickle

__all__ = ["CIFAR_FOLDERS", "is_cifar", "open_cifar"]

CIFAR_FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python")
"""What the archives unpack to."""

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """The files of one way in which a set is distributed."""

    training: tuple[str, ...]
    test: str
    names: str
    """The file of the classes' names."""
    num_labels: int | None
    """Label bytes before each image; None: pickles."""
    names_key: str = ""
    labels_key: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.training, self.test, self.names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = (
    _Version(tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt", 1),
    _Version(("train.bin",), "test.bin", "fine_label_names.txt", 2),
    _Version(_BATCHES, "test_batch", "batches.meta", None, "label_names", "labels"),
    _Version(("train",), "test", "meta", None, "fine_label_names", "fine_labels"),
)


def is_cifar(names: set[str]) -> bool:
    """Whether these files belong to CIFAR: two of one version are enough."""
    return any(len(names & set(version.files)) >= 2 for version in _VERSIONS)


def open_cifar(path: Path) -> ArraySource:
    """The images of ``cifar-10-binary.tar.gz``, ``cifar-10-python.tar.gz``, those of CIFAR-100, or what they unpack to.

    Raises:
        UserError: a file is missing or damaged.
    """
    found = read_members(path, {name for version in _VERSIONS for name in version.files})
    version = max(_VERSIONS, key=lambda version: len(found.keys() & set(version.files)))
    missing = [name for name in version.files if name not in found]
    if missing:
        raise UserError(f"{str(path)!r} lacks {', '.join(missing)} of CIFAR; download or unpack it again.")
    read = _read_binary if version.num_labels is not None else _read_pickled
    parts = {name: read(found[name], version, what=name) for name in (*version.training, version.test)}
    images, labels = (
        np.concatenate(arrays) for arrays in zip(*(parts[name] for name in version.training), strict=True)
    )
    files = (path,) if path.is_file() else tuple(path / name for name in version.files)
    return ArraySource(
        images,
        labels,
        test=parts[version.test],
        class_names=_class_names(found[version.names], version),
        what=repr(path.name),
        files=files,
        channels_last=False,
        costs_unpacking=path.is_file(),
    )


def _read_binary(data: np.ndarray, version: _Version, *, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,) of one file."""
    assert version.num_labels is not None
    record = version.num_labels + _PIXELS
    if not len(data) or len(data) % record:
        raise UserError(
            f"{what!r} is damaged: {len(data):,} bytes are no multiple of the {record:,} of a record; "
            "download or unpack it again."
        )
    records = np.asarray(data).reshape(-1, record)
    return records[:, version.num_labels :].reshape(-1, *_SHAPE), records[:, version.num_labels - 1].astype(np.int64)


def _read_pickled(data: np.ndarray, version: _Version, *, what: str) -> tuple[np.ndarray, np.ndarray]:
    content = _named(read_pickle(data.tobytes(), what=repr(what)))
    pixels, labels = content.get("data"), content.get(version.labels_key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (_PIXELS,) or not _is_numbers(labels, len(pixels)):
        raise UserError(f"{what!r} does not hold CIFAR's images and labels; download or unpack it again.")
    return pixels.reshape(-1, *_SHAPE), np.array(labels, np.int64)


def _class_names(data: np.ndarray, version: _Version) -> tuple[str, ...]:
    if version.num_labels is not None:
        return tuple(data.tobytes().decode("utf-8", "replace").split())
    names = _named(read_pickle(data.tobytes(), what=repr(version.names))).get(version.names_key)
    if not isinstance(names, list):
        raise UserError(f"{version.names!r} does not hold the names of CIFAR's classes; download or unpack it again.")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def _named(content: Any) -> Mapping[str, Any]:
    """A dictionary of Python 2 with its keys as text."""
    if not isinstance(content, dict):
        return {}
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _is_numbers(labels: Any, num: int) -> bool:
    return isinstance(labels, Sequence) and len(labels) == num and all(type(label) is int for label in labels)
