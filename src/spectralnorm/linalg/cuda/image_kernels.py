"""The first product of `spectralnorm.linalg.cuda.tracking`, and the next frame.

In their words a matrix A has M rows, along which a frame F of eight rows lies, and N columns: Y = F A. For a frame on
the right side that is the transposed matrix, so M counts the columns of the weight's matrix there. A product goes
through the matrix in tiles; which side of a tile is summed over, the slow or the fast one, gives its two forms. A
matrix that is not `Layout.is_aligned` goes through the same code with offsets computed by division and loads of single
entries.

A launch is one product for all matrices and everything that follows from it. Programs leave parts of the product in
memory and count themselves; the last one that has to do with something goes on with it (`is_last`): first over the
parts of a block of the product, then over the blocks of a matrix. No result depends on which one that is: it adds up
what all have left in a fixed order.

Block sizes come from counting registers, instructions and bytes in flight. A tile of 4 x 128 is one 128-bit load for
each thread of four warps; four are under way at a time. Summed over the slow side, eight partial sums of a tile's size
are kept; over the fast side each thread has a row of each tile, and adds up its four entries before they go to one of
its eight sums for each row. That is about 170 registers, hence three programs to a multiprocessor of an A100 or H100,
with 24 KiB in flight: about what its share of the memory's bandwidth times the latency asks for. A program that reads
16384 entries, or twice as many over the slow side, where an H200 was faster with them, makes thousands of programs of a
large model, and a few of a small layer. What comes after the products needs fewer registers than they do.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

from spectralnorm.linalg.cuda.frame_turn import store_gram, total_gram, turn_of
from spectralnorm.linalg.cuda.product_parts import is_last, load_rows, load_tile, rows_at, with_fast
from spectralnorm.linalg.cuda.tiles import (
    FAST,
    address_at,
    fast_offsets,
    fast_start_at,
    levels_at,
    size_at,
    slow_offsets,
    stride_at,
)
from spectralnorm.linalg.cuda.tracking_fields import ROWS, SLOW, WIDE, BlockField, Field
from spectralnorm.linalg.layout import LANES

__all__ = ["images_kernel", "turned_kernel"]

_ADDRESS = tl.constexpr(int(Field.ADDRESS))
_M = tl.constexpr(int(Field.M))
_N = tl.constexpr(int(Field.N))
_M_INNER = tl.constexpr(int(Field.M_INNER))
_N_INNER = tl.constexpr(int(Field.N_INNER))
_IS_ALIGNED = tl.constexpr(int(Field.IS_ALIGNED))
_FAST_IS_M = tl.constexpr(int(Field.FAST_IS_M))
_FRAME = tl.constexpr(int(Field.FRAME))
_DIRECTION = tl.constexpr(int(Field.DIRECTION))
_IMAGE_PARTS = tl.constexpr(int(Field.IMAGE_PARTS))
_IMAGE = tl.constexpr(int(Field.IMAGE))
_GRAMS = tl.constexpr(int(Field.GRAMS))
_TURN = tl.constexpr(int(Field.TURN))
_TURNED = tl.constexpr(int(Field.TURNED))
_KEPT = tl.constexpr(int(Field.KEPT))
_LENGTH = tl.constexpr(int(Field.LENGTH))
_IMAGE_COUNTERS = tl.constexpr(int(Field.IMAGE_COUNTERS))
_WIDTH = tl.constexpr(int(Field.WIDTH))
_BLOCK_KEPT_START = tl.constexpr(int(BlockField.KEPT_START))
_BLOCK_START = tl.constexpr(int(BlockField.START))
_BLOCK_STOP = tl.constexpr(int(BlockField.STOP))
_BLOCK_PART = tl.constexpr(int(BlockField.PART))
_BLOCK_BLOCK = tl.constexpr(int(BlockField.BLOCK))
_BLOCK_WIDTH = tl.constexpr(int(BlockField.WIDTH))
_SLOW = tl.constexpr(SLOW)
_ROWS = tl.constexpr(ROWS)
_FAST = tl.constexpr(FAST)
_THREADS = tl.constexpr(FAST // LANES)
_CHUNK = tl.constexpr(64)  # entries of eight rows whose 64 products are in registers at a time
_PARTS = tl.constexpr(8)  # parts of a sum that are under way at a time
_WIDE = tl.constexpr(WIDE)


@triton.jit
def _rolled(m, back, M):
    """Where in its direction the entries of a frame's last row find what is added to them."""
    # As in `fast_offsets`: with this claim the threads load for those entries of the frame that they have.
    return tl.max_contiguous(tl.where(m < back, m - back + M, m - back), _FAST)


