"""The kernels of `spectralnorm.linalg.cuda.tracking`.

In their words a matrix A has M rows, along which a frame F of eight rows lies, and N columns: Y = F A. For a frame on
the right side that is the transposed matrix, so M counts the columns of the weight's matrix there. A product goes
through the matrix in tiles; which side of a tile is summed over, the slow or the fast one, gives its two forms. A
matrix that is not `Layout.is_aligned` goes through the same code with offsets computed by division and loads of single
entries.

A launch is one product for all matrices and everything that follows from it. Programs leave parts of the product in
memory and count themselves; the last one that has to do with something goes on with it (`_is_last`): first over the
parts of a block of the product, then over the blocks of a matrix. No result depends on which one that is: it adds up
what all have left in a fixed order.

Block sizes come from counting registers, instructions and bytes in flight, not from measurements. A tile of 4 x 128 is
one 128-bit load for each thread of four warps; four are under way at a time. Summed over the slow side, eight partial
sums of a tile's size are kept; over the fast side each thread has a row of each tile, and adds up its four entries
before they go to one of its eight sums for each row. That is about 150 registers, hence three programs to a
multiprocessor of an A100 or H100, with 24 KiB in flight: about what its share of the memory's bandwidth times the
latency asks for. A program that reads 16384 entries makes thousands of programs of a large model, and a few of a small
layer. What comes after the products needs fewer registers than they do.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

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
from spectralnorm.linalg.layout import LANES

__all__ = [
    "ROWS",
    "SLOW",
    "SPAN",
    "WIDE",
    "BlockField",
    "Field",
    "WholeField",
    "ends_kernel",
    "images_kernel",
    "others_kernel",
    "turned_kernel",
    "wholes_kernel",
]

SLOW = 4
ROWS = 4  # times SLOW: rows of a matrix that a program has where it sums over their fast side
SPAN = 256  # entries of a whole vector in one program
WIDE = 512  # entries of vectors: each thread of four warps has four, and all eight rows of them


class Field(IntEnum):
    """What the table of maps holds for each matrix, as int64. Places are entries from the beginning of the memory."""

    ADDRESS = 0
    M = 1  # size of the side where the frame is
    N = 2  # size of the other side
    M_INNER = 3  # three each, as in `Levels`
    N_INNER = 6
    M_PLACE_INNER = 9  # an index' place in the vector that is returned
    N_PLACE_INNER = 12
    IS_ALIGNED = 15
    FAST_IS_M = 16
    FRAME = 17  # where the frame begins among all
    DIRECTION = 18  # where in the directions its own begins
    IMAGE_PARTS = 19  # place of the parts of Y = F A, their number, and that of the blocks of N
    OTHER_PARTS = 22  # of z: the same, with blocks of M
    IMAGE = 25  # place of Y
    GRAMS = 26  # of the shares in Y Y^T, one for each block of N, and after them of those in F F^T, one for each part
    TURN = 27  # of T, 8 x 8
    TURNED = 28  # of T Y
    KEPT = 29  # of a complete frame that stays as it is; else -1
    LENGTH = 30  # of the shares in the squared length of the first row of T Y, one for each `WIDE` of N
    LEAD = 31  # of the vector along N
    OTHER = 32  # of z
    SQUARES = 33  # of the shares in the square of its length, one for each block of M
    END = 34  # of the vector along M
    SIGMA = 35
    IMAGE_COUNTERS = 36  # among all counters: one for each block of N, and one of the matrix
    OTHER_COUNTERS = 37  # for each block of M, and one of the matrix
    WIDTH = 38  # of the table


class BlockField(IntEnum):
    """What the table of programs holds for each of them, as int64."""

    MAP = 0  # which matrix
    KEPT_START = 1  # of the side that is kept
    START = 2  # of the side that is summed over
    STOP = 3
    PART = 4  # place where the sums go
    BLOCK = 5  # number of the block
    WIDTH = 6


class WholeField(IntEnum):
    """What the table of whole vectors holds for each of them, as int64."""

    SIGMAS = 0  # place of the norms of the weight's blocks
    BLOCKS = 1
    SIZE = 2  # of one block's vector
    SOURCE = 3  # place of the first block's
    TARGET = 4  # where it begins among all whole vectors
    IS_STACKED = 5  # whether the blocks follow each other along this vector
    SIGMA = 6  # where the norm goes, before the whole vectors
    WIDTH = 7


_ADDRESS = tl.constexpr(int(Field.ADDRESS))
_M = tl.constexpr(int(Field.M))
_N = tl.constexpr(int(Field.N))
_M_INNER = tl.constexpr(int(Field.M_INNER))
_N_INNER = tl.constexpr(int(Field.N_INNER))
_M_PLACE_INNER = tl.constexpr(int(Field.M_PLACE_INNER))
_N_PLACE_INNER = tl.constexpr(int(Field.N_PLACE_INNER))
_IS_ALIGNED = tl.constexpr(int(Field.IS_ALIGNED))
_FAST_IS_M = tl.constexpr(int(Field.FAST_IS_M))
_FRAME = tl.constexpr(int(Field.FRAME))
_DIRECTION = tl.constexpr(int(Field.DIRECTION))
_IMAGE_PARTS = tl.constexpr(int(Field.IMAGE_PARTS))
_OTHER_PARTS = tl.constexpr(int(Field.OTHER_PARTS))
_IMAGE = tl.constexpr(int(Field.IMAGE))
_GRAMS = tl.constexpr(int(Field.GRAMS))
_TURN = tl.constexpr(int(Field.TURN))
_TURNED = tl.constexpr(int(Field.TURNED))
_KEPT = tl.constexpr(int(Field.KEPT))
_LENGTH = tl.constexpr(int(Field.LENGTH))
_LEAD = tl.constexpr(int(Field.LEAD))
_OTHER = tl.constexpr(int(Field.OTHER))
_SQUARES = tl.constexpr(int(Field.SQUARES))
_END = tl.constexpr(int(Field.END))
_SIGMA = tl.constexpr(int(Field.SIGMA))
_IMAGE_COUNTERS = tl.constexpr(int(Field.IMAGE_COUNTERS))
_OTHER_COUNTERS = tl.constexpr(int(Field.OTHER_COUNTERS))
_WIDTH = tl.constexpr(int(Field.WIDTH))

_BLOCK_MAP = tl.constexpr(int(BlockField.MAP))
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
_LANES = tl.constexpr(LANES)
_THREADS = tl.constexpr(FAST // LANES)
_SPAN = tl.constexpr(SPAN)
_CHUNK = tl.constexpr(64)  # entries of eight rows whose 64 products are in registers at a time
_SHARES = tl.constexpr(16)  # shares of 8 x 8 that are under way at a time
_PARTS = tl.constexpr(8)  # parts of a sum that are under way at a time
_WIDE = tl.constexpr(WIDE)
_SQUARINGS = tl.constexpr(12)
_EPS = tl.constexpr(1.1920928955078125e-07)  # of float32
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _is_last(counter, number):
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
def _rows(memory, place):
    """A frame, whose place the table has."""
    return tl.multiple_of(memory + tl.load(place), 16)


@triton.jit
def _tile(base, slow, is_slow, fast, is_fast):
    """Entries of a matrix in float32, (slow, fast)."""
    mask = is_slow[:, None] & is_fast[None, :]
    return tl.load(base + slow[:, None] + fast[None, :], mask=mask, other=0.0).to(tl.float32)


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
    frame = _rows(frames, entry + _FRAME)
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
        tile0 = _tile(base, slow_offsets(m0, m_inner, m_outer, m_stride, IS_ALIGNED), m0 < m_stop, at_n, is_n)
        tile1 = _tile(base, slow_offsets(m1, m_inner, m_outer, m_stride, IS_ALIGNED), m1 < m_stop, at_n, is_n)
        tile2 = _tile(base, slow_offsets(m2, m_inner, m_outer, m_stride, IS_ALIGNED), m2 < m_stop, at_n, is_n)
        tile3 = _tile(base, slow_offsets(m3, m_inner, m_outer, m_stride, IS_ALIGNED), m3 < m_stop, at_n, is_n)
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
def _with_fast(y, f, tile):
    """Sums of a row's products with a tile whose fast side is summed over: what a thread has becomes one number."""
    return y + tl.sum(tl.reshape(f, (_SLOW, _THREADS, _LANES))[None, :, :, :] * tile, axis=3)


