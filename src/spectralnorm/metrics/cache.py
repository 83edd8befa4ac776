"""What is computed from real images, kept on disk: it is the same at every evaluation, and takes longer than the rest.

An entry is a safetensors file named by a hash of all that it depends on. Entries are written under another name and
then renamed, so a killed process leaves none that is incomplete; one that cannot be read is computed again, and a cache
that cannot be written is simply not used. The entries that were not used for longest make way for new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectralnorm.user_cache import cache_folder

__all__ = ["hash_of", "remember"]

MAX_BYTES = 2**29
"""Of all entries; the features that SqueezeNet sees in 10,000 images take 20 MB."""

# Part of every key: raise it when the same would be computed differently.
_FORMAT = 1


def remember(key: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return what was computed under this key, or compute it and keep it.

    Args:
        key: what the result depends on; see :func:`hash_of`.
        compute: called without arguments if there is no entry that can be read; returns tensors on the CPU.
    """
    try:
        path = cache_folder("features") / f"{key}.safetensors"
    except OSError:  # the user has no home
        return compute()
    found = _read(path)
    if found is None:
        found = compute()
        # A full disk or a folder that may not be written costs time at the next evaluation, and nothing else.
        with contextlib.suppress(OSError, SafetensorError):
            _write(path, found)
    return found


def hash_of(*facts: object, images: Tensor | None = None) -> str:
    """A key made of what has a meaningful ``repr``, and of images."""
    digest = hashlib.sha256(repr((_FORMAT, facts)).encode())
    if images is not None:
        digest.update(repr(tuple(images.shape)).encode())
        # In parts, since the images may be memory-mapped and larger than memory.
        for part in images.split(1000):
            digest.update(part.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:40]


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        tensors = load_file(path)
        # The time of use, by which old entries are told.
        path.touch()
    except (OSError, SafetensorError):
        return None
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    num_bytes = sum(value.nbytes for value in tensors.values())
    if num_bytes > MAX_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, num_bytes)
    descriptor, temporary = tempfile.mkstemp(prefix="unfinished-", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove what was used longest ago until ``num_bytes`` more fit."""
    entries = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in folder.iterdir()), reverse=True)
    total = num_bytes
    for _, size, file in entries:
        total += size
        if total > MAX_BYTES:
            file.unlink(missing_ok=True)
