"""An endless stream of shuffled batches that can be continued exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["Batch", "Batches"]

# Of the memory that is free on an accelerator, what the images may take.
_DEVICE_SHARE = 0.25


class Batch(NamedTuple):
    """Images, real or generated, on the device of the networks."""

    images: Tensor
    """float32 ``(batch, channels, height, width)`` in [-1, 1]."""
    labels: Tensor | None = None
    """int64 ``(batch,)``; None where classes play no part."""


class Batches(Iterator[Batch]):
    """Batches of images without end; every epoch takes each image once, in an order drawn from (seed, epoch).

    Batches are always full: one that reaches the end of an epoch goes on in the next, so no image is dropped. Images
    are moved to the device once if they take at most a quarter of its free memory, else batch by batch. The order is
    the same on every device, and `next` never waits for the device.

    Args:
        images: uint8 ``(num, channels, height, width)``; float32 ones, such as points, are handed out as they are.
        labels: int64 ``(num,)``; None: batches without labels.
        batch_size: at most ``num``.
        seed: of the order.
        device: where the batches are wanted.
        share: picks, of the positions of a batch, those that are wanted here: of several processes each has a share.

    Raises:
        UserError: the batch is larger than the data.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"a batch of {batch_size:,} cannot be taken from {len(images):,} training images; "
                f"choose a batch size from 1 to {len(images):,}, or give more images."
            )
        self._device = torch.device(device)
        self._images = images.to(self._device) if _fits(images, self._device) else images
        self._labels = None if labels is None else labels.to(self._images.device)
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self._drawn = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Batch:
        """The next batch, on the device."""
        indices = self._next_indices()
        indices = indices if self._share is None else self._share(indices)
        images = self._to_device(self._images.index_select(0, indices))
        labels = None if self._labels is None else self._to_device(self._labels.index_select(0, indices))
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(127.5).sub_(1)
        return Batch(images, labels)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: a few integers."""
        return {"seed": self._seed, "num_images": len(self._images), "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken; the batch size may have changed.

        Raises:
            UserError: the state belongs to another number of images or another seed.
        """
        expected = {"seed": self._seed, "num_images": len(self._images)}
        given = {name: state[name] for name in expected}
        if given != expected:
            raise UserError(f"the order of batches was saved for {given} and cannot go on with {expected}.")
        self._drawn = state["drawn"]

    def _to_device(self, part: Tensor) -> Tensor:
        # Pinned memory is copied while the CPU goes on; torch keeps it until the copy is done.
        if part.device.type == "cpu" and self._device.type == "cuda":
            part = part.pin_memory()
        return part.to(self._device, non_blocking=True)

    def _next_indices(self) -> Tensor:
        """Positions of the next batch, on the device of the images."""
        parts, wanted = [], self._batch_size
        while wanted:
            epoch, start = divmod(self._drawn, len(self._images))
            if epoch != self._epoch:
                self._order = self._shuffled(epoch)
                self._epoch = epoch
            part = self._order[start : start + wanted]
            parts.append(part)
            self._drawn += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        # Always drawn on the CPU, so that the order does not depend on the device; hashed, so that neighbouring seeds
        # and epochs have nothing in common.
        text = f"{self._seed}/{epoch}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(number))
        if self._images.device.type == "cuda":
            order = order.pin_memory()
        return order.to(self._images.device, non_blocking=True)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= _DEVICE_SHARE * free
