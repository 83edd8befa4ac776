"""Starting kernels, and sending them integers without waiting for the device."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralnorm.linalg.cuda import frame_turn, product_parts, tiles

__all__ = ["is_capturing", "launch", "on_device_of", "relative_addresses", "uploaded", "written"]

_PER_LAUNCH = 8


def launch(kernel: Any, num_programs: int, *arguments: Any, num_warps: int = 4) -> None:
    """Start a kernel; its last arguments may be constants to compile for.

    What Triton has compiled for such arguments is kept and started as it is: looking it up takes Triton several times
    as long as starting it.

    Args:
        kernel: whose parameters are tensors, of one type each, floats, integers of 32 bits that are not specialized
            for, and constants: truth values, and the types of `TRITON_DTYPES`.
        num_programs: at least 1.
        arguments: all but ``REVISION``.
        num_warps: of each program.
    """
    if isinstance(kernel, triton.JITFunction) and _TAKES_CONSTANTS:  # else it is Triton's interpreter, or 3.2
        addresses, key = 0, [id(kernel), num_warps, torch.cuda.current_device()]
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor:
                addresses |= argument.data_ptr()
            elif kind is not float and kind is not int:
                key.append(id(argument))  # truth values and Triton's types, of which there is one object each
        # For addresses that 16 does not divide Triton compiles anew: it finds out for itself.
        if not addresses & 15:
            of_kind = tuple(key)
            start = _starts.get(of_kind)
            if start is None:
                _starts[of_kind] = _compiled(kernel, num_programs, arguments, num_warps)
            else:
                start[num_programs, 1, 1](*arguments, _revision(kernel.fn.__module__))
            return
    _compiled(kernel, num_programs, arguments, num_warps)


# What Triton 3.2 has compiled takes the other arguments alone.
_TAKES_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_starts: dict[tuple[int, ...], Any] = {}


def _compiled(kernel: Any, num_programs: int, arguments: Sequence[Any], num_warps: int) -> Any:
    """Start a kernel by Triton, which gives back what it has compiled or found for such arguments."""
    return kernel[(num_programs,)](*arguments, REVISION=_revision(kernel.fn.__module__), num_warps=num_warps)


@cache
def _revision(module: str) -> int:
    """A number for the values of a module's constants.

    Triton 3.2 finds what it has compiled before by the source of a kernel, and does not look at constants from outside
    of it. What another version of this package left in the cache must not be taken for ours.
    """
    constants = [vars(each).items() for each in (sys.modules[module], tiles, product_parts, frame_turn)]
    values = sorted((name, each.value) for some in constants for name, each in some if isinstance(each, tl.constexpr))
    return zlib.crc32(repr(values).encode()) % 2**31


def uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as an int64 tensor.

    One asynchronous copy. While a graph is being captured the host's memory would be read at every replay, when it
    holds something else: there the integers travel as arguments of kernels, eight in a launch.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    if not is_capturing(device):
        return torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True).to(device, non_blocking=True)
    return written(values, device)


def written(values: Sequence[int], device: torch.device) -> Tensor:
    """As `uploaded`, by kernels. Compiled at the first call, which must not be in a capture."""
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    for start in range(0, len(values), _PER_LAUNCH):
        some = [*values[start : start + _PER_LAUNCH], *[0] * _PER_LAUNCH][:_PER_LAUNCH]
        # In halves, because Triton compiles anew for each combination of short and long integers.
        halves = [half for value in some for half in (value >> 32, (value & 0xFFFFFFFF) - (value << 1 & 1 << 32))]
        _write_kernel[(1,)](table, start, min(len(values) - start, _PER_LAUNCH), *halves)
    return table


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured: what is computed then has no value before the graph is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def relative_addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes from the first tensor to each."""
    first = tensors[0].data_ptr()
    return [tensor.data_ptr() - first for tensor in tensors]


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Where Triton launches: on the current device, whatever the tensors' is."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


@triton.jit
def _joined(high, low):
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit(do_not_specialize="start number a0 a1 b0 b1 c0 c1 d0 d1 e0 e1 f0 f1 g0 g1 h0 h1".split())
def _write_kernel(table, start, number, a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, f0, f1, g0, g1, h0, h1):
    table += start
    tl.store(table, _joined(a0, a1))
    tl.store(table + 1, _joined(b0, b1), mask=number > 1)
    tl.store(table + 2, _joined(c0, c1), mask=number > 2)
    tl.store(table + 3, _joined(d0, d1), mask=number > 3)
    tl.store(table + 4, _joined(e0, e1), mask=number > 4)
    tl.store(table + 5, _joined(f0, f1), mask=number > 5)
    tl.store(table + 6, _joined(g0, g1), mask=number > 6)
    tl.store(table + 7, _joined(h0, h1), mask=number > 7)
