"""Images that are read while training goes on: for sets larger than memory, and than the disk has room to prepare.

Where such a set lies, neighbours are read together: a block of images of one tar, a group of rows of a Parquet file.
Each epoch takes the blocks in an order drawn from (seed, epoch), and the images of a block one after another. From the
stream of these a buffer is kept filled, from which every image is drawn at random and its place taken by the next one.
Both orders are known before anything is read, so a run goes on exactly from a number, without reading what came before.

What was decoded is kept on disk (`spectralnorm.gan.data.stream_cache`), where it has room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data import cache
from spectralnorm.gan.data.decode import Decoded
from spectralnorm.gan.data.image_set import HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_HELD_OUT, check_labels
from spectralnorm.gan.data.prepare import Progress, Source, block_starts, read_sample, summarize
from spectralnorm.gan.data.stream_cache import StreamCache, open_stream_cache
from spectralnorm.gan.data.summary import DataSummary

__all__ = ["ImageStream", "epoch_order", "open_stream"]


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """A set that is read while training goes on, with held-out images in memory; the twin of `ImageSet`.

    No image is both trained on and held out: one whose pixels equal those of a held-out image is skipped.
    """

    source: Source
    image_size: int
    channels: int
    positions: np.ndarray
    """int64 (num_training,): the images to train on, in the order in which they lie."""
    starts: np.ndarray
    """int64: where each block begins among the positions, and their number."""
    labels: Tensor | None
    """int64 ``(num_training,)``, positions in `class_names`; -1 for an image without a class."""
    held_out: Tensor
    """uint8 ``(num_held_out, channels, height, width)``."""
    held_out_labels: Tensor | None
    held_out_digests: frozenset[bytes]
    class_names: tuple[str, ...]
    name: str
    summary: DataSummary
    fingerprint: str
    """SHA-256 of the names, sizes and labels of what is read, of the split, and of the held-out pixels."""
    kept: StreamCache | str
    """Where decoded images are kept; or why they are not, and each epoch decodes anew."""

    @property
    def num_training(self) -> int:
        """Images to train on, those included that may turn out to be unreadable."""
        return len(self.positions)

    def examples(self, num: int) -> tuple[Tensor, Tensor | None]:
        """At most ``num`` images to train on, drawn evenly from the whole set, and their labels; reads them anew."""
        chosen = np.random.default_rng(0).permutation(self.num_training)[:num]
        sample = read_sample(self.source, self.positions[chosen], image_size=self.image_size, channels=self.channels)
        images = torch.from_numpy(sample.pixels)
        return images, None if self.labels is None else self.labels[torch.from_numpy(chosen[sample.readable])]

    def require_labels(self) -> None:
        """Make sure that each image to train on has a class, as training with classes needs it.

        Raises:
            UserError: some have none, or there is only one class.
        """
        without = self.num_training if self.labels is None else int((self.labels < 0).sum())
        check_labels(without, self.num_training, self.class_names, name=self.name)

    def read(self, index: int) -> Decoded:
        """Decode the training image ``index``; raises `UnreadableError`."""
        position = int(self.positions[index])
        return self.source.read(position, image_size=self.image_size, channels=self.channels)

    def file_name(self, index: int) -> str:
        """Of the training image ``index``, for messages."""
        return self.source.file_name(int(self.positions[index]))


def open_stream(
    source: Source,
    *,
    name: str,
    source_text: str,
    image_size: int,
    channels: int,
    key: cache.CacheKey,
    cache_bytes: int,
    progress: Progress | None = None,
) -> ImageStream:
    """Choose and read the held-out images of a source, and leave the others where they are.

    A set's own split is kept. Elsewhere the first tenth by the hashes of the images' names is held out. Of either at
    most 10,000 images, and 512 MB, are read.

    Args:
        source: the images.
        name: of the data set, in tables.
        source_text: where it comes from, in tables and messages.
        image_size: height and width to train at.
        channels: 1 or 3.
        key: of the entry in which decoded images are kept.
        cache_bytes: what the entries of all streamed sets may take; 0: none is made.
        progress: called between blocks of the held-out images.

    Raises:
        UserError: too few images, or too many of the held-out ones cannot be read.
    """
    hashes = _hashes(source)
    order = np.argsort(hashes, kind="stable")
    most = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, cache.MEMORY_MAP_BYTES // (channels * image_size**2)))
    if source.held_out is None:
        share = int(np.clip(round(HELD_OUT_SHARE * len(order)), LEAST_HELD_OUT, most))
        kept, positions = order[:share], np.sort(order[share:])
    else:
        kept = order[source.held_out[order]][:most]
        positions = np.flatnonzero(~source.held_out)
    sample = read_sample(source, kept, image_size=image_size, channels=channels, progress=progress, what=source_text)
    kept = kept[sample.readable]
    if len(kept) < LEAST_HELD_OUT or len(positions) < LEAST_HELD_OUT:
        raise UserError(
            f"{source_text!r} has {len(positions):,} images to train on and {len(kept):,} others held out; "
            f"at least {LEAST_HELD_OUT} of each are needed, so add images to the smaller part."
        )
    labels = source.labels
    digests = [fact.digest for fact in sample.facts]
    fingerprint = _fingerprint(source, hashes, positions, digests)
    return ImageStream(
        source=source,
        image_size=image_size,
        channels=channels,
        positions=positions,
        starts=_training_starts(source, positions),
        labels=None if labels is None else torch.from_numpy(labels[positions]),
        held_out=torch.from_numpy(sample.pixels),
        held_out_labels=None if labels is None else torch.from_numpy(labels[kept]),
        held_out_digests=frozenset(digests),
        class_names=source.class_names,
        name=name,
        summary=summarize(
            source,
            sample,
            name=name,
            source_text=source_text,
            num_training=len(positions),
            image_size=image_size,
            channels=channels,
            fingerprint=fingerprint,
        ),
        fingerprint=fingerprint,
        kept=_open_cache(
            source,
            key,
            fingerprint,
            num_images=len(positions),
            shape=(channels, image_size, image_size),
            limit=cache_bytes,
        ),
    )


def epoch_order(starts: np.ndarray, *, buffer: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which one epoch reads, and the one in which it hands out.

    Args:
        starts: where each block begins, and the number of images.
        buffer: images that are kept read.
        seed: of the run.
        epoch: its number.

    Returns:
        Two permutations of the images. What is handed out in place i was read in place i + buffer - 1 or before.
    """
    # Hashed, so that neighbouring seeds and epochs have nothing in common; torch's generator is the same everywhere.
    text = f"{seed}/{epoch}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    random = torch.Generator().manual_seed(number)
    blocks = torch.randperm(len(starts) - 1, generator=random).tolist()
    ends = starts.tolist()
    reading = np.concatenate([np.arange(ends[block], ends[block + 1]) for block in blocks])
    buffer = min(buffer, len(reading))
    handing = np.empty_like(reading)
    kept = reading[:buffer].tolist()
    for start, pieces in _pieces(reading, buffer):
        places = torch.randint(buffer, (len(pieces),), generator=random).tolist()
        for offset, (place, item) in enumerate(zip(places, pieces, strict=True)):
            handing[start + offset] = kept[place]
            kept[place] = item
    rest = torch.randperm(buffer, generator=random).numpy()
    handing[len(reading) - buffer :] = np.array(kept, dtype=reading.dtype)[rest]
    return reading, handing


