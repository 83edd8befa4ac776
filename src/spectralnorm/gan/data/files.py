"""Images kept as files: a folder, searched through all its subfolders, or a ZIP.

Labels come from ``dataset.json``, ``{"labels": [[file, class], ...]}`` as the StyleGAN tools write it, where there is
one: a class is a whole number or a name, and null means no class (label -1). Without it, subfolders name the classes
when every image lies in one and there are at least two. A set whose outermost folders are called train and test (or
val) brings its own held-out images. Folders that wrap everything else are seen through.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, UnreadableError, decode_file
from spectralnorm.gan.data.summary import printable

__all__ = ["IMAGE_EXTENSIONS", "FileSource", "open_folder", "open_zip"]

IMAGE_EXTENSIONS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .tga .ico".split()
)

_TRAINING_FOLDERS = frozenset({"train", "training"})
_HELD_OUT_FOLDERS = frozenset({"test", "testing", "val", "valid", "validation"})
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_LABELS_FILE = "dataset.json"
# No camera writes a larger picture; an entry that unpacks to more is a bomb.
_LARGEST_ZIP_ENTRY = 2**29


class _File(NamedTuple):
    name: str
    """Path below the folder or inside the ZIP, with forward slashes."""
    size: int
    mtime_ns: int
    open: Callable[[], str | io.BytesIO]


class FileSource:
    """Image files with their labels, decoded one at a time.

    Args:
        files: every file found, of any kind.
        what: how messages name the place, for example ``the folder 'photos'``.
    """

    padding = None

    def __init__(self, files: Sequence[_File], *, what: str) -> None:
        visible = sorted((file for file in files if not _is_hidden(file.name)), key=lambda file: file.name)
        self._images = [file for file in visible if _extension(file.name) in IMAGE_EXTENSIONS]
        self.ignored = Counter(
            _extension(file.name) or "no extension"
            for file in visible
            if _extension(file.name) not in IMAGE_EXTENSIONS and posixpath.basename(file.name) != _LABELS_FILE
        )
        if not self._images:
            raise UserError(_nothing_found(what, self.ignored))
        self.files = [(file.name, file.size, file.mtime_ns) for file in self._images]
        self.held_out: np.ndarray | None = None
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        names = [file.name for file in self._images]
        labels_file = min(
            (file for file in visible if posixpath.basename(file.name) == _LABELS_FILE),
            key=lambda file: file.name.count("/"),
            default=None,
        )
        if labels_file is not None:
            self.files.append((labels_file.name, labels_file.size, labels_file.mtime_ns))
            classes = _read_labels(labels_file, names, what=what)
        else:
            folders, self.held_out = _own_split([_unwrapped(name) for name in _without_common_folder(names)])
            classes = _classes_of_folders(folders)
        if classes is not None:
            present = {value for value in classes if value is not None}
            # Numbers in their own order, names in theirs.
            ordered = sorted(present, key=lambda value: (isinstance(value, str), value))
            index = {value: position for position, value in enumerate(ordered)}
            self.class_names = tuple(printable(str(value)) for value in ordered)
            self.labels = np.array([-1 if value is None else index[value] for value in classes], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def file_name(self, index: int) -> str:
        return self._images[index].name

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        del image_size, channels
        return True

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """Decode the image ``index``; raises `UnreadableError`."""
        file = self._images[index]
        if file.size == 0:
            raise UnreadableError("the file is empty")
        return decode_file(file.open(), image_size=image_size, channels=channels)


def open_folder(folder: Path) -> FileSource:
    """Every file below a folder; links are followed, each folder once."""
    return FileSource(list(_walk(folder)), what=f"the folder {str(folder)!r}")


def open_zip(file: Path) -> FileSource:
    """Every file in a ZIP; nothing is unpacked to disk."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} is not a ZIP that can be read ({error}); copy or make it again.") from error
    mtime_ns = file.stat().st_mtime_ns
    files = [
        _File(info.filename.replace("\\", "/"), info.file_size, mtime_ns, _zip_opener(archive, info))
        for info in archive.infolist()
        if not info.is_dir()
    ]
    return FileSource(files, what=f"the ZIP {str(file)!r}")


