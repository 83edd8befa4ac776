"""From images that can be read one by one to the set that training sees: read, checked, split, cached."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from spectralnorm.errors import UserError
from spectralnorm.gan.data import cache
from spectralnorm.gan.data.decode import Decoded, UnreadableError, quiet_pillow
from spectralnorm.gan.data.image_set import LEAST_HELD_OUT, ImageSet, Split, digest, fingerprint, split
from spectralnorm.gan.data.summary import DataSummary, Unreadable, printable

__all__ = [
    "MOST_UNREADABLE",
    "Progress",
    "Sample",
    "Source",
    "block_starts",
    "image_set_of",
    "prepare",
    "read_sample",
    "summarize",
]

Progress = Callable[[int, int], None]
"""Called with the number of images read so far and their total."""

LEAST_DIFFERENT = 4
"""Two images to train on and two to hold out; a batch asks for more."""
MOST_UNREADABLE = 0.05
_BLOCK = 1024
"""Images that are read one after another before others are."""
_IMAGES_PER_TASK = 16


class Source(Protocol):
    """Images that can be read one by one, with what is known about them before."""

    @property
    def files(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time of what they are read from: their identity in the cache."""
        ...

    @property
    def ignored(self) -> Counter[str]:
        """Files of other kinds, by extension."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), -1 for none."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def held_out(self) -> np.ndarray | None:
        """bool (N,), where the data brings its own split."""
        ...

    @property
    def padding(self) -> str | None:
        """How small images are padded, for people; None if they are not."""
        ...

    def __len__(self) -> int: ...
    def file_name(self, index: int) -> str: ...
    def costs_decoding(self, image_size: int, channels: int) -> bool: ...
    def read(self, index: int, *, image_size: int, channels: int) -> Decoded: ...


def block_starts(boundaries: np.ndarray) -> np.ndarray:
    """Boundaries of groups with those of blocks of at most 1,024 images added."""
    starts = [np.arange(start, end, _BLOCK) for start, end in itertools.pairwise(boundaries.tolist())]
    return np.concatenate([*starts, boundaries[-1:]])


class _Fact(NamedTuple):
    """What is kept of an image beside its pixels."""

    digest: bytes
    size: str
    mode: str


@dataclass(frozen=True)
class _Readable:
    """What came out of reading: positions of the images that could be read, facts about each, and the others."""

    positions: np.ndarray
    facts: list[_Fact]
    unreadable: tuple[Unreadable, ...]


def prepare(
    source: Source,
    *,
    name: str,
    source_text: str,
    licence: str | None = None,
    image_size: int,
    channels: int,
    key: cache.CacheKey | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Read every image, split them, and keep the result in the cache if there is a key.

    Args:
        source: the images.
        name: of the data set, in tables.
        source_text: where it comes from, in tables and messages.
        licence: if known.
        image_size: height and width to train at.
        channels: 1 or 3.
        key: of the entry to make in the cache.
        progress: called between blocks of images.

    Raises:
        UserError: too few images, or too many that cannot be read.
    """
    shape = (len(source), channels, image_size, image_size)
    folder = None if key is None else cache.workspace(int(np.prod(shape)))
    try:
        pixels = cache.array_in(folder, "unordered.npy", shape)
        readable = _read_all(source, np.arange(len(source)), pixels, progress)
        _check(readable, len(source), what=source_text)
        labels = None if source.labels is None else source.labels[readable.positions]
        digests = [fact.digest for fact in readable.facts]
        parts = split(digests, None if source.held_out is None else source.held_out[readable.positions])
        _check_split(parts, what=source_text)

        order = np.concatenate([parts.training, parts.held_out])
        images = cache.array_in(folder, "images.npy", (len(order), *shape[1:]))
        rows = readable.positions[order]
        for start in range(0, len(rows), _BLOCK):
            images[start : start + _BLOCK] = pixels[rows[start : start + _BLOCK]]
        if folder is not None:
            del pixels
            (folder / "unordered.npy").unlink(missing_ok=True)

        sizes = Counter(fact.size for fact in readable.facts)
        summary = DataSummary(
            name=name,
            source=source_text,
            licence=licence,
            num_images=len(readable.facts),
            num_training=len(parts.training),
            num_held_out=len(parts.held_out),
            channels=channels,
            image_size=image_size,
            original_sizes=_most_common(sizes, 10),
            modes=dict(Counter(fact.mode for fact in readable.facts).most_common()),
            classes=_class_counts(labels, source.class_names),
            num_duplicates=parts.num_duplicates,
            unreadable=readable.unreadable,
            ignored=dict(source.ignored.most_common()),
            resize=_describe_resize(sizes, source.padding, image_size),
            fingerprint=fingerprint(digests, labels, parts),
        )
        facts = {"class_names": source.class_names, "summary": summary.to_json()}
        stored = cache.Stored(images, None if labels is None else labels[order], facts)
        if folder is not None and key is not None and cache.commit(folder, key, stored):
            # A large set is mapped from where it lies now.
            stored = cache.find(key) or stored
            folder = None
        return image_set_of(stored, name=name, source_text=source_text)
    finally:
        cache.clear_workspace(folder)


