"""Files of known names, in a folder or in a tar that may be compressed, as arrays of bytes."""

from __future__ import annotations

import lzma
import posixpath
import tarfile
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data import cache

__all__ = ["TAR_ERRORS", "TAR_SUFFIXES", "first_names", "is_tar", "read_members", "tar_unreadable"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
"""What reading a damaged tar may raise."""

# Of the members of a tar, how many are looked at to tell what it is.
_NUM_FIRST = 8
_PIECE = 2**22


def is_tar(name: str) -> bool:
    """Whether a file is named as a tar, compressed or not."""
    return name.lower().endswith(TAR_SUFFIXES)


def tar_unreadable(path: Path, error: BaseException) -> UserError:
    """What is said of a tar that ends too early or is none."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"the tar {str(path)!r} cannot be read ({reason}); download or copy it again.")


def first_names(path: Path) -> set[str]:
    """Names, without folders, of the files in a folder, or of the first few in a tar."""
    if path.is_dir():
        return {file.name for file in path.iterdir() if file.is_file()}
    names: set[str] = set()
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    names.add(posixpath.basename(member.name))
                if len(names) == _NUM_FIRST:
                    break
    except TAR_ERRORS as error:
        # One that is cut later on is told when it is read.
        if not names:
            raise tar_unreadable(path, error) from error
    return names


def read_members(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The wanted files that are there, each as uint8 (bytes,); large ones stay on disk and are mapped.

    Args:
        path: a folder, or a tar, which is gone through once. What it unpacks to over 512 MB lies in a file of the
            cache folder that has no name and vanishes with the array.
        wanted: names without folders.

    Raises:
        UserError: the tar is damaged, or the disk is full.
    """
    if path.is_dir():
        return {name: _mapped(path / name) for name in wanted if (path / name).is_file()}
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = posixpath.basename(member.name)
                stream = archive.extractfile(member) if name in wanted and member.isfile() else None
                if stream is not None:
                    found[name] = _unpacked(stream, member.size)
    except TAR_ERRORS as error:
        raise tar_unreadable(path, error) from error
    return found


def _mapped(file: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(file, np.uint8, mode="r") if file.stat().st_size else np.empty(0, np.uint8)


def _unpacked(stream: IO[bytes], size: int) -> np.ndarray:
    if size <= cache.MEMORY_MAP_BYTES:
        array = np.frombuffer(stream.read(), np.uint8)
    else:
        folder = cache.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # Not in /tmp, which is often memory.
        with tempfile.TemporaryFile(dir=folder) as file:
            while piece := stream.read(_PIECE):
                file.write(piece)
            file.flush()
            array = np.memmap(file, np.uint8, mode="r")
    if len(array) != size:
        raise EOFError("it ends too early")
    return array