def _zip_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], io.BytesIO]:
    def read() -> io.BytesIO:
        if info.file_size > _LARGEST_ZIP_ENTRY:
            raise UnreadableError("unpacks to more than 512 MB")
        try:
            return io.BytesIO(archive.read(info))
        except NotImplementedError as error:
            raise UnreadableError("packed with a method that Python cannot unpack") from error
        # A damaged or encrypted entry: BadZipFile, zlib.error, RuntimeError, EOFError...
        except Exception as error:
            raise UnreadableError((str(error).splitlines() or [type(error).__name__])[0]) from error

    return read


def _walk(folder: Path) -> Iterator[_File]:
    seen: set[tuple[int, int]] = set()
    waiting = [(os.fspath(folder), "")]
    while waiting:
        path, prefix = waiting.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if entry.is_dir():
                        waiting.append((entry.path, name + "/"))
                        continue
                    # A dangling link is not followed: it counts as an empty file, and is listed as unreadable.
                    status = entry.stat(follow_symlinks=entry.is_file())
                    size = status.st_size if entry.is_file() else 0
                    yield _File(name, size, status.st_mtime_ns, lambda path=entry.path: path)
        except OSError as error:
            raise UserError(f"the folder {path!r} cannot be read: {error.strerror or error}.") from error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _LITTER for part in name.split("/"))


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _nothing_found(what: str, ignored: Counter[str]) -> str:
    if not ignored:
        return f"{what} is empty; give one that holds images (PNG, JPEG, WebP, ...)."
    kinds = ", ".join(f"{count:,} {extension}" for extension, count in ignored.most_common(3))
    hint = "give one that holds PNG, JPEG, WebP or other common image files"
    if ignored.keys() & {".zip", ".npy", ".npz"}:
        hint = "give the path of the file with the images itself"
    elif ignored.keys() & {".heic", ".heif"}:
        hint = "convert HEIC pictures to JPEG or PNG first"
    return f"{what} holds no images, only other files ({kinds}); {hint}."


def _without_common_folder(names: list[str]) -> list[str]:
    """Names with the folders that hold all of them removed."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return [name[len(common) + 1 :] if common else name for name in names]


def _unwrapped(name: str) -> list[str]:
    return name.split("/")[:-1]


def _own_split(folders: list[list[str]]) -> tuple[list[list[str]], np.ndarray | None]:
    """The folders of each image below train and test, and which images are held out; None where the set has none."""
    tops = {folder[0].lower() if folder else "" for folder in folders}
    if not (tops <= _TRAINING_FOLDERS | _HELD_OUT_FOLDERS and tops & _TRAINING_FOLDERS and tops & _HELD_OUT_FOLDERS):
        return folders, None
    held_out = np.array([folder[0].lower() in _HELD_OUT_FOLDERS for folder in folders])
    return [folder[1:] for folder in folders], held_out


def _classes_of_folders(folders: list[list[str]]) -> list[str | int | None] | None:
    if not all(folders) or len({folder[0] for folder in folders}) < 2:
        return None
    return [folder[0] for folder in folders]


def _read_labels(file: _File, names: list[str], *, what: str) -> list[str | int | None] | None:
    """The class of each image by ``dataset.json``, or None where it gives no labels."""
    try:
        source = file.open()
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        labels = json.loads(data)["labels"]
        given = None if labels is None else {str(name).replace("\\", "/"): value for name, value in labels}
    except (ValueError, TypeError, KeyError, OSError, UnreadableError) as error:
        raise UserError(
            f"{file.name!r} in {what} cannot be read as labels; "
            'expected {"labels": [[file, class], ...]} or {"labels": null}.'
        ) from error
    if given is None:
        return None
    wrong = next((item for item in given.items() if not _is_class(item[1])), None)
    if wrong is not None:
        raise UserError(
            f"{file.name!r} in {what} gives {wrong[0]!r} the class {str(wrong[1])[:50]!r}; expected a whole number, "
            "a name or null."
        )
    # Names are relative to where dataset.json lies.
    base = posixpath.dirname(file.name)
    relative = [posixpath.relpath(name, base) if base else name for name in names]
    missing = [name for name in relative if name not in given]
    unknown = given.keys() - set(relative)
    if missing or unknown:
        counts = [
            f"{len(group):,} {description} (such as {min(group)!r})"
            for group, description in ((missing, "images without a label"), (unknown, "labels without an image"))
            if group
        ]
        raise UserError(f"{file.name!r} and the images in {what} do not match: {' and '.join(counts)}; complete it.")
    classes = [given[name] for name in relative]
    return None if all(value is None for value in classes) else classes


def _is_class(value: object) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