@triton.jit
def _tile_of_rows(base, at_row, is_row, fast, is_fast):
    """Entries of `_ROWS` times `_SLOW` rows of a matrix, (rows, slow, threads, lanes)."""
    return tl.reshape(_tile(base, at_row, is_row, fast, is_fast), (_ROWS, _SLOW, _THREADS, _LANES))


@triton.jit
def _image_over_fast(entry, block, frames, direction, back, memory,
                     DTYPE: tl.constexpr, IS_STIRRED: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Eight rows times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    frame = _rows(frames, entry + _FRAME)
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
        tile = _tile_of_rows(base, at_n, all_n < N, at_m, is_m)
        row = frame + m[None, :] + 0 * warp[:, None]
        mask = is_m[None, :] & (warp < _SLOW)[:, None]
        y0 = _with_fast(y0, tl.load(row, mask=mask, other=0.0), tile)
        y1 = _with_fast(y1, tl.load(row + M, mask=mask, other=0.0), tile)
        y2 = _with_fast(y2, tl.load(row + 2 * M, mask=mask, other=0.0), tile)
        y3 = _with_fast(y3, tl.load(row + 3 * M, mask=mask, other=0.0), tile)
        y4 = _with_fast(y4, tl.load(row + 4 * M, mask=mask, other=0.0), tile)
        y5 = _with_fast(y5, tl.load(row + 5 * M, mask=mask, other=0.0), tile)
        y6 = _with_fast(y6, tl.load(row + 6 * M, mask=mask, other=0.0), tile)
        last = tl.load(row + 7 * M, mask=mask, other=0.0)
        if IS_STIRRED:
            last += tl.load(direction + _rolled(m, back, M)[None, :] + 0 * warp[:, None], mask=mask, other=0.0)
        y7 = _with_fast(y7, last, tile)
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
def _store_gram(place, gram):
    row = tl.arange(0, 8)
    tl.store(place + row[:, None] * 8 + row[None, :], gram)


@triton.jit
def _total_gram(shares, number):
    row = tl.arange(0, 8)
    share = tl.arange(0, _SHARES)[:, None, None]
    place = share * 64 + row[None, :, None] * 8 + row[None, None, :]
    total = tl.zeros((_SHARES, 8, 8), tl.float32)
    for first in range(0, number, _SHARES):
        total += tl.load(shares + first * 64 + place, mask=first + share < number, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _product(left, right):
    """L R^T of (8, 8) matrices: the threads that have parts of a sum are then neighbours."""
    return tl.sum(left[:, None, :] * right[None, :, :], axis=2)


@triton.jit
def _diagonal(matrix):
    index = tl.arange(0, 8)
    return tl.sum(tl.where(index[:, None] == index[None, :], matrix, 0.0), axis=1)


@triton.jit
def _whitening(gram):
    """As `tracking._whitening`: Cholesky's factor, column by column, and at once its inverse."""
    row = tl.arange(0, 8)[:, None]
    column = tl.arange(0, 8)[None, :]
    lengths = _diagonal(gram)
    scale = tl.where(lengths > _TINY, tl.rsqrt(lengths), 0.0)
    rest = gram * scale[:, None] * scale[None, :] + tl.where(row == column, 64 * _EPS, 0.0)
    white = tl.where(row == column, scale[:, None], 0.0)
    for index in tl.static_range(8):
        pivot = tl.sum(tl.sum(tl.where((row == index) & (column == index), rest, 0.0), axis=1), axis=0)
        below = tl.sum(tl.where((column == index) & (row > index), rest, 0.0), axis=1) / pivot
        white_row = tl.sum(tl.where(row == index, white, 0.0), axis=0)
        rest_row = tl.sum(tl.where(row == index, rest, 0.0), axis=0)
        rest -= below[:, None] * rest_row[None, :]
        white -= below[:, None] * white_row[None, :]
        # So far the factor has a unit diagonal: row and column of this index still lack 1 / sqrt(pivot).
        white = tl.where(row == index, white * tl.rsqrt(pivot), white)
    return white


@triton.jit
def _reflection(gram):
    """As `tracking._ritz_reflection`."""
    row = tl.arange(0, 8)
    power = gram
    for _ in range(_SQUARINGS // 3):
        # Three times squared, the largest of eight values whose sum is one is above 2^-24.
        trace = tl.sum(_diagonal(power), axis=0)
        power = power / tl.maximum(trace, _TINY)
        power = _product(power, power)
        power = _product(power, power)
        power = _product(power, power)
    # NaN is not the largest here, so that there is one; the vectors come out as NaN all the same.
    diagonal = _diagonal(power)
    largest = tl.argmax(tl.where(diagonal == diagonal, diagonal, 0.0), axis=0)
    column = tl.sum(tl.where(row[None, :] == largest, power, 0.0), axis=1)
    column = column / tl.maximum(tl.sqrt(tl.sum(column * column, axis=0)), _TINY)
    head = tl.sum(tl.where(row == 0, column, 0.0), axis=0)
    normal = tl.where(head > 0, -column, column) - tl.where(row == 0, 1.0, 0.0)
    normal = normal / tl.sqrt(tl.sum(normal * normal, axis=0))
    return tl.where(row[:, None] == row[None, :], 1.0, 0.0) - 2 * normal[:, None] * normal[None, :]


@triton.jit
def _turn(start_gram, image_gram):
    """As `tracking._ritz_turns`."""
    row = tl.arange(0, 8)
    white = _whitening(start_gram)
    turn = _product(_reflection(_product(_product(white, image_gram), white)), tl.trans(white))
    lengths = tl.sum(_product(turn, image_gram) * turn, axis=1)
    longest = tl.sum(tl.where(row == 0, lengths, 0.0), axis=0)
    return turn * tl.rsqrt(tl.maximum(lengths, _EPS * longest + _TINY))[:, None]


@triton.jit
def _store_turned(entry, memory, first, stop):
    """Some columns of T Y, and their shares in the squared length of its first row, one for each `WIDE`."""
    row = tl.arange(0, 8)
    N = tl.load(entry + _N).to(tl.int32)
    turn, image, turned = (
        memory + tl.load(entry + _TURN),
        memory + tl.load(entry + _IMAGE),
        _rows(memory, entry + _TURNED),
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
        _store_gram(start_grams + part * 64, _gram_of_frame(frame, direction, back, M, start, stop, IS_STIRRED))
    image = memory + tl.load(entry + _IMAGE)
    counter = counters + tl.load(entry + _IMAGE_COUNTERS)
    if _is_last(counter + number, num_parts):
        kept_start = tl.load(block + _BLOCK_KEPT_START).to(tl.int32)
        gram = _image_and_gram(memory + parts, num_parts, image, N, kept_start, tl.minimum(kept_start + width, N))
        _store_gram(grams + number * 64, gram)
        if _is_last(counter + num_blocks, num_blocks):
            turn = memory + tl.load(entry + _TURN)
            _store_gram(turn, _turn(_total_gram(start_grams, num_parts), _total_gram(grams, num_blocks)))
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


@triton.jit
def _other_over_slow(entry, block, memory, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its slow side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = _rows(memory, entry + _TURNED)
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
        tile0 = _tile(base, slow_offsets(n0, n_inner, n_outer, n_stride, IS_ALIGNED), n0 < n_stop, at_m, is_m)
        tile1 = _tile(base, slow_offsets(n1, n_inner, n_outer, n_stride, IS_ALIGNED), n1 < n_stop, at_m, is_m)
        tile2 = _tile(base, slow_offsets(n2, n_inner, n_outer, n_stride, IS_ALIGNED), n2 < n_stop, at_m, is_m)
        tile3 = _tile(base, slow_offsets(n3, n_inner, n_outer, n_stride, IS_ALIGNED), n3 < n_stop, at_m, is_m)
        z0 += tl.load(lead + n0, mask=n0 < n_stop, other=0.0)[:, None] * tile0
        z1 += tl.load(lead + n1, mask=n1 < n_stop, other=0.0)[:, None] * tile1
        z2 += tl.load(lead + n2, mask=n2 < n_stop, other=0.0)[:, None] * tile2
        z3 += tl.load(lead + n3, mask=n3 < n_stop, other=0.0)[:, None] * tile3
    tl.store(out + m, tl.sum((z0 + z1) + (z2 + z3), axis=0), mask=is_m)


@triton.jit
def _other_over_fast(entry, block, memory, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = _rows(memory, entry + _TURNED)
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
        tile = _tile_of_rows(base, at_m, all_m < M, at_n, is_n)
        mask = is_n[None, :] & (warp < _SLOW)[:, None]
        z = _with_fast(z, tl.load(lead + n[None, :] + 0 * warp[:, None], mask=mask, other=0.0), tile)
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
    if _is_last(counter + number, num_parts):
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
            if _is_last(counter + num_blocks, num_blocks):
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
