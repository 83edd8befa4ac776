"""Decoded images of a streamed set, kept on disk, so that an image is decoded once and not in every epoch.

An entry is one file of equal records, one for each training image, at its place: the pixels, and after them their hash.
A record counts only where its hash is that of its pixels. What a killed process, a full disk or another computer on the
same network drive left there half-written is therefore not kept, and is decoded and written anew. So processes need no
locks: all may read and write the same entry, and whoever decodes an image first writes it, the same bytes as any other.

The name of an entry is a hash of where the data lies and how it is prepared, one of its files with their sizes and
times, and one of the split and the held-out pixels, which are decoded whenever the set is opened: a changed set, or
another version of a decoder, begins an entry of its own.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectralnorm import user_cache
from spectralnorm.gan.data.cache import CacheKey
from spectralnorm.gan.data.image_set import DIGEST_BYTES, digest

__all__ = ["STREAM_CACHE_BYTES", "Kept", "StreamCache", "open_stream_cache"]

STREAM_CACHE_BYTES = 32 * 10**9
"""What the entries of all streamed sets may take together, unless the user says otherwise."""

# Part of every name: raise it when records are written in another way.
_FORMAT = 1
_ENDING = ".images"
_SPARED_BYTES = 2**30
"""Of the disk; checkpoints may need them."""
_BYTES_BETWEEN_LOOKS = 2**24
_NOTHING = bytes(DIGEST_BYTES)


class Kept(NamedTuple):
    """An image and the hash of its pixels."""

    pixels: np.ndarray
    """uint8 (channels, height, width)."""
    digest: bytes
    """Of the pixels, as `spectralnorm.gan.data.image_set.digest` computes it."""


class StreamCache:
    """One entry, open for reading and writing by any number of threads.

    Args:
        path: of the file; it is made where there is none.
        num_images: of the set.
        shape: (channels, height, width) of an image.
        num_bytes: the entry grows up to this size; the first images that fit are kept, the others are not.

    Raises:
        OSError: the file cannot be made, or not be written to.
    """

    def __init__(self, path: Path, *, num_images: int, shape: tuple[int, int, int], num_bytes: int) -> None:
        self.path = path
        self.problem: str | None = None
        """Why nothing more is kept, once that is so."""
        self._shape = shape
        self._record_bytes = _record_bytes(shape)
        self.num_images = num_images
        self.num_kept_at_most = max(0, min(num_images, num_bytes // self._record_bytes))
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        weakref.finalize(self, self._file.close)
        # Records whose hash this process has compared, or written: that is done once.
        self._sound = bytearray(num_images)
        self._until_look = 0

    @property
    def max_bytes(self) -> int:
        """What the entry takes when it is complete."""
        return self.num_kept_at_most * self._record_bytes

    def read(self, indices: Sequence[int]) -> list[Kept | None]:
        """The images that are kept; None for the others. Neighbours are read at once.

        Args:
            indices: among the training images.
        """
        found: list[Kept | None] = []
        start = 0
        while start < len(indices):
            end = start + 1
            while end < len(indices) and indices[end] == indices[end - 1] + 1:
                end += 1
            found += self._read_run(indices[start], end - start)
            start = end
        return found

    def read_at_once(self, indices: Sequence[int]) -> tuple[np.ndarray, list[bytes]] | None:
        """Neighbours that are all kept, were compared before, and can be had without waiting for the disk; else None.

        Returns:
            Their pixels, uint8 (num, channels, height, width), and their hashes.
        """
        first, num, size = indices[0], len(indices), self._record_bytes
        if self._sound.count(1, first, first + num) < num or list(indices) != list(range(first, first + num)):
            return None
        records = np.empty((num, size), np.uint8)
        try:
            # Only Linux knows this flag: what the system does not hold in memory is not waited for.
            if os.preadv(self._file.fileno(), [records.data], first * size, os.RWF_NOWAIT) < records.nbytes:
                return None
        except (OSError, ValueError, AttributeError):
            return None
        digests = [record.tobytes() for record in records[:, -DIGEST_BYTES:]]
        return None if _NOTHING in digests else (records[:, :-DIGEST_BYTES].reshape(num, *self._shape), digests)

    def write(self, index: int, image: Kept) -> None:
        """Keep an image; if that fails, `problem` says why, and nothing more is written."""
        if self.problem is not None or index >= self.num_kept_at_most:
            return
        record = image.pixels.tobytes() + image.digest
        try:
            self._spare_the_disk()
            # A disk that becomes full takes a part, and nothing the next time.
            if os.pwrite(self._file.fileno(), record, index * self._record_bytes) < len(record):
                raise OSError("No space left on device")
        except (OSError, ValueError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)
            return
        self._sound[index] = 1

    def _read_run(self, first: int, num: int) -> list[Kept | None]:
        size = self._record_bytes
        try:
            data = os.pread(self._file.fileno(), num * size, first * size)
        except (OSError, ValueError):
            data = b""
        num_read = len(data) // size
        records = np.frombuffer(data, np.uint8, num_read * size).reshape(num_read, size)
        found: list[Kept | None] = [None] * num
        for place, record in enumerate(records):
            written = record[-DIGEST_BYTES:].tobytes()
            # Where nothing was written the file has a hole, which reads as zeros.
            if written == _NOTHING:
                continue
            pixels = record[:-DIGEST_BYTES].reshape(self._shape)
            if not self._sound[first + place]:
                if digest(pixels) != written:
                    continue
                self._sound[first + place] = 1
            found[place] = Kept(pixels, written)
        return found

    def _spare_the_disk(self) -> None:
        """Raise an OSError while there is still room for what matters more."""
        self._until_look -= self._record_bytes
        if self._until_look > 0:
            return
        self._until_look = _BYTES_BETWEEN_LOOKS
        if shutil.disk_usage(self.path.parent).free < _SPARED_BYTES:
            raise OSError(f"less than {_SPARED_BYTES // 2**30} GB of its disk are free")


def open_stream_cache(
    key: CacheKey, fingerprint: str, *, num_images: int, shape: tuple[int, int, int], limit: int
) -> StreamCache:
    """The entry of a set, as large as the limit and half of what is free on the disk allow.

    Entries of other sets are removed, the one opened longest ago first, until all together keep within the limit; so
    are those of the same data before it changed, and the end of an entry made under a larger limit.

    Args:
        key: of the data and its preparation.
        fingerprint: of the split and the held-out pixels.
        num_images: to train on.
        shape: (channels, height, width) of an image.
        limit: in bytes, of all entries together.

    Raises:
        OSError: the user has no home, or the folder cannot be written to.
    """
    folder = user_cache.cache_folder("streams")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key.place}-{key.content}-{fingerprint[:24]}-{_FORMAT}{_ENDING}"
    _make_room(folder, path, key.place, limit - num_images * _record_bytes(shape))
    if path.exists() and path.stat().st_size > limit:
        os.truncate(path, limit)
    num_bytes = min(limit, _taken(path) + shutil.disk_usage(folder).free // 2)
    kept = StreamCache(path, num_images=num_images, shape=shape, num_bytes=num_bytes)
    os.utime(path)
    return kept


def _record_bytes(shape: tuple[int, int, int]) -> int:
    return int(np.prod(shape)) + DIGEST_BYTES


def _make_room(folder: Path, own: Path, place: str, others_may_take: int) -> None:
    """Remove entries of other sets until they take no more than they may, and other entries of the same place."""
    ages: list[tuple[int, Path]] = []
    for entry in folder.glob(f"*{_ENDING}"):
        try:
            if entry == own:
                continue
            if entry.name.startswith(place):
                entry.unlink()
                continue
            ages.append((entry.stat().st_mtime_ns, entry))
        # Another process was faster.
        except FileNotFoundError:
            continue
    for _, entry in sorted(ages, reverse=True):
        others_may_take -= _taken(entry)
        if others_may_take < 0:
            entry.unlink(missing_ok=True)


def _taken(path: Path) -> int:
    """Bytes of the disk, those of holes not counted."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
