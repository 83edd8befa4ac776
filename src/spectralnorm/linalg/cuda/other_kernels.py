"""The second product of `spectralnorm.linalg.cuda.tracking`, sigma and the vectors, in the words of `image_kernels`."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

from spectralnorm.linalg.cuda.product_parts import is_last, load_rows, load_tile, rows_at, with_fast
from spectralnorm.linalg.cuda.tiles import (
    FAST,
    address_at,
    fast_offsets,
    fast_start_at,
    levels_at,
    offsets,
    size_at,
    slow_offsets,
    stride_at,
)
from spectralnorm.linalg.cuda.tracking_fields import ROWS, SLOW, SPAN, WIDE, BlockField, Field, WholeField
from spectralnorm.linalg.layout import LANES

__all__ = ["ends_kernel", "others_kernel", "wholes_kernel"]

_ADDRESS = tl.constexpr(int(Field.ADDRESS))
_M = tl.constexpr(int(Field.M))
_N = tl.constexpr(int(Field.N))
_M_INNER = tl.constexpr(int(Field.M_INNER))
_N_INNER = tl.constexpr(int(Field.N_INNER))
_M_PLACE_INNER = tl.constexpr(int(Field.M_PLACE_INNER))
_N_PLACE_INNER = tl.constexpr(int(Field.N_PLACE_INNER))
_IS_ALIGNED = tl.constexpr(int(Field.IS_ALIGNED))
_FAST_IS_M = tl.constexpr(int(Field.FAST_IS_M))
_OTHER_PARTS = tl.constexpr(int(Field.OTHER_PARTS))
_TURNED = tl.constexpr(int(Field.TURNED))
_LENGTH = tl.constexpr(int(Field.LENGTH))
_LEAD = tl.constexpr(int(Field.LEAD))
_OTHER = tl.constexpr(int(Field.OTHER))
_SQUARES = tl.constexpr(int(Field.SQUARES))
_END = tl.constexpr(int(Field.END))
_SIGMA = tl.constexpr(int(Field.SIGMA))
_OTHER_COUNTERS = tl.constexpr(int(Field.OTHER_COUNTERS))
_WIDTH = tl.constexpr(int(Field.WIDTH))
_BLOCK_KEPT_START = tl.constexpr(int(BlockField.KEPT_START))
_BLOCK_START = tl.constexpr(int(BlockField.START))
_BLOCK_STOP = tl.constexpr(int(BlockField.STOP))
_BLOCK_PART = tl.constexpr(int(BlockField.PART))
_BLOCK_BLOCK = tl.constexpr(int(BlockField.BLOCK))
_BLOCK_WIDTH = tl.constexpr(int(BlockField.WIDTH))
_WHOLE_SIGMAS = tl.constexpr(int(WholeField.SIGMAS))
_WHOLE_BLOCKS = tl.constexpr(int(WholeField.BLOCKS))
_WHOLE_SIZE = tl.constexpr(int(WholeField.SIZE))
_WHOLE_SOURCE = tl.constexpr(int(WholeField.SOURCE))
_WHOLE_TARGET = tl.constexpr(int(WholeField.TARGET))
_WHOLE_IS_STACKED = tl.constexpr(int(WholeField.IS_STACKED))
_WHOLE_SIGMA = tl.constexpr(int(WholeField.SIGMA))
_WHOLE_WIDTH = tl.constexpr(int(WholeField.WIDTH))
_SLOW = tl.constexpr(SLOW)
_ROWS = tl.constexpr(ROWS)
_FAST = tl.constexpr(FAST)
_THREADS = tl.constexpr(FAST // LANES)
_SPAN = tl.constexpr(SPAN)
_PARTS = tl.constexpr(8)  # parts of a sum that are under way at a time
_WIDE = tl.constexpr(WIDE)


@triton.jit
def _other_over_slow(entry, block, memory, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its slow side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = rows_at(memory, entry + _TURNED)
    M = size_at(entry + _M, IS_ALIGNED)
    m_inner, m_outer, m_stride = levels_at(entry + _M_INNER)
    n_inner, n_outer = tl.load(entry + _N_INNER), tl.load(entry + _N_INNER + 1)
    n_stride = stride_at(entry + _N_INNER + 2, IS_ALIGNED)
    m = fast_start_at(block + _BLOCK_KEPT_START) + tl.arange(0, _FAST)
    n_start, n_stop = tl.load(block + _BLOCK_START).to(tl.int32), tl.load(block + _BLOCK_STOP).to(tl.int32)
    out = memory + tl.load(block + _BLOCK_PART)
    is_m = m < M
    at_m = fast_offsets(m, m_inner, m_outer, m_stride, IS_ALIGNED)
    z0 = tl.zeros((_SLOW, _FAST), tl.float32)
    z1, z2, z3 = z0, z0, z0
    for start in range(n_start, n_stop, 4 * _SLOW):
        n0 = start + tl.arange(0, _SLOW)
        n1, n2, n3 = n0 + _SLOW, n0 + 2 * _SLOW, n0 + 3 * _SLOW
        tile0 = load_tile(base, slow_offsets(n0, n_inner, n_outer, n_stride, IS_ALIGNED), n0 < n_stop, at_m, is_m)
        tile1 = load_tile(base, slow_offsets(n1, n_inner, n_outer, n_stride, IS_ALIGNED), n1 < n_stop, at_m, is_m)
        tile2 = load_tile(base, slow_offsets(n2, n_inner, n_outer, n_stride, IS_ALIGNED), n2 < n_stop, at_m, is_m)
        tile3 = load_tile(base, slow_offsets(n3, n_inner, n_outer, n_stride, IS_ALIGNED), n3 < n_stop, at_m, is_m)
        z0 += tl.load(lead + n0, mask=n0 < n_stop, other=0.0)[:, None] * tile0
        z1 += tl.load(lead + n1, mask=n1 < n_stop, other=0.0)[:, None] * tile1
        z2 += tl.load(lead + n2, mask=n2 < n_stop, other=0.0)[:, None] * tile2
        z3 += tl.load(lead + n3, mask=n3 < n_stop, other=0.0)[:, None] * tile3
    tl.store(out + m, tl.sum((z0 + z1) + (z2 + z3), axis=0), mask=is_m)


@triton.jit
def _other_over_fast(entry, block, memory, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = rows_at(memory, entry + _TURNED)
    M = tl.load(entry + _M).to(tl.int32)
    m_inner, m_outer = tl.load(entry + _M_INNER), tl.load(entry + _M_INNER + 1)
    m_stride = stride_at(entry + _M_INNER + 2, IS_ALIGNED)
    n_inner, n_outer, n_stride = levels_at(entry + _N_INNER)
    m_start = tl.load(block + _BLOCK_KEPT_START).to(tl.int32)
    n_start = fast_start_at(block + _BLOCK_START)
    n_stop = size_at(block + _BLOCK_STOP, IS_ALIGNED)
    out = memory + tl.load(block + _BLOCK_PART)
    all_m = m_start + tl.arange(0, _ROWS * _SLOW)
    at_m = slow_offsets(all_m, m_inner, m_outer, m_stride, IS_ALIGNED)
    warp = tl.arange(0, _SLOW)
    m = m_start + (tl.arange(0, _ROWS) * _SLOW)[:, None] + warp[None, :]
    z = tl.zeros((_ROWS, _SLOW, _THREADS), tl.float32)
    for start in range(n_start, n_stop, _FAST):
        n = start + tl.arange(0, _FAST)
        is_n = n < n_stop
        at_n = fast_offsets(n, n_inner, n_outer, n_stride, IS_ALIGNED)
        tile = load_rows(base, at_m, all_m < M, at_n, is_n)
        mask = is_n[None, :] & (warp < _SLOW)[:, None]
        z = with_fast(z, tl.load(lead + n[None, :] + 0 * warp[:, None], mask=mask, other=0.0), tile)
    tl.store(out + m, tl.sum(z, axis=2), mask=m < M)


@triton.jit
def _at_least(value, bound):
    """As `clamp_min`: NaN stays."""
    return tl.where(value < bound, bound, value)


@triton.jit
def _places(index, levels):
    """Where entries of a vector are in the one that is returned."""
    inner, outer, stride = levels_at(levels)
    return offsets(index, inner, outer, stride)


@triton.jit
def _root_of_sum(shares, number):
    """The root of the sum of some numbers."""
    total = tl.zeros((_FAST,), tl.float32)
    for first in range(0, number, _FAST):
        share = first + tl.arange(0, _FAST)
        total += tl.load(shares + share, mask=share < number, other=0.0)
    return tl.sqrt_rn(tl.sum(total, axis=0))


@triton.jit
def _lead_length(entry, memory, eps):
    """Of the first row of T Y."""
    number = tl.cdiv(tl.load(entry + _N).to(tl.int32), _WIDE)
    return _at_least(_root_of_sum(memory + tl.load(entry + _LENGTH), number), eps)


@triton.jit
def _sigma(entry, memory, length):
    shares = memory + tl.load(entry + _SQUARES)
    return _root_of_sum(shares, tl.load(entry + _OTHER_PARTS + 2).to(tl.int32)) / length


@triton.jit
def _store_end(entry, memory, length, sigma, eps, first, stop):
    """Some entries of z at unit length and in the tensor's order."""
    other, target = memory + tl.load(entry + _OTHER), memory + tl.load(entry + _END)
    for start in range(first, stop, _WIDE):
        index = start + tl.arange(0, _WIDE)
        y = tl.load(other + index, mask=index < stop, other=0.0) / length
        y = y / _at_least(sigma, eps)
        tl.store(target + _places(index, entry + _M_PLACE_INNER), y, mask=index < stop)


