"""Images in an LMDB, as LSUN is distributed: each value is an encoded image."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, UnreadableError, decode_file
from spectralnorm.gan.data.extras import import_extra

__all__ = ["LmdbSource", "is_lmdb"]


def is_lmdb(folder: Path) -> bool:
    """Whether a folder is an LMDB."""
    return (folder / "data.mdb").is_file()


class LmdbSource:
    """The values of an LMDB, in the order of their keys; they have no classes.

    Args:
        folder: with ``data.mdb`` in it, such as ``bedroom_train_lmdb``.

    Raises:
        UserError: the package lmdb is missing, or the file is damaged or empty.
    """

    padding = None
    labels = None
    class_names = ()
    held_out = None

    def __init__(self, folder: Path) -> None:
        what = f"the LMDB {str(folder)!r}"
        try:
            self._library = import_extra("lmdb", extra="lmdb", what=what)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('.')}, or export it to images or WebDataset tars.") from error
        self.ignored: Counter[str] = Counter()
        status = (folder / "data.mdb").stat()
        self.files = [("data.mdb", status.st_size, status.st_mtime_ns)]
        try:
            self._environment: Any = self._library.open(
                str(folder), readonly=True, lock=False, readahead=False, create=False, max_readers=256
            )
            with self._environment.begin() as transaction:
                self._keys = list(transaction.cursor().iternext(values=False))
        except self._library.Error as error:
            raise UserError(f"{what} cannot be read ({error}); download or copy it again.") from error
        if not self._keys:
            raise UserError(f"{what} is empty; download or copy it again.")

    @property
    def hashes(self) -> np.ndarray:
        """Of the keys: an order that looks random."""
        digests = (hashlib.blake2b(key, digest_size=8).digest() for key in self._keys)
        return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    def file_name(self, index: int) -> str:
        return self._keys[index].decode("utf-8", "backslashreplace")

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        del image_size, channels
        return True

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """Decode the image ``index``; raises `UnreadableError`."""
        try:
            with self._environment.begin() as transaction:
                data = transaction.get(self._keys[index])
        except self._library.Error as error:
            raise UnreadableError(str(error)) from error
        if not data:
            raise UnreadableError("the value is empty")
        return decode_file(io.BytesIO(data), image_size=image_size, channels=channels)