@triton.jit
def _with_slow(y0, y1, y2, y3, y4, y5, y6, y7, tile, frame, direction, back, m, is_m, M, IS_STIRRED: tl.constexpr):
    """Sums of eight products, with a tile whose slow side is summed over."""
    y0 += tl.load(frame + m, mask=is_m, other=0.0)[:, None] * tile
    y1 += tl.load(frame + M + m, mask=is_m, other=0.0)[:, None] * tile
    y2 += tl.load(frame + 2 * M + m, mask=is_m, other=0.0)[:, None] * tile
    y3 += tl.load(frame + 3 * M + m, mask=is_m, other=0.0)[:, None] * tile
    y4 += tl.load(frame + 4 * M + m, mask=is_m, other=0.0)[:, None] * tile
    y5 += tl.load(frame + 5 * M + m, mask=is_m, other=0.0)[:, None] * tile
    y6 += tl.load(frame + 6 * M + m, mask=is_m, other=0.0)[:, None] * tile
    last = tl.load(frame + 7 * M + m, mask=is_m, other=0.0)
    if IS_STIRRED:
        last += tl.load(direction + _rolled(m, back, M), mask=is_m, other=0.0)
    y7 += last[:, None] * tile
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def _stored(out, N, n, is_n, y0, y1, y2, y3, y4, y5, y6, y7, AXIS: tl.constexpr):
    """Store what eight tiles sum up to along an axis."""
    tl.store(out + n, tl.sum(y0, axis=AXIS), mask=is_n)
    tl.store(out + N + n, tl.sum(y1, axis=AXIS), mask=is_n)
    tl.store(out + 2 * N + n, tl.sum(y2, axis=AXIS), mask=is_n)
    tl.store(out + 3 * N + n, tl.sum(y3, axis=AXIS), mask=is_n)
    tl.store(out + 4 * N + n, tl.sum(y4, axis=AXIS), mask=is_n)
    tl.store(out + 5 * N + n, tl.sum(y5, axis=AXIS), mask=is_n)
    tl.store(out + 6 * N + n, tl.sum(y6, axis=AXIS), mask=is_n)
    tl.store(out + 7 * N + n, tl.sum(y7, axis=AXIS), mask=is_n)