@triton.jit
def others_kernel(maps, blocks, counters, memory, eps,
                  IS_SPLIT: tl.constexpr, DTYPE: tl.constexpr, REVISION: tl.constexpr):  # fmt: skip
    """z = A x for the frame's first row x, both vectors at unit length and in the tensor's order, and sigma.

    One program for each block of M and part of N. ``IS_SPLIT`` leaves sigma and the vector along M to `ends_kernel`.
    """
    block = blocks + tl.program_id(0) * _BLOCK_WIDTH
    entry = maps + tl.load(block) * _WIDTH
    if tl.load(entry + _FAST_IS_M) != 0:
        width = _FAST
        if tl.load(entry + _IS_ALIGNED) != 0:
            _other_over_slow(entry, block, memory, DTYPE, True)
        else:
            _other_over_slow(entry, block, memory, DTYPE, False)
    else:
        width = _ROWS * _SLOW
        if tl.load(entry + _IS_ALIGNED) != 0:
            _other_over_fast(entry, block, memory, DTYPE, True)
        else:
            _other_over_fast(entry, block, memory, DTYPE, False)

    length = _lead_length(entry, memory, eps)
    number = tl.load(block + _BLOCK_BLOCK).to(tl.int32)
    if number == 0:
        stop = tl.load(block + _BLOCK_STOP).to(tl.int32)
        lead, target = memory + tl.load(entry + _TURNED), memory + tl.load(entry + _LEAD)
        for start in range(tl.load(block + _BLOCK_START).to(tl.int32), stop, _WIDE):
            n = start + tl.arange(0, _WIDE)
            x = tl.load(lead + n, mask=n < stop, other=0.0)
            tl.store(target + _places(n, entry + _N_PLACE_INNER), x / length, mask=n < stop)
    M = tl.load(entry + _M).to(tl.int32)
    num_parts = tl.load(entry + _OTHER_PARTS + 1).to(tl.int32)
    num_blocks = tl.load(entry + _OTHER_PARTS + 2).to(tl.int32)
    other, squares = memory + tl.load(entry + _OTHER), memory + tl.load(entry + _SQUARES)
    counter = counters + tl.load(entry + _OTHER_COUNTERS)
    if is_last(counter + number, num_parts):
        start = tl.load(block + _BLOCK_KEPT_START).to(tl.int32)
        m = start + tl.arange(0, _FAST)
        is_m = m < tl.minimum(start + width, M)
        part = memory + tl.load(entry + _OTHER_PARTS)
        z = tl.zeros((_FAST,), tl.float32)
        for first in range(0, num_parts, _PARTS):
            which = first + tl.arange(0, _PARTS)
            at = which[:, None] * M + m[None, :]
            z += tl.sum(tl.load(part + at, mask=(which < num_parts)[:, None] & is_m[None, :], other=0.0), axis=0)
        tl.store(other + m, z, mask=is_m)
        tl.store(squares + number, tl.sum(z * z, axis=0))
        if not IS_SPLIT:  # noqa: SIM102 - Triton's `and` asks both sides
            if is_last(counter + num_blocks, num_blocks):
                sigma = _sigma(entry, memory, length)
                tl.store(memory + tl.load(entry + _SIGMA), sigma)
                _store_end(entry, memory, length, sigma, eps, 0, M)


