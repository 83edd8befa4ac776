"""Find out what lies at a data path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from spectralnorm.errors import UserError
from spectralnorm.gan.data import huggingface
from spectralnorm.gan.data.archives import first_names, is_tar
from spectralnorm.gan.data.arrays import open_npy, open_npz
from spectralnorm.gan.data.cifar import CIFAR_FOLDERS, is_cifar, open_cifar
from spectralnorm.gan.data.files import IMAGE_EXTENSIONS, FileSource, extension, is_hidden, list_folder, open_zip
from spectralnorm.gan.data.idx import is_idx_images, open_idx
from spectralnorm.gan.data.lmdb_source import LmdbSource, is_lmdb
from spectralnorm.gan.data.parquet import ParquetSource
from spectralnorm.gan.data.prepare import Source
from spectralnorm.gan.data.stl10 import STL10_FOLDER, is_stl10, open_stl10
from spectralnorm.gan.data.tars import TarSource, expand_shards

__all__ = ["identity", "open_source"]

_KINDS = "a folder of images, a ZIP or tars of images, an IDX, .npy, .npz or Parquet file"


def open_source(path: Path) -> Source:
    """The images at a path, whatever they are kept in.

    Raises:
        UserError: there is nothing, or nothing that is known.
    """
    text = str(path)
    if text.startswith(huggingface.PREFIX):
        return huggingface.open_named(text.removeprefix(huggingface.PREFIX))
    try:
        if not path.exists():
            shards = expand_shards(text)
            if shards == [path]:
                raise UserError(f"there is nothing at the data path {text!r}; give {_KINDS}.")
            return TarSource(shards, what=repr(text))
        if path.is_dir():
            return _open_folder(path)
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise UserError(f"the data path {text!r} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise UserError(f"the data file {text!r} is empty; give {_KINDS}.")
    if is_tar(path.name):
        return _known_archive(path) or TarSource([path], what=f"the tar {text!r}")
    kind = path.suffix.lower()
    if kind in _OPENERS:
        return _OPENERS[kind](path)
    if kind in IMAGE_EXTENSIONS:
        raise UserError(f"the data path {text!r} is a single image, and many are needed; give {_KINDS}.")
    # IDX: two zero bytes and the type of the values, perhaps compressed.
    if is_idx_images(path.name) or head[:3] == b"\0\0\x08" or head[:2] == b"\x1f\x8b":
        return open_idx(path)
    raise UserError(f"the data path {text!r} is a file of an unknown kind; give {_KINDS}.")


def identity(path: Path) -> list[tuple[str, int, int]] | None:
    """The `Source.files` of a compressed tar, which takes long to open; None for all else."""
    if not is_tar(path.name) or not path.is_file():
        return None
    status = path.stat()
    return [(str(path), status.st_size, status.st_mtime_ns)]


def _open_folder(folder: Path) -> Source:
    if huggingface.is_saved(folder):
        return huggingface.open_saved(folder)
    if is_lmdb(folder):
        return LmdbSource(folder)
    for place in (folder, *(folder / name for name in (*CIFAR_FOLDERS, STL10_FOLDER) if (folder / name).is_dir())):
        known = _known_archive(place)
        if known is not None:
            return known
    idx = sorted(file for file in folder.iterdir() if is_idx_images(file.name))
    if idx:
        # Beside training images the others of the set are found by their names.
        return open_idx(next((file for file in idx if "train" in file.name), idx[0]))
    files = list(list_folder(folder))
    kinds = Counter(extension(file.name) for file in files if not is_hidden(file.name))
    what = f"the folder {str(folder)!r}"
    if not kinds.keys() & IMAGE_EXTENSIONS:
        for kind, source in ((".parquet", ParquetSource), (".tar", TarSource)):
            chosen = sorted(f.name for f in files if extension(f.name) == kind and not is_hidden(f.name))
            if chosen:
                return source([folder / name for name in chosen], what=what)
    return FileSource(files, what=what)


def _known_archive(path: Path) -> Source | None:
    names = first_names(path)
    if is_stl10(names):
        return open_stl10(path)
    return open_cifar(path) if is_cifar(names) else None


def _open_parquet(path: Path) -> Source:
    return ParquetSource([path], what=f"the Parquet file {str(path)!r}")


_OPENERS: Mapping[str, Callable[[Path], Source]] = {
    ".zip": open_zip,
    ".npy": open_npy,
    ".npz": open_npz,
    ".parquet": _open_parquet,
}