class Sample(NamedTuple):
    """Some images of a source, read."""

    pixels: np.ndarray
    """uint8 (num readable, channels, size, size)."""
    readable: np.ndarray
    """Which of those asked for these are, as positions among them."""
    facts: list[_Fact]
    unreadable: tuple[Unreadable, ...]


def read_sample(
    source: Source,
    positions: np.ndarray,
    *,
    image_size: int,
    channels: int,
    progress: Progress | None = None,
    what: str | None = None,
) -> Sample:
    """Read some images into memory.

    Args:
        source: the images.
        positions: which of them, int64 (N,).
        image_size: height and width to read at.
        channels: 1 or 3.
        progress: called between blocks of images.
        what: where they come from, in the message when too many are unreadable; None: any number may be.

    Raises:
        UserError: too many cannot be read.
    """
    pixels = np.empty((len(positions), channels, image_size, image_size), np.uint8)
    found = _read_all(source, positions, pixels, progress)
    if what is not None:
        _check_unreadable(found, len(positions), what=what)
    return Sample(pixels[found.positions], found.positions, found.facts, found.unreadable)


def summarize(
    source: Source,
    sample: Sample,
    *,
    name: str,
    source_text: str,
    num_training: int,
    image_size: int,
    channels: int,
    fingerprint: str,
) -> DataSummary:
    """What is known of a set of which only the held-out images were read."""
    sizes = Counter(fact.size for fact in sample.facts)
    return DataSummary(
        name=name,
        source=source_text,
        licence=None,
        num_images=num_training + len(sample.facts),
        num_training=num_training,
        num_held_out=len(sample.facts),
        channels=channels,
        image_size=image_size,
        original_sizes=_most_common(sizes, 10),
        modes=dict(Counter(fact.mode for fact in sample.facts).most_common()),
        classes=_class_counts(source.labels, source.class_names),
        num_duplicates=len(sample.facts) - len({fact.digest for fact in sample.facts}),
        unreadable=sample.unreadable,
        ignored=dict(source.ignored.most_common()),
        resize=_describe_resize(sizes, source.padding, image_size),
        fingerprint=fingerprint,
        streamed=True,
    )