@triton.jit
def ends_kernel(maps, spans, memory, eps, REVISION: tl.constexpr):
    """A span of the vector along M, and sigma."""
    span = spans + 2 * tl.program_id(0)
    entry = maps + tl.load(span) * _WIDTH
    start = tl.load(span + 1).to(tl.int32)
    M = tl.load(entry + _M).to(tl.int32)
    length = _lead_length(entry, memory, eps)
    sigma = _sigma(entry, memory, length)
    if start == 0:
        tl.store(memory + tl.load(entry + _SIGMA), sigma)
    _store_end(entry, memory, length, sigma, eps, start, tl.minimum(start + _WIDE, M))


@triton.jit
def wholes_kernel(table, spans, memory, wholes, REVISION: tl.constexpr):
    """The vectors of each weight's largest block among zeros: one program for each span of a whole vector."""
    span = spans + 2 * tl.program_id(0)
    entry = table + tl.load(span) * _WHOLE_WIDTH
    start = tl.load(span + 1).to(tl.int32)
    sigmas = memory + tl.load(entry + _WHOLE_SIGMAS)
    num_blocks = tl.load(entry + _WHOLE_BLOCKS).to(tl.int32)
    # Of equal ones the first, and NaN before any number, as torch.argmax has it.
    best = tl.load(sigmas)
    largest = 0
    for index in range(1, num_blocks):
        sigma = tl.load(sigmas + index)
        is_larger = (best == best) & ((sigma > best) | (sigma != sigma))
        best = tl.where(is_larger, sigma, best)
        largest = tl.where(is_larger, index, largest)
    size = tl.load(entry + _WHOLE_SIZE).to(tl.int32)
    is_stacked = tl.load(entry + _WHOLE_IS_STACKED) != 0
    total = tl.where(is_stacked, size * num_blocks, size)
    index = start + tl.arange(0, _SPAN)
    own = tl.where(is_stacked, index, largest * size + index)
    value = tl.load(memory + tl.load(entry + _WHOLE_SOURCE) + own, mask=index < total, other=0.0)
    value = tl.where(is_stacked & (index // size != largest), 0.0, value)
    tl.store(wholes + tl.load(entry + _WHOLE_TARGET) + index, value, mask=index < total)
    if start == 0:  # both vectors of a weight come here, and say the same
        tl.store(wholes + tl.load(entry + _WHOLE_SIGMA), best)
