"""The prepared images of a data set, and how they are split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.gan.data.summary import DataSummary

__all__ = ["ImageSet", "Split", "check_labels", "digest", "fingerprint", "split"]

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 10_000
LEAST_HELD_OUT = 2
DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to train on, and images kept apart for metrics; no image is in both."""

    images: Tensor
    """uint8 ``(num_training, channels, height, width)``, in an order that looks random and depends on the content
    alone, so that any first part is a fair sample. In memory, or mapped from the cache when over 512 MB."""
    labels: Tensor | None
    """int64 ``(num_training,)``, positions in `class_names`; -1 for an image without a class."""
    held_out: Tensor
    """uint8 ``(num_held_out, channels, height, width)``, never trained on."""
    held_out_labels: Tensor | None
    class_names: tuple[str, ...]
    """() when there are no labels."""
    name: str
    summary: DataSummary
    fingerprint: str
    """SHA-256 of the prepared images, their labels and the split."""

    @property
    def num_training(self) -> int:
        """Images to train on."""
        return len(self.images)

    def examples(self, num: int) -> tuple[Tensor, Tensor | None]:
        """The first images to train on, at most ``num``, and their labels: a fair sample to show or compare with."""
        return self.images[:num], None if self.labels is None else self.labels[:num]

    def require_labels(self) -> None:
        """Make sure that each image to train on has a class, as training with classes needs it.

        Raises:
            UserError: some have none, or there is only one class.
        """
        without = len(self.images) if self.labels is None else int((self.labels < 0).sum())
        check_labels(without, len(self.images), self.class_names, name=self.name)


def check_labels(num_without: int, num_images: int, class_names: tuple[str, ...], *, name: str) -> None:
    """What `ImageSet.require_labels` asks for.

    Raises:
        UserError: images have no class, or all have the same.
    """
    if num_without:
        advice = "label or remove them"
        if num_without == num_images:
            advice = "put each into a folder named after its class, or give labels in dataset.json"
        raise UserError(
            f"training with classes needs one for each image, but {num_without:,} of the {num_images:,} training "
            f"images of {name!r} have none; {advice}, or train without classes."
        )
    if len(class_names) < 2:
        raise UserError(
            f"training with classes needs at least two, but {name!r} has only {', '.join(class_names)!r}; "
            "train without classes."
        )


class Split(NamedTuple):
    """Which images are trained on and which are held out, as positions."""

    training: np.ndarray
    held_out: np.ndarray
    num_duplicates: int


def digest(pixels: np.ndarray) -> bytes:
    """A hash of an image's pixels by which duplicates are found."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=DIGEST_BYTES).digest()


def split(digests: list[bytes], held_out: np.ndarray | None = None) -> Split:
    """Choose the held-out images by content.

    Images are ranked by their digests, which puts them in an order that looks random, yet is the same on every
    machine and whatever the files are called, and moves few images when some are added. The first tenth is held out,
    at least 2 and at most 10,000. Duplicates stay together: a group too large for the room that is left is trained on.

    Args:
        digests: the `digest` of each image, at least two different ones.
        held_out: bool (N,), the split that the data came with. It is kept, except that an image that is also among
            the held-out ones is not trained on.

    Returns:
        Positions ordered by digest.
    """
    numbers = np.frombuffer(b"".join(digests), dtype=">u8").reshape(len(digests), 2)
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (numbers[order[1:]] != numbers[order[:-1]]).any(axis=1)
    # The group of equal images to which each image belongs; sizes by group.
    group_of = np.empty(len(order), dtype=np.int64)
    group_of[order] = np.cumsum(is_first) - 1
    sizes = np.bincount(group_of)
    if held_out is not None:
        chosen = np.zeros(len(sizes), dtype=bool)
        chosen[group_of[held_out]] = True
        training, kept = ~chosen[group_of], held_out
    else:
        room = int(np.clip(round(HELD_OUT_SHARE * len(order)), LEAST_HELD_OUT, MOST_HELD_OUT))
        chosen = np.zeros(len(sizes), dtype=bool)
        for group, size in enumerate(sizes):
            if size <= room:
                chosen[group] = True
                room -= size
            if room == 0:
                break
        if not chosen.any():
            chosen[np.argmin(sizes)] = True
        kept = chosen[group_of]
        training = ~kept
    return Split(order[training[order]], order[kept[order]], len(order) - len(sizes))


def fingerprint(digests: list[bytes], labels: np.ndarray | None, parts: Split) -> str:
    """SHA-256 over the digests of the training images, the held-out images and their labels, in order."""
    hasher = hashlib.sha256()
    for positions in (parts.training, parts.held_out):
        hasher.update(len(positions).to_bytes(8, "little"))
        hasher.update(b"".join(digests[position] for position in positions))
        if labels is not None:
            hasher.update(labels[positions].astype("<i8").tobytes())
    return hasher.hexdigest()