@triton.jit
def _image_over_slow(entry, block, frames, direction, back, memory,
                     DTYPE: tl.constexpr, IS_STIRRED: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Eight rows times a part of a matrix, summed over its slow side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    frame = rows_at(frames, entry + _FRAME)
    M = tl.load(entry + _M).to(tl.int32)
    N = size_at(entry + _N, IS_ALIGNED)
    m_inner, m_outer = tl.load(entry + _M_INNER), tl.load(entry + _M_INNER + 1)
    m_stride = stride_at(entry + _M_INNER + 2, IS_ALIGNED)
    n_inner, n_outer, n_stride = levels_at(entry + _N_INNER)
    n = fast_start_at(block + _BLOCK_KEPT_START) + tl.arange(0, _FAST)
    m_start, m_stop = tl.load(block + _BLOCK_START).to(tl.int32), tl.load(block + _BLOCK_STOP).to(tl.int32)
    out = memory + tl.load(block + _BLOCK_PART)
    is_n = n < N
    at_n = fast_offsets(n, n_inner, n_outer, n_stride, IS_ALIGNED)
    y0 = tl.zeros((_SLOW, _FAST), tl.float32)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    for start in range(m_start, m_stop, 4 * _SLOW):
        m0 = start + tl.arange(0, _SLOW)
        m1, m2, m3 = m0 + _SLOW, m0 + 2 * _SLOW, m0 + 3 * _SLOW
        # All four loads are under way before the first is used.
        tile0 = load_tile(base, slow_offsets(m0, m_inner, m_outer, m_stride, IS_ALIGNED), m0 < m_stop, at_n, is_n)
        tile1 = load_tile(base, slow_offsets(m1, m_inner, m_outer, m_stride, IS_ALIGNED), m1 < m_stop, at_n, is_n)
        tile2 = load_tile(base, slow_offsets(m2, m_inner, m_outer, m_stride, IS_ALIGNED), m2 < m_stop, at_n, is_n)
        tile3 = load_tile(base, slow_offsets(m3, m_inner, m_outer, m_stride, IS_ALIGNED), m3 < m_stop, at_n, is_n)
        y0, y1, y2, y3, y4, y5, y6, y7 = _with_slow(
            y0, y1, y2, y3, y4, y5, y6, y7, tile0, frame, direction, back, m0, m0 < m_stop, M, IS_STIRRED
        )
        y0, y1, y2, y3, y4, y5, y6, y7 = _with_slow(
            y0, y1, y2, y3, y4, y5, y6, y7, tile1, frame, direction, back, m1, m1 < m_stop, M, IS_STIRRED
        )
        y0, y1, y2, y3, y4, y5, y6, y7 = _with_slow(
            y0, y1, y2, y3, y4, y5, y6, y7, tile2, frame, direction, back, m2, m2 < m_stop, M, IS_STIRRED
        )
        y0, y1, y2, y3, y4, y5, y6, y7 = _with_slow(
            y0, y1, y2, y3, y4, y5, y6, y7, tile3, frame, direction, back, m3, m3 < m_stop, M, IS_STIRRED
        )
    _stored(out, N, n, is_n, y0, y1, y2, y3, y4, y5, y6, y7, 0)


@triton.jit
def _image_over_fast(entry, block, frames, direction, back, memory,
                     DTYPE: tl.constexpr, IS_STIRRED: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Eight rows times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    frame = rows_at(frames, entry + _FRAME)
    M = size_at(entry + _M, IS_ALIGNED)
    N = tl.load(entry + _N).to(tl.int32)
    m_inner, m_outer, m_stride = levels_at(entry + _M_INNER)
    n_inner, n_outer = tl.load(entry + _N_INNER), tl.load(entry + _N_INNER + 1)
    n_stride = stride_at(entry + _N_INNER + 2, IS_ALIGNED)
    n_start = tl.load(block + _BLOCK_KEPT_START).to(tl.int32)
    m_start = fast_start_at(block + _BLOCK_START)
    m_stop = size_at(block + _BLOCK_STOP, IS_ALIGNED)
    out = memory + tl.load(block + _BLOCK_PART)
    all_n = n_start + tl.arange(0, _ROWS * _SLOW)
    at_n = slow_offsets(all_n, n_inner, n_outer, n_stride, IS_ALIGNED)
    # Each warp has a row of the frame for itself, which is that of all its rows of the matrix: what all warps share
    # would have to be passed round the threads through shared memory.
    warp = tl.arange(0, _SLOW)
    n = n_start + (tl.arange(0, _ROWS) * _SLOW)[:, None] + warp[None, :]
    is_n = n < N
    y0 = tl.zeros((_ROWS, _SLOW, _THREADS), tl.float32)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    for start in range(m_start, m_stop, _FAST):
        m = start + tl.arange(0, _FAST)
        is_m = m < m_stop
        at_m = fast_offsets(m, m_inner, m_outer, m_stride, IS_ALIGNED)
        tile = load_rows(base, at_n, all_n < N, at_m, is_m)
        row = frame + m[None, :] + 0 * warp[:, None]
        mask = is_m[None, :] & (warp < _SLOW)[:, None]
        y0 = with_fast(y0, tl.load(row, mask=mask, other=0.0), tile)
        y1 = with_fast(y1, tl.load(row + M, mask=mask, other=0.0), tile)
        y2 = with_fast(y2, tl.load(row + 2 * M, mask=mask, other=0.0), tile)
        y3 = with_fast(y3, tl.load(row + 3 * M, mask=mask, other=0.0), tile)
        y4 = with_fast(y4, tl.load(row + 4 * M, mask=mask, other=0.0), tile)
        y5 = with_fast(y5, tl.load(row + 5 * M, mask=mask, other=0.0), tile)
        y6 = with_fast(y6, tl.load(row + 6 * M, mask=mask, other=0.0), tile)
        last = tl.load(row + 7 * M, mask=mask, other=0.0)
        if IS_STIRRED:
            last += tl.load(direction + _rolled(m, back, M)[None, :] + 0 * warp[:, None], mask=mask, other=0.0)
        y7 = with_fast(y7, last, tile)
    _stored(out, N, n, is_n, y0, y1, y2, y3, y4, y5, y6, y7, 2)


@triton.jit
def _gram_of_frame(frame, direction, back, M, start, stop, IS_STIRRED: tl.constexpr):
    """The share of some of its columns in F F^T."""
    row = tl.arange(0, 8)
    products = tl.zeros((8, 8, _CHUNK), tl.float32)
    for chunk in range(start, stop, _CHUNK):
        m = chunk + tl.arange(0, _CHUNK)
        is_m = m < stop
        mask = is_m[None, :] & (row < 8)[:, None]
        f = tl.load(frame + row[:, None] * M + m[None, :], mask=mask, other=0.0)
        if IS_STIRRED:
            added = tl.load(direction + _rolled(m, back, M), mask=is_m, other=0.0)
            f += tl.where(row[:, None] == 7, added[None, :], 0.0)
        products += f[:, None, :] * f[None, :, :]
    return tl.sum(products, axis=2)


@triton.jit
def _image_and_gram(parts, number, image, N, start, stop):
    """Some columns of Y from their parts, and their share in Y Y^T."""
    row = tl.arange(0, 8)
    products = tl.zeros((8, 8, _CHUNK), tl.float32)
    for chunk in range(start, stop, _CHUNK):
        n = chunk + tl.arange(0, _CHUNK)
        mask = (n < stop)[None, :] & (row < 8)[:, None]
        places = row[:, None] * N + n[None, :]
        y = tl.zeros((8, _CHUNK), tl.float32)
        for first in range(0, number, _PARTS):
            part = first + tl.arange(0, _PARTS)
            at = part[:, None, None] * (8 * N) + places[None, :, :]
            is_part = (part < number)[:, None, None] & mask[None, :, :]
            y += tl.sum(tl.load(parts + at, mask=is_part, other=0.0), axis=0)
        tl.store(image + places, y, mask=mask)
        products += y[:, None, :] * y[None, :, :]
    return tl.sum(products, axis=2)


@triton.jit
def _store_turned(entry, memory, first, stop):
    """Some columns of T Y, and their shares in the squared length of its first row, one for each `WIDE`."""
    row = tl.arange(0, 8)
    N = tl.load(entry + _N).to(tl.int32)
    turn, image, turned = (
        memory + tl.load(entry + _TURN),
        memory + tl.load(entry + _IMAGE),
        rows_at(memory, entry + _TURNED),
    )
    shares = memory + tl.load(entry + _LENGTH)
    for start in range(first, stop, _WIDE):
        n = start + tl.arange(0, _WIDE)
        is_n = n < stop
        mask = is_n[None, :] & (row < 8)[:, None]
        y = tl.load(image + row[:, None] * N + n[None, :], mask=mask, other=0.0)
        for index in tl.static_range(8):
            x = tl.sum(tl.load(turn + 8 * index + row)[:, None] * y, axis=0)
            tl.store(turned + index * N + n, x, mask=is_n)
            if index == 0:
                tl.store(shares + start // _WIDE, tl.sum(x * x, axis=0))


@triton.jit(do_not_specialize=["step"])
def images_kernel(maps, blocks, counters, frames, directions, shifts, step, memory,
                  IS_STIRRED: tl.constexpr, IS_SPLIT: tl.constexpr, DTYPE: tl.constexpr,
                  REVISION: tl.constexpr):  # fmt: skip
    """Y = F A, the turn T, and the next frame T Y: one program for each block of N and part of M.

    T Y is the next frame, unless the frame is complete. ``IS_SPLIT`` leaves it to `turned_kernel`.
    """
    block = blocks + tl.program_id(0) * _BLOCK_WIDTH
    which = tl.load(block)
    entry = maps + which * _WIDTH
    M = tl.load(entry + _M).to(tl.int32)
    direction, back = directions, 0
    if IS_STIRRED:
        direction += tl.load(entry + _DIRECTION)
        back = (tl.load(shifts + which).to(tl.int32) + step) % M
    if tl.load(entry + _FAST_IS_M) != 0:
        width = _ROWS * _SLOW
        if tl.load(entry + _IS_ALIGNED) != 0:
            _image_over_fast(entry, block, frames, direction, back, memory, DTYPE, IS_STIRRED, True)
        else:
            _image_over_fast(entry, block, frames, direction, back, memory, DTYPE, IS_STIRRED, False)
    else:
        width = _FAST
        if tl.load(entry + _IS_ALIGNED) != 0:
            _image_over_slow(entry, block, frames, direction, back, memory, DTYPE, IS_STIRRED, True)
        else:
            _image_over_slow(entry, block, frames, direction, back, memory, DTYPE, IS_STIRRED, False)

    N = tl.load(entry + _N).to(tl.int32)
    parts, num_parts = tl.load(entry + _IMAGE_PARTS), tl.load(entry + _IMAGE_PARTS + 1).to(tl.int32)
    num_blocks = tl.load(entry + _IMAGE_PARTS + 2).to(tl.int32)
    grams = memory + tl.load(entry + _GRAMS)
    start_grams = grams + num_blocks * 64
    frame = frames + tl.load(entry + _FRAME)
    number = tl.load(block + _BLOCK_BLOCK).to(tl.int32)
    if number == 0:
        part = (tl.load(block + _BLOCK_PART) - parts) // (8 * N)
        start, stop = tl.load(block + _BLOCK_START).to(tl.int32), tl.load(block + _BLOCK_STOP).to(tl.int32)
        store_gram(start_grams + part * 64, _gram_of_frame(frame, direction, back, M, start, stop, IS_STIRRED))
    image = memory + tl.load(entry + _IMAGE)
    counter = counters + tl.load(entry + _IMAGE_COUNTERS)
    if is_last(counter + number, num_parts):
        kept_start = tl.load(block + _BLOCK_KEPT_START).to(tl.int32)
        gram = _image_and_gram(memory + parts, num_parts, image, N, kept_start, tl.minimum(kept_start + width, N))
        store_gram(grams + number * 64, gram)
        if is_last(counter + num_blocks, num_blocks):
            turn = memory + tl.load(entry + _TURN)
            store_gram(turn, turn_of(total_gram(start_grams, num_parts), total_gram(grams, num_blocks)))
            if not IS_SPLIT:
                tl.debug_barrier()
                _store_turned(entry, memory, 0, N)
            kept = tl.load(entry + _KEPT)
            if kept >= 0:
                place = tl.arange(0, 64)  # a complete frame has at most eight columns
                is_entry = place < 8 * M
                tl.store(memory + kept + place, tl.load(frame + place, mask=is_entry, other=0.0), mask=is_entry)


@triton.jit
def turned_kernel(maps, spans, memory, REVISION: tl.constexpr):
    """A span of T Y."""
    span = spans + 2 * tl.program_id(0)
    entry = maps + tl.load(span) * _WIDTH
    start = tl.load(span + 1).to(tl.int32)
    _store_turned(entry, memory, start, tl.minimum(start + _WIDE, tl.load(entry + _N).to(tl.int32)))
