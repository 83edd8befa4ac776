"""Random numbers for a part of a batch, as they are in the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PartOfDraws"]

# What takes a generator and a size; the size stands last.
_DRAWING = (torch.rand, torch.randn, torch.randint)


class PartOfDraws(TorchFunctionMode):
    """Within it, what is drawn for the images of one process is its part of what one process alone would draw.

    ``torch.rand``, ``torch.randn`` and ``torch.randint`` with a generator and one row for each image draw for the
    images of all processes and return the rows of this one's. So the generators, seeded alike, stay in step, one state
    serves all in a checkpoint, and a run depends on the number of its processes by rounding alone. What is drawn once
    for a whole batch is drawn as ever, alike everywhere; so is what no generator is given for.

    Args:
        rank: of this process.
        size: processes.
        rows: images of this process in a batch. Several batches may be joined: each is then a part of its own.
    """

    def __init__(self, *, rank: int, size: int, rows: int) -> None:
        super().__init__()
        self._rank = rank
        self._size = size
        self._rows = rows

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _DRAWING or kwargs.get("generator") is None:
            return function(*args, **kwargs)
        before, shape = _split(function, args, kwargs)
        if not shape or shape[0] % self._rows:
            return function(*before, shape, **kwargs)
        whole: Tensor = function(*before, (self._size * shape[0], *shape[1:]), **kwargs)
        parts = whole.unflatten(0, (shape[0] // self._rows, self._size, self._rows))
        return parts[:, self._rank].flatten(0, 1)


def _split(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], tuple[int, ...]]:
    """The arguments before the size, and the size, which is taken out of ``kwargs``."""
    if "size" in kwargs:
        return args, tuple(kwargs.pop("size"))
    if args and not isinstance(args[-1], int):
        return args[:-1], tuple(args[-1])
    return (), tuple(args)  # rand(2, 3); randint always has a tuple
