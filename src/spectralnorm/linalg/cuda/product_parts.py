"""What the kernels of both products share: tiles in the forms they are summed in, and who goes on after them."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

from spectralnorm.linalg.cuda.tiles import FAST
from spectralnorm.linalg.cuda.tracking_fields import ROWS, SLOW
from spectralnorm.linalg.layout import LANES

__all__ = ["is_last", "load_rows", "load_tile", "rows_at", "with_fast"]

_SLOW = tl.constexpr(SLOW)
_ROWS = tl.constexpr(ROWS)
_LANES = tl.constexpr(LANES)
_THREADS = tl.constexpr(FAST // LANES)


@triton.jit
def is_last(counter, number):
    """Whether this is the last of a number of programs that come here; it then sees what the others have stored before.

    The counter is at zero before and after.
    """
    # All threads have stored before the one that counts does so.
    tl.debug_barrier()
    before = 0
    if number > 1:
        before = tl.atomic_add(counter, 1, sem="acq_rel")
    is_last = before == number - 1
    if is_last & (number > 1):
        tl.store(counter, 0)
    return is_last


@triton.jit
def rows_at(memory, place):
    """A frame, whose place the table has."""
    return tl.multiple_of(memory + tl.load(place), 16)


@triton.jit
def load_tile(base, slow, is_slow, fast, is_fast):
    """Entries of a matrix in float32, (slow, fast)."""
    mask = is_slow[:, None] & is_fast[None, :]
    return tl.load(base + slow[:, None] + fast[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(base, at_row, is_row, fast, is_fast):
    """Entries of `_ROWS` times `_SLOW` rows of a matrix, (rows, slow, threads, lanes)."""
    return tl.reshape(load_tile(base, at_row, is_row, fast, is_fast), (_ROWS, _SLOW, _THREADS, _LANES))


@triton.jit
def with_fast(y, f, tile):
    """Sums of a row's products with a tile whose fast side is summed over: what a thread has becomes one number."""
    return y + tl.sum(tl.reshape(f, (_SLOW, _THREADS, _LANES))[None, :, :, :] * tile, axis=3)