def _read_all(source: Source, wanted: np.ndarray, pixels: np.ndarray, progress: Progress | None) -> _Readable:
    """Fill ``pixels`` with the wanted images, by several threads, as decoders leave Python's lock alone."""
    _, channels, image_size, _ = pixels.shape

    def read(place: int) -> _Fact | UnreadableError:
        try:
            decoded = source.read(int(wanted[place]), image_size=image_size, channels=channels)
        except UnreadableError as error:
            return error
        pixels[place] = decoded.pixels
        return _Fact(digest(decoded.pixels), decoded.size, decoded.mode)

    def read_several(places: range) -> list[_Fact | UnreadableError]:
        return [read(place) for place in places]

    results: list[_Fact | UnreadableError] = []
    threads = min(8, os.cpu_count() or 1) if source.costs_decoding(image_size, channels) else 1
    with quiet_pillow(), ThreadPoolExecutor(threads) as pool:
        # Block by block, so that Ctrl-C waits for one block and not for the whole folder.
        for start in range(0, len(wanted), _BLOCK):
            block = range(start, min(start + _BLOCK, len(wanted)))
            tasks = [block[i : i + _IMAGES_PER_TASK] for i in range(0, len(block), _IMAGES_PER_TASK)]
            for several in pool.map(read_several, tasks) if threads > 1 else map(read_several, tasks):
                results.extend(several)
            if progress is not None:
                progress(block.stop, len(wanted))
    positions = np.array([isinstance(result, _Fact) for result in results], bool).nonzero()[0]
    unreadable = tuple(
        Unreadable(file=printable(source.file_name(int(wanted[place]))), reason=printable(str(result)))
        for place, result in enumerate(results)
        if isinstance(result, UnreadableError)
    )
    return _Readable(positions, [result for result in results if isinstance(result, _Fact)], unreadable)


def _check(readable: _Readable, total: int, *, what: str) -> None:
    _check_unreadable(readable, total, what=what)
    num = len(readable.facts)
    different = len({fact.digest for fact in readable.facts})
    if different < LEAST_DIFFERENT:
        found = "only one image" if num == 1 else f"{num:,} images, {different} of them different"
        raise UserError(
            f"{what!r} holds {found}; training needs at least {LEAST_DIFFERENT} different ones, and at least a batch."
        )


def _check_unreadable(readable: _Readable, total: int, *, what: str) -> None:
    unreadable = readable.unreadable
    if len(unreadable) > MOST_UNREADABLE * total:
        first = f"{unreadable[0].file!r}: {unreadable[0].reason}"
        if len(unreadable) == total:
            raise UserError(f"none of the {total:,} images in {what!r} can be read ({first}); replace them.")
        raise UserError(
            f"{len(unreadable):,} of {total:,} images in {what!r} cannot be read, more than {MOST_UNREADABLE:.0%} "
            f"({first}); replace or remove them."
        )


def _check_split(parts: Split, *, what: str) -> None:
    if min(len(parts.training), len(parts.held_out)) < LEAST_HELD_OUT:
        raise UserError(
            f"{what!r} has {len(parts.training):,} images to train on and {len(parts.held_out):,} others held out; "
            f"at least {LEAST_HELD_OUT} of each are needed, so add images to the smaller part."
        )


def _most_common(counts: Counter[str], limit: int) -> dict[str, int]:
    shown = dict(counts.most_common(limit))
    rest = counts.total() - sum(shown.values())
    return shown | ({"other": rest} if rest else {})


def _class_counts(labels: np.ndarray | None, class_names: Sequence[str]) -> dict[str, int]:
    if labels is None:
        return {}
    counts = dict(zip(class_names, np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist(), strict=True))
    without = int((labels < 0).sum())
    return counts | ({"(no class)": without} if without else {})


def _describe_resize(sizes: Mapping[str, int], padding: str | None, image_size: int) -> str:
    if padding is not None:
        return padding if image_size == 32 else f"{padding}, then Lanczos-antialiased to {image_size}"
    if set(sizes) == {f"{image_size}x{image_size}"}:
        return f"none, already {image_size} x {image_size}"
    return f"centre-cropped, Lanczos-antialiased to {image_size}"


def image_set_of(stored: cache.Stored, *, name: str, source_text: str) -> ImageSet:
    """The set that the cache holds, under the name and the path by which it was asked for now."""
    summary = DataSummary.from_json({**stored.facts["summary"], "name": name, "source": source_text})
    images = torch.from_numpy(stored.images)
    labels = None if stored.labels is None else torch.from_numpy(stored.labels)
    count = summary.num_training
    return ImageSet(
        images=images[:count],
        labels=None if labels is None else labels[:count],
        held_out=images[count:],
        held_out_labels=None if labels is None else labels[count:],
        class_names=tuple(stored.facts["class_names"]),
        name=name,
        summary=summary,
        fingerprint=summary.fingerprint,
    )
