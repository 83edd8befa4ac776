"""Prepared images kept on disk, so that a second run does not decode again.

An entry is a folder with ``images.npy`` (uint8, training images first), ``labels.npy`` where there are labels, and
``set.json``. Its name holds a hash of where the data lies and how it is prepared, and a hash of the list of files with
their sizes and times: a changed folder makes a new entry, and the old one is removed. Entries are written under another
name and then renamed, so a killed process leaves none that is incomplete. A cache that cannot be read or written is
simply not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spectralnorm import user_cache

__all__ = [
    "MEMORY_MAP_BYTES",
    "CacheKey",
    "Stored",
    "array_in",
    "cache_folder",
    "cache_key",
    "clear_workspace",
    "commit",
    "find",
    "free_memory",
    "has_room",
    "workspace",
]

MEMORY_MAP_BYTES = 2**29
"""Larger arrays stay on disk and are mapped into memory."""

# Part of every key: raise it when the same files would be prepared differently.
_FORMAT = 1
_UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class CacheKey:
    """Names an entry."""

    place: str
    content: str

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.place}-{self.content}"


@dataclass(frozen=True)
class Stored:
    """A prepared data set as the cache keeps it."""

    images: np.ndarray
    """uint8 (N, channels, size, size): the training images, then the held-out ones."""
    labels: np.ndarray | None
    """int64 (N,)."""
    facts: dict[str, Any]
    """What JSON can hold: ``class_names``, ``summary``."""


def cache_folder() -> Path:
    """Where prepared data sets are kept."""
    return user_cache.cache_folder("datasets")


def cache_key(path: Path, files: Sequence[tuple[str, int, int]], *, image_size: int, channels: int) -> CacheKey:
    """The key of the data at ``path``.

    Args:
        path: where it lies.
        files: name, size in bytes and modification time in nanoseconds of each file.
        image_size: pixels.
        channels: 1 or 3.
    """
    place = json.dumps([_FORMAT, str(path.resolve()), image_size, channels])
    return CacheKey(_short_hash(place), _short_hash(json.dumps(files)))


def find(key: CacheKey) -> Stored | None:
    """The entry, memory-mapped when large; None if there is none that can be read."""
    try:
        facts = json.loads((key.folder / "set.json").read_text(encoding="utf-8"))
        file = key.folder / "images.npy"
        # Copy-on-write: torch wants writable memory, and nothing may ever reach the file.
        images = np.load(file, mmap_mode="c" if file.stat().st_size > MEMORY_MAP_BYTES else None, allow_pickle=False)
        labels = np.load(key.folder / "labels.npy", allow_pickle=False) if facts["has_labels"] else None
        if list(images.shape) != facts["shape"]:
            return None
        return Stored(images, labels, facts)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def workspace(num_bytes: int) -> Path | None:
    """An empty folder to build an entry in, or None if the cache cannot take ``num_bytes`` twice over."""
    try:
        parent = cache_folder()
        parent.mkdir(parents=True, exist_ok=True)
        # What killed processes left behind.
        for abandoned in parent.glob(f"{_UNFINISHED}*"):
            if abandoned.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(abandoned, ignore_errors=True)
        if not has_room(num_bytes):
            return None
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
    except OSError:
        return None


def has_room(num_bytes: int) -> bool:
    """Whether the disk of the cache can take ``num_bytes`` twice over."""
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    # Two copies: in the order of the files, and in the final one.
    return shutil.disk_usage(existing).free >= 2.1 * num_bytes + 2**26


def free_memory() -> int:
    """Bytes of memory that could be taken now; on systems that do not tell, none."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def clear_workspace(folder: Path | None) -> None:
    """Remove what was built, if it was not committed."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def array_in(folder: Path | None, file: str, shape: tuple[int, ...]) -> np.ndarray:
    """A fresh uint8 array: in memory, or when large a mapped ``.npy`` file in the workspace."""
    num_bytes = int(np.prod(shape))
    if folder is None or num_bytes <= MEMORY_MAP_BYTES:
        return np.empty(shape, dtype=np.uint8)
    path = folder / file
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A mapped file has holes; filling one on a full disk kills the process. Claim the space while it can fail.
        try:
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        except OSError:
            del array
            path.unlink(missing_ok=True)
            return np.empty(shape, dtype=np.uint8)
    return array


def commit(folder: Path, key: CacheKey, stored: Stored) -> bool:
    """Turn the workspace into the entry of ``key``; False if that failed, which loses nothing but time later."""
    try:
        if isinstance(stored.images, np.memmap):
            stored.images.flush()
        else:
            np.save(folder / "images.npy", stored.images)
        if stored.labels is not None:
            np.save(folder / "labels.npy", stored.labels)
        facts = {**stored.facts, "shape": list(stored.images.shape), "has_labels": stored.labels is not None}
        (folder / "set.json").write_text(json.dumps(facts), encoding="utf-8")
        for older in key.folder.parent.glob(f"{key.place}-*"):
            shutil.rmtree(older, ignore_errors=True)
        folder.rename(key.folder)
    except OSError:
        return False
    return True


def _short_hash(text: str) -> str:
    # Names of files may hold bytes that are not Unicode, which Python shows as lone surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
