"""Images kept as files: a folder, searched through all its subfolders, or a ZIP.

Labels come from ``dataset.json``, ``{"labels": [[file, class], ...]}`` as the StyleGAN tools write it, where there is
one: a class is a whole number or a name, and null means no class (label -1). Without it, subfolders name the classes
when every image to train on lies in one and there are at least two. A set whose outermost folders are called train and
test (or val), as those of ImageNet, or end so, as LSUN's ``bedroom_train`` and ``bedroom_val``, brings its own held-out
images; such as lie in no class's folder have none. Folders that wrap everything else are seen through.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.decode import Decoded, UnreadableError, decode_file
from spectralnorm.gan.data.summary import printable

__all__ = [
    "IMAGE_EXTENSIONS",
    "FileSource",
    "FoundFile",
    "classes_of_folders",
    "extension",
    "is_hidden",
    "list_folder",
    "number_classes",
    "open_zip",
    "own_split",
    "part_of",
]

IMAGE_EXTENSIONS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .tga .ico".split()
)

# "train", "bedroom_val", "imagenet-validation-000017": a name's last word, or its last before a number.
_PART = re.compile(r"(?:(.*)[-_.])?(?:(train|training)|(?:test|testing|val|valid|validation))(?:[-_.]?\d.*)?", re.I)
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_LABELS_FILE = "dataset.json"
# No camera writes a larger picture; an entry that unpacks to more is a bomb.
_LARGEST_ZIP_ENTRY = 2**29


class FoundFile(NamedTuple):
    """A file in a folder or an archive."""

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

    def __init__(self, files: Sequence[FoundFile], *, what: str) -> None:
        visible = sorted((file for file in files if not is_hidden(file.name)), key=lambda file: file.name)
        self._images = [file for file in visible if extension(file.name) in IMAGE_EXTENSIONS]
        self.ignored = Counter(
            extension(file.name) or "no extension"
            for file in visible
            if extension(file.name) not in IMAGE_EXTENSIONS and posixpath.basename(file.name) != _LABELS_FILE
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
            folders, self.held_out = own_split([_folders(name) for name in _without_common_folder(names)])
            classes = classes_of_folders(folders, self.held_out)
        if classes is not None:
            self.labels, self.class_names = number_classes(classes)

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


def open_zip(file: Path) -> FileSource:
    """Every file in a ZIP; nothing is unpacked to disk."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} is not a ZIP that can be read ({error}); copy or make it again.") from error
    mtime_ns = file.stat().st_mtime_ns
    files = [
        FoundFile(info.filename.replace("\\", "/"), info.file_size, mtime_ns, _zip_opener(archive, info))
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


def list_folder(folder: Path) -> Iterator[FoundFile]:
    """Every file below a folder; links are followed, each folder once."""
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
                    yield FoundFile(name, size, status.st_mtime_ns, lambda path=entry.path: path)
        except OSError as error:
            raise UserError(f"the folder {path!r} cannot be read: {error.strerror or error}.") from error


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder it lies in, is what systems leave behind and people do not see."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in name.split("/"))


def extension(name: str) -> str:
    """With its dot, in small letters; ``""`` if there is none."""
    return posixpath.splitext(name)[1].lower()


def _nothing_found(what: str, ignored: Counter[str]) -> str:
    if not ignored:
        return f"{what} is empty; give one that holds images (PNG, JPEG, WebP, ...)."
    kinds = ", ".join(f"{count:,} {extension}" for extension, count in ignored.most_common(3))
    hint = "give one that holds PNG, JPEG, WebP or other common image files"
    if ".mdb" in ignored:
        hint = "give the folder that holds data.mdb itself"
    elif ignored.keys() & {".zip", ".npy", ".npz", ".gz", ".tgz"}:
        hint = "give the path of the file with the images itself"
    elif ignored.keys() & {".heic", ".heif"}:
        hint = "convert HEIC pictures to JPEG or PNG first"
    return f"{what} holds no images, only other files ({kinds}); {hint}."


def _without_common_folder(names: list[str]) -> list[str]:
    """Names with the folders that hold all of them removed."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return [name[len(common) + 1 :] if common else name for name in names]


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]


def part_of(name: str) -> tuple[str, bool] | None:
    """What stands before ``train``, ``test`` or ``val`` in a name, and whether it is held out; None for other names."""
    match = _PART.fullmatch(name)
    return match and (match[1] or "", match[2] is None)


def own_split(folders: list[list[str]]) -> tuple[list[list[str]], np.ndarray | None]:
    """The folders of each image below train and test, and which images are held out; None where the set has none."""
    tops = {folder[0] if folder else "" for folder in folders}
    parts = {top: part for top in tops if (part := part_of(top)) is not None}
    trained, kept = (
        {before for before, is_held_out in parts.values() if is_held_out == want} for want in (False, True)
    )
    # Classes called bullet_train and crash_test are no split: what is held out must also be trained on.
    if len(parts) < len(tops) or not kept or not kept <= trained:
        return folders, None
    held_out = np.array([parts[folder[0]][1] for folder in folders])
    # LSUN writes the class before: bedroom_train.
    before = {top: [prefix] if prefix else [] for top, (prefix, _) in parts.items()}
    return [before[folder[0]] + folder[1:] for folder in folders], held_out


def classes_of_folders(folders: list[list[str]], held_out: np.ndarray | None) -> list[str | int | None] | None:
    """The class of each image, by the outermost of its folders; None where folders are not classes."""
    training = [folder for index, folder in enumerate(folders) if held_out is None or not held_out[index]]
    if not all(training):
        return None
    names = {folder[0] for folder in training}
    if len(names) < 2:
        return None
    return [folder[0] if folder and folder[0] in names else None for folder in folders]


def number_classes(classes: Sequence[str | int | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes as positions in their names, int64, -1 for none; numbers in their own order, names in theirs."""
    present = {value for value in classes if value is not None}
    ordered = sorted(present, key=lambda value: (isinstance(value, str), value))
    index = {value: position for position, value in enumerate(ordered)}
    labels = np.array([-1 if value is None else index[value] for value in classes], dtype=np.int64)
    return labels, tuple(printable(str(value)) for value in ordered)


def _read_labels(file: FoundFile, names: list[str], *, what: str) -> list[str | int | None] | None:
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
