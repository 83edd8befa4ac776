"""Writes through ``.data``, which move no version: noticed by the numbers, where that costs little.

A kept value is the weight divided by a number that is known. So a write into either is found by some of their entries,
without a copy; only which of the two was written takes one, of a new layer, whose value may be initialized.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype, cpu
from spectralnorm.linalg.layout import is_dense
from spectralnorm.parametrizations.arithmetic import host_has, is_eager
from spectralnorm.parametrizations.weight_clock import WeightClock

__all__ = ["Initialization", "first_wait", "is_quotient", "is_same", "may_be_compared", "next_wait"]

_SAMPLED = 256  # entries
# A quotient is rounded once, that of a strict weight a few times, in units of its type.
_MOST_ROUNDED = 8
_LONGEST_WAIT = 256  # occasions
# How often a new value is compared with a copy of it. An initialization reads a weight a few times.
_LOOKS = 32


def may_be_compared(tensor: Tensor) -> bool:
    """Whether what is done next may depend on the numbers of ``tensor``: nothing traces or records it."""
    return is_eager(tensor) and torch._C._len_torch_dispatch_stack() == 0


@torch.no_grad()
def is_same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether all numbers are equal."""
    # The first takes a fraction of the time, and is enough where no number is NaN.
    return torch.equal(tensor, copy) or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)


def is_quotient(value: Tensor, weight: Tensor, divisor: float | Tensor) -> bool:
    """Whether some entries of ``value`` are those of ``weight`` by ``divisor``, but for rounding.

    Of tensors that lie densely in memory in the same order it is up to 256, of many columns, because those of inputs
    that are always zero stay as they are; of others all.
    """
    if value.shape != weight.shape:  # another view of its memory
        return False
    dtype, stride, size = weight.dtype, weight.stride(), weight.numel()
    relative, absolute = _rounding(dtype)
    step = _step(weight.shape, stride)
    if step and value.stride() == stride:
        if dtype is torch.float32 and type(divisor) is float and cpu.is_trusted():
            return cpu.is_quotient(value, weight, size, step, divisor, relative, absolute)
        some = (-(-size // step),), (step,)
        value, weight = value.as_strided(*some), weight.detach().as_strided(*some)
    wide = compute_dtype(dtype)
    with torch.no_grad():
        return torch.allclose(value.to(wide), weight.to(wide) / divisor, rtol=relative, atol=absolute, equal_nan=True)


@cache
def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """What a quotient may be off by: relative to it, and where it is too small for the type."""
    info = torch.finfo(dtype)
    return _MOST_ROUNDED * info.eps, _MOST_ROUNDED * info.tiny


@lru_cache(maxsize=4096)
def _step(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """From one entry that is compared to the next, in memory; 0 where a tensor has gaps there."""
    if not is_dense(torch.empty_strided(shape, stride, device="meta")):
        return 0
    size = math.prod(shape)
    step, columns = math.ceil(size / _SAMPLED), size // shape[0]
    if step >= columns:  # from row to row the column moves on by the golden section
        step += (round(columns * (math.sqrt(5) - 1) / 2) - step) % columns
    while math.gcd(step, columns) > 1:
        step += 1
    return step


def first_wait(clock: WeightClock) -> float:
    """How many occasions to wait for before a new value is compared with the weight; 0: compare it at every use.

    On the CPU none is left out, and a weight that has once been found written by hand is compared whether there was one
    or not. A GPU has to be waited for, so a weight that an optimizer trains is not looked at there, unless it has been
    found written by hand.
    """
    if host_has(clock.weight.device):
        return 0 if clock.is_written_by_hand else 1
    return 1 if clock.steps == 0 or clock.is_written_by_hand else math.inf


def next_wait(clock: WeightClock, wait: float) -> float:
    """The same after a comparison that found nothing, for which ``wait`` was waited.

    On a GPU what no optimizer moves, as frozen layers and averages, is compared half as often each time.
    """
    first = first_wait(clock)
    if host_has(clock.weight.device) or clock.is_written_by_hand or first == math.inf:
        return first
    return min(max(2 * wait, first), _LONGEST_WAIT)


class Initialization:
    """The value of a new layer, whose next uses find what is written into it through ``.data``."""

    __slots__ = ("_copy", "_looks")

    def __init__(self, value: Tensor, before: Initialization | None = None) -> None:
        """Look at ``value``; where it takes the place of another one, as often as that was still to be looked at."""
        self._copy, self._looks = value.clone(), _LOOKS if before is None else before._looks

    def has_changed(self, value: Tensor) -> bool:
        """Whether ``value`` was written to, by one more of a limited number of looks."""
        self._looks -= 1
        return not is_same(value, self._copy)

    @property
    def is_over(self) -> bool:
        """Whether no look is left."""
        return self._looks <= 0