def _pieces(reading: np.ndarray, buffer: int, size: int = 2**16) -> Iterator[tuple[int, list[int]]]:
    """What is read once the buffer is full, in pieces, since a list of millions of numbers is large."""
    for start in range(0, len(reading) - buffer, size):
        yield start, reading[buffer + start : buffer + start + size].tolist()


def _open_cache(
    source: Source,
    key: cache.CacheKey,
    fingerprint: str,
    *,
    num_images: int,
    shape: tuple[int, int, int],
    limit: int,
) -> StreamCache | str:
    """Where decoded images are kept, or why not."""
    if not source.costs_decoding(shape[-1], shape[0]):
        return "they lie where they are, decoded already"
    if not limit:
        return "the limit is 0"
    try:
        return open_stream_cache(key, fingerprint, num_images=num_images, shape=shape, limit=limit)
    except OSError as error:
        where = "" if error.filename is None else f"{str(error.filename)!r} cannot be written to: "
        return f"{where}{error.strerror or error}"


def _hashes(source: Source) -> np.ndarray:
    """A number for each image, uint64, by its name: an order that looks random and is the same on every machine."""
    own = getattr(source, "hashes", None)
    if own is not None:
        return own
    names = (source.file_name(index).encode("utf-8", "surrogateescape") for index in range(len(source)))
    return np.array(
        [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") for name in names], np.uint64
    )


def _training_starts(source: Source, positions: np.ndarray) -> np.ndarray:
    own = getattr(source, "groups", None)
    boundaries = block_starts(np.array([0, len(source)])) if own is None else own
    return np.unique(np.searchsorted(positions, boundaries))


def _fingerprint(source: Source, hashes: np.ndarray, positions: np.ndarray, digests: list[bytes]) -> str:
    hasher = hashlib.sha256()
    hasher.update(hashes.astype("<u8").tobytes())
    # Not the times, which copying changes, nor the folders.
    hasher.update(repr([size for _, size, _ in source.files]).encode())
    if source.labels is not None:
        hasher.update(source.labels.astype("<i8").tobytes())
    hasher.update(positions.astype("<i8").tobytes())
    hasher.update(b"".join(digests))
    return hasher.hexdigest()
