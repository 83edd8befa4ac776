"""What stands in a tar: where each image lies, and its class.

Listing a tar of a hundred thousand images takes seconds, since every header is read; what was found is kept in the
cache folder under the tar's path, size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from spectralnorm.gan.data import cache
from spectralnorm.gan.data.files import IMAGE_EXTENSIONS, extension, is_hidden

__all__ = ["Listing", "list_cached", "list_tar"]

# Part of every key: raise it when the same tar would be listed differently.
_FORMAT = 1
_LABEL_EXTENSIONS = (".cls", ".json")
_LABEL_KEYS = ("label", "class", "cls")
# No label needs more.
_LARGEST_LABEL = 2**20


@dataclass
class Listing:
    """What stands in one shard: an entry for each image."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    classes: list[str | int | None] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    has_classes: bool = False


def list_cached(path: Path) -> Listing:
    """The listing of a tar that is not compressed, from the cache if it is there; raises what tarfile raises."""
    status = path.stat()
    key = json.dumps([_FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns])
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    kept = cache.cache_folder().parent / "tars" / f"{name}.npz"
    try:
        return _load(kept)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        pass
    with path.open("rb") as file:
        found = list_tar(file, path.name)
    _save(kept, found)
    return found


def list_tar(file: IO[bytes], shard: str) -> Listing:
    """Go through a tar that is not compressed.

    Args:
        file: the tar.
        shard: its name, of which the images' hashes depend.

    Raises:
        tarfile.TarError: it is damaged; and what else tarfile raises then.
    """
    found = Listing()
    keys: list[str] = []
    values: dict[str, str | int | None] = {}
    is_webdataset = False
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            # Else tarfile keeps every member it has seen.
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            name, kind = member.name.removeprefix("./"), extension(member.name)
            if not member.isfile() or member.issparse() or is_hidden(name):
                continue
            folder, base = posixpath.split(name)
            key = posixpath.join(folder, base.split(".")[0])
            if kind in _LABEL_EXTENSIONS:
                is_webdataset = True
                label = _read_label(archive, member, kind)
                if label is not None:
                    values.setdefault(key, label)
            elif kind in IMAGE_EXTENSIONS:
                keys.append(key)
                found.offsets.append(member.offset_data)
                found.sizes.append(member.size)
                found.folders.append(folder)
                text = f"{shard}/{name}".encode("utf-8", "surrogateescape")
                found.hashes.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
            else:
                found.ignored[kind or "no extension"] += 1
    if is_webdataset:
        # A sample is one image; what else stands beside it, such as a mask, is not trained on.
        first = [position for position, key in enumerate(keys) if position == 0 or key != keys[position - 1]]
        if len(first) < len(keys):
            found.ignored["further images of a sample"] += len(keys) - len(first)
        entries: list[Any]
        for entries in (found.offsets, found.sizes, found.folders, found.hashes, keys):
            entries[:] = [entries[position] for position in first]
    found.classes = [values.get(key) for key in keys]
    found.has_classes = bool(values)
    return found


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> str | int | None:
    if member.size > _LARGEST_LABEL or archive.fileobj is None:
        return None
    # Several times faster than extractfile; tarfile itself finds the next header by its place.
    archive.fileobj.seek(member.offset_data)
    text = archive.fileobj.read(member.size).decode("utf-8", "replace").strip()
    if kind == ".json":
        try:
            content = json.loads(text)
        except ValueError:
            return None
        found = [content[key] for key in _LABEL_KEYS if key in content] if isinstance(content, dict) else [content]
        value = found[0] if found else None
        return value if isinstance(value, str | int) and not isinstance(value, bool) else None
    return int(text) if re.fullmatch(r"\d{1,18}", text) else text or None


def _save(kept: Path, found: Listing) -> None:
    """Keep a listing; if that fails, only time is lost."""
    rest = {
        "folders": found.folders,
        "classes": found.classes,
        "ignored": found.ignored,
        "has_classes": found.has_classes,
    }
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=kept.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file,
                    offsets=np.array(found.offsets, np.int64),
                    sizes=np.array(found.sizes, np.int64),
                    hashes=np.array(found.hashes, np.uint64),
                    rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
                )
            os.replace(unfinished, kept)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError:
        pass


def _load(kept: Path) -> Listing:
    # Opened here, since np.load leaves a file that it cannot read open.
    with kept.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        rest = json.loads(arrays["rest"].tobytes())
        return Listing(
            offsets=arrays["offsets"].tolist(),
            sizes=arrays["sizes"].tolist(),
            hashes=arrays["hashes"].tolist(),
            folders=rest["folders"],
            classes=rest["classes"],
            ignored=Counter(rest["ignored"]),
            has_classes=rest["has_classes"],
        )
