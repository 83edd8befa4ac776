"""Features of real images kept on disk: the same at every evaluation, and slower to compute than anything else in it.

An entry is a safetensors file named by a hash of the images and of what the features depend on. Entries are written
under another name and then renamed, so a killed process leaves none that is incomplete; one that cannot be read is
computed again, and a cache that cannot be written is simply not used. The oldest entries make way for new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectralnorm.metrics.extractors import FeatureExtractor, Features

__all__ = ["cached_features"]

MAX_BYTES = 2**29
"""Of all entries; those of 10,000 images seen by SqueezeNet take 20 MB."""

# Part of every key: raise it when the same images would give other features.
_FORMAT = 1


def cached_features(extractor: FeatureExtractor, images: Tensor) -> Features:
    """The features of images, uint8 (n, channels, height, width), computed once per user and machine."""
    path = _folder() / f"{_key(extractor, images)}.safetensors"
    features = _read(path, (len(images), extractor.num_features))
    if features is None:
        features = extractor(images)
        # A full disk or a folder that may not be written costs time at the next evaluation, and nothing else.
        with contextlib.suppress(OSError, SafetensorError):
            _write(path, features)
    return features


def _folder() -> Path:
    """``$SPECTRALNORM_CACHE/features``, else ``spectralnorm/features`` in the user's cache folder."""
    own = os.environ.get("SPECTRALNORM_CACHE")
    if own:
        return Path(own) / "features"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spectralnorm" / "features"


def _key(extractor: FeatureExtractor, images: Tensor) -> str:
    num, channels, height, width = images.shape
    resize = extractor.resize_description(height, width, channels=channels)
    facts = (_FORMAT, extractor.name, extractor.weights_sha256, extractor.num_features, resize, num, channels)
    digest = hashlib.sha256(repr((*facts, height, width)).encode())
    # In parts, since the images may be memory-mapped and larger than memory.
    for part in images.split(1000):
        digest.update(part.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:40]


def _read(path: Path, shape: tuple[int, int]) -> Features | None:
    try:
        tensors = load_file(path)
        # The time of use, by which old entries are told.
        path.touch()
    except (OSError, SafetensorError):
        return None
    features = tensors.get("features")
    if features is None or features.shape != shape:
        return None
    return Features(features, tensors.get("logits"))


def _write(path: Path, features: Features) -> None:
    tensors = {name: value.contiguous() for name, value in features._asdict().items() if value is not None}
    num_bytes = sum(value.nbytes for value in tensors.values())
    if num_bytes > MAX_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, num_bytes)
    descriptor, temporary = tempfile.mkstemp(prefix="unfinished-", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary)
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
