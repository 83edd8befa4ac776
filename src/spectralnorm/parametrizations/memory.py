"""Memory of a row of tensors that is written again, step after step, where nobody else has come to hold it.

New memory costs as much as the arithmetic, because the system clears it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.tables import integers

__all__ = ["Memory", "is_held_once"]


def is_held_once(tensor: Tensor) -> bool:
    """Whether no other tensor, Python's or a graph's, shares the memory of ``tensor``."""
    # Held while it is asked: from torch 2.10 on its tensor keeps what was asked for once, and it counts in any case.
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata) == _OURS


_use_count = torch._C._storage_Use_Count
# One count for the tensor, one for the object through which it is asked.
_OURS = 2


class Memory:
    """Tensors of given forms on a device, some of which may not have been made yet."""

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self._tensors, self._device = list(tensors), device
        # Held, because making one to ask takes longer than asking.
        self._storages = [None if each is None else each.untyped_storage() for each in tensors]
        self._counted = [None if each is None else each._cdata for each in self._storages]
        self._addresses: Tensor | None = None

    def __getitem__(self, place: int) -> Tensor:
        found = self._tensors[place]
        assert found is not None
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)  # type: ignore[arg-type]

    @property
    def addresses(self) -> Tensor:
        """Of all tensors, as int64; zero of one that has not been made."""
        if self._addresses is None:
            self._addresses = integers([0 if each is None else each.data_ptr() for each in self._tensors])
        return self._addresses

    def free_at(self, places: Sequence[int], prototypes: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the forms of ``prototypes`` at ``places`` that may be written: the old ones, or new ones.

        Args:
            places: of this row.
            prototypes: for each place of the row its shape, strides and type.
        """
        counted = self._counted
        for place in places:
            count = counted[place]
            if count is None or _use_count(count) != _OURS:
                self._renew(place, prototypes[place])
        return [self._tensors[place] for place in places]  # type: ignore[misc]

    def _renew(self, place: int, like: Tensor) -> None:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device)
        self._tensors[place], self._addresses = made, None
        self._storages[place] = storage = made.untyped_storage()
        self._counted[place] = storage._cdata
