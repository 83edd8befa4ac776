"""Whether a value is still the same, or still that of its weight, by the numbers.

A kept value is the weight divided by a number that is known, so some entries of both tell without a copy.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype, cpu
from spectralnorm.linalg.layout import is_dense
from spectralnorm.parametrizations.arithmetic import is_eager

__all__ = ["is_quotient", "is_same", "may_be_compared"]

_SAMPLED = 256  # entries
# A quotient is rounded once, that of a strict weight a few times, in units of its type.
_MOST_ROUNDED = 8


def may_be_compared(tensor: Tensor) -> bool:
    """Whether what is done next may depend on the numbers of ``tensor``: nothing traces or records it."""
    return is_eager(tensor) and torch._C._len_torch_dispatch_stack() == 0


@torch.no_grad()
def is_same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether all numbers are equal."""
    # The first takes a fraction of the time, and is enough where no number is NaN.
    return torch.equal(tensor, copy) or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)


def is_quotient(value: Tensor, weight: Tensor, divisor: float | Tensor, *, are_all_compared: bool = False) -> bool:
    """Whether entries of ``value`` are those of ``weight`` by ``divisor``, but for rounding.

    If not all are compared, it is up to 256 of tensors that lie densely in memory in the same order, of many columns,
    because those of inputs that are always zero stay as they are.
    """
    if value.shape != weight.shape:  # another view of its memory
        return False
    dtype, stride, size = weight.dtype, weight.stride(), weight.numel()
    relative, absolute = _rounding(dtype)
    step = _step(weight.shape, stride, are_all_compared)
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
    # Of float32 what is smaller may be flushed to zero. Numbers of float16 are rounded from those, and reach far enough
    # down for it to be seen.
    smallest = info.tiny * info.eps if dtype is torch.float16 else info.tiny
    return _MOST_ROUNDED * info.eps, _MOST_ROUNDED * smallest


@lru_cache(maxsize=4096)
def _step(shape: torch.Size, stride: tuple[int, ...], are_all_compared: bool) -> int:
    """From one entry that is compared to the next, in memory; 0 where a tensor has gaps there."""
    if not is_dense(torch.empty_strided(shape, stride, device="meta")):
        return 0
    if are_all_compared:
        return 1
    size = math.prod(shape)
    step, columns = math.ceil(size / _SAMPLED), size // shape[0]
    if step >= columns:  # from row to row the column moves on by the golden section
        step += (round(columns * (math.sqrt(5) - 1) / 2) - step) % columns
    while math.gcd(step, columns) > 1:
        step += 1
    return step
