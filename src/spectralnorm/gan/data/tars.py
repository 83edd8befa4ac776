"""Images in tars: plain ones, and the shards of a WebDataset.

In a WebDataset the files of a sample stand together and share their name up to its first dot: ``0017.jpg`` with its
class in ``0017.cls`` (a number or a name) or in ``0017.json`` under ``label`` or ``class``. Elsewhere folders name the
classes, as they do for a folder of images. Shards called train and test (or val) are the set's own split.

A tar is only listed when it is opened, once; an image is read from where it lies when it is wanted. Compressed tars are
unpacked first, into files of the cache folder that have no name and vanish with the source.
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import tarfile
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data import cache
from spectralnorm.gan.data.archives import TAR_ERRORS, is_tar, tar_unreadable
from spectralnorm.gan.data.decode import Decoded, UnreadableError, decode_file
from spectralnorm.gan.data.files import (
    classes_of_folders,
    extension,
    number_classes,
    own_split,
    part_of,
)
from spectralnorm.gan.data.prepare import block_starts
from spectralnorm.gan.data.tar_listing import Listing, list_cached, list_tar

__all__ = ["TarSource", "expand_shards"]

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
# No camera writes a larger picture.
_LARGEST_IMAGE = 2**29
_MOST_COMPRESSED = 64
_BLOCK = 512
_PIECE = 2**22


def expand_shards(pattern: str) -> list[Path]:
    """The files that ``shards-{000000..000146}.tar`` stands for, ends included; no braces: the path itself.

    Raises:
        UserError: some of them are missing, or the numbers run backwards.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = match[1], match[2]
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise UserError(f"the shards {pattern!r} run from {first} to {last}; give the smaller number first.")
    # Written with zeros in front, all have the same width.
    names = [f"{number:0{len(first)}d}" for number in numbers]
    files = [file for name in names for file in expand_shards(pattern[: match.start()] + name + pattern[match.end() :])]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(files):,} shards {pattern!r} are missing, the first is "
            f"{str(missing[0])!r}; download them, or name those that are there."
        )
    return files


class TarSource:
    """Images in one tar or in many, in the order in which they lie there.

    Args:
        paths: the tars.
        what: how messages name them.

    Raises:
        UserError: a tar is damaged, or there are no images.
    """

    padding = None

    def __init__(self, paths: Sequence[Path], *, what: str) -> None:
        compressed = [path for path in paths if extension(path.name) != ".tar"]
        if len(compressed) > _MOST_COMPRESSED:
            raise UserError(
                f"{what} are {len(compressed):,} compressed tars; unpack them with gunzip, "
                "since images are compressed already."
            )
        self.shards = list(paths)
        self._unpacked: dict[int, IO[bytes]] = {}
        listings = [self._list(number) for number in range(len(self.shards))]
        counts = [len(listing.offsets) for listing in listings]
        self.ignored: Counter[str] = sum((listing.ignored for listing in listings), Counter())
        if not sum(counts):
            raise UserError(_nothing_found(what, self.ignored))
        self._starts = np.cumsum([0, *counts])
        self.groups = block_starts(self._starts)
        """Where blocks of images that lie side by side in one tar begin, and the end."""
        self.hashes = np.array([value for listing in listings for value in listing.hashes], np.uint64)
        """Of the names of tar and image: an order that looks random."""
        self._offsets = np.array([value for listing in listings for value in listing.offsets], np.int64)
        self._sizes = np.array([value for listing in listings for value in listing.sizes], np.int64)
        self.files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.shards]
        folders = [folder.split("/") if folder else [] for listing in listings for folder in listing.folders]
        folders, self.held_out = own_split(_without_common(folders))
        parts = [part_of(_stem(path)) for path in self.shards]
        if None not in parts and {part[1] for part in parts if part} == {False, True}:
            self.held_out = np.repeat([part is not None and part[1] for part in parts], counts)
        if any(listing.has_classes for listing in listings):
            classes = [value for listing in listings for value in listing.classes]
        else:
            classes = classes_of_folders(folders, self.held_out)
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if classes is not None and any(value is not None for value in classes):
            self.labels, self.class_names = number_classes(classes)

    def __len__(self) -> int:
        return len(self._offsets)

    def file_name(self, index: int) -> str:
        shard, offset = self._shard_of(index), int(self._offsets[index])
        try:
            # An image's header is the block before it.
            header = tarfile.TarInfo.frombuf(self._read_at(shard, offset - _BLOCK, _BLOCK), "utf-8", "surrogateescape")
            name = header.name
        except (OSError, tarfile.TarError):
            name = f"byte {offset}"
        return f"{self.shards[shard].name}/{name}"

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        del image_size, channels
        return True

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """Decode the image ``index``; raises `UnreadableError`."""
        size = int(self._sizes[index])
        if size == 0:
            raise UnreadableError("the file is empty")
        if size > _LARGEST_IMAGE:
            raise UnreadableError("larger than 512 MB")
        try:
            data = self._read_at(self._shard_of(index), int(self._offsets[index]), size)
        except OSError as error:
            raise UnreadableError(f"its tar cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            raise UnreadableError("its tar has become shorter")
        return decode_file(io.BytesIO(data), image_size=image_size, channels=channels)

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        unpacked = self._unpacked.get(shard)
        if unpacked is not None:
            return os.pread(unpacked.fileno(), size, offset)
        with self.shards[shard].open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def _list(self, number: int) -> Listing:
        path = self.shards[number]
        try:
            if extension(path.name) == ".tar":
                return list_cached(path)
            self._unpacked[number] = _unpack(path)
            weakref.finalize(self, self._unpacked[number].close)
            return list_tar(self._unpacked[number], path.name)
        except TAR_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise tar_unreadable(path, error) from error


def _unpack(path: Path) -> IO[bytes]:
    """The tar in a compressed file, as a file without a name."""
    if not is_tar(path.name):
        raise UserError(f"{str(path)!r} is not named as a tar.")
    if not path.name.lower().endswith(("gz",)):
        raise UserError(f"{str(path)!r} is compressed in a way that is not read here; unpack it to a .tar first.")
    folder = cache.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it stays open as long as the source
    try:
        with gzip.open(path) as stream:
            while piece := stream.read(_PIECE):
                file.write(piece)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().rindex(".t")] if is_tar(path.name) else path.stem


def _without_common(folders: list[list[str]]) -> list[list[str]]:
    """Folders without those that hold all images."""
    # What the first and the last in order share, all share.
    pairs = zip(min(folders), max(folders), strict=False)
    num_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [folder[num_common:] for folder in folders]


def _nothing_found(what: str, ignored: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common(3)) or "nothing"
    hint = "give tars that hold PNG, JPEG, WebP or other common image files"
    if ignored[".tar"]:
        hint = "unpack it, and then each tar in it to a folder of its own, which names its class"
    return f"{what} holds no images ({kinds}); {hint}."
