"""The kernels of `spectralnorm.linalg.cuda.tracking`.

In their words a matrix A has M rows, along which a frame F of eight rows lies, and N columns: Y = F A. For a frame on
the right side that is the transposed matrix, so M counts the columns of the weight's matrix there. A product goes
through the matrix in tiles; which side of a tile is summed over, the slow or the fast one, gives its two forms. A
matrix that is not `Layout.is_aligned` goes through the same code with offsets computed by division and loads of single
entries.

No result depends on the order in which programs run: what several programs contribute to goes to memory of its own for
each and is added up in a fixed order by the next kernel.

Block sizes come from counting registers and bytes in flight, not from measurements. A tile of 4 x 128 is one 128-bit
load for each thread of four warps. Summed over the slow side, four tiles are under way at a time and eight partial sums
of a tile's size are kept; over the fast side two tiles and sixteen sums, because there each thread needs sums for each
row. That is about 150 registers, hence three programs to a multiprocessor of an A100 or H100, with 12 to 24 KiB in
flight: about what its share of the memory's bandwidth times the latency asks for. A program that reads 16384 entries
makes thousands of programs of a large model, and one or two of a small layer.
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

__all__ = [
    "SLOW",
    "SPAN",
    "Field",
    "WholeField",
    "frames_kernel",
    "grams_kernel",
    "images_kernel",
    "others_kernel",
    "sums_kernel",
    "turns_kernel",
    "vectors_kernel",
    "wholes_kernel",
]

SLOW = 4
SPAN = 256  # entries of a vector in one program of the kernels that do not read a matrix


class Field(IntEnum):
    """What the table of maps holds for each matrix, as int64."""

    ADDRESS = 0
    M = 1  # size of the side where the frame is
    N = 2  # size of the other side
    M_INNER = 3  # three each, as in `Levels`
    N_INNER = 6
    M_PLACE_INNER = 9  # an index' place in the vector that is returned
    N_PLACE_INNER = 12
    IS_ALIGNED = 15
    FAST_IS_M = 16
    M_BEFORE = 17  # entries of all vectors of earlier matrices
    N_BEFORE = 18
    M_SPANS = 19  # first span and their number
    N_SPANS = 21
    IMAGE_PARTS = 23  # where the parts of Y are, and their number
    OTHER_PARTS = 25  # of z
    DIRECTION = 27  # where in the directions its own begins
    TURNED = 28  # where T Y goes, in eights
    KEPT = 29  # where a complete frame goes that stays as it is, in eights; else -1
    WIDTH = 30  # of the table


class WholeField(IntEnum):
    """What the table of whole vectors holds for each of them, as int64."""

    FIRST = 0  # of the weight's blocks among all matrices
    BLOCKS = 1
    SIZE = 2  # of one block's vector
    SOURCE = 3  # where the first block's begins
    TARGET = 4
    IS_STACKED = 5  # whether the blocks follow each other along this vector
    WEIGHT = 6
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
_M_BEFORE = tl.constexpr(int(Field.M_BEFORE))
_N_BEFORE = tl.constexpr(int(Field.N_BEFORE))
_M_SPANS = tl.constexpr(int(Field.M_SPANS))
_N_SPANS = tl.constexpr(int(Field.N_SPANS))
_IMAGE_PARTS = tl.constexpr(int(Field.IMAGE_PARTS))
_OTHER_PARTS = tl.constexpr(int(Field.OTHER_PARTS))
_DIRECTION = tl.constexpr(int(Field.DIRECTION))
_TURNED = tl.constexpr(int(Field.TURNED))
_KEPT = tl.constexpr(int(Field.KEPT))
_WIDTH = tl.constexpr(int(Field.WIDTH))

_WHOLE_FIRST = tl.constexpr(int(WholeField.FIRST))
_WHOLE_BLOCKS = tl.constexpr(int(WholeField.BLOCKS))
_WHOLE_SIZE = tl.constexpr(int(WholeField.SIZE))
_WHOLE_SOURCE = tl.constexpr(int(WholeField.SOURCE))
_WHOLE_TARGET = tl.constexpr(int(WholeField.TARGET))
_WHOLE_IS_STACKED = tl.constexpr(int(WholeField.IS_STACKED))
_WHOLE_WEIGHT = tl.constexpr(int(WholeField.WEIGHT))
_WHOLE_WIDTH = tl.constexpr(int(WholeField.WIDTH))

_SLOW = tl.constexpr(SLOW)
_FAST = tl.constexpr(FAST)
_SPAN = tl.constexpr(SPAN)
_CHUNK = tl.constexpr(64)  # entries of eight rows whose 64 products are in registers at a time
_SQUARINGS = tl.constexpr(12)
_EPS = tl.constexpr(1.1920928955078125e-07)  # of float32
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _frame(frames, field):
    """A frame among all, by the entries of all vectors before it."""
    return tl.multiple_of(frames + 8 * tl.load(field), 16)


@triton.jit
def _tile(base, slow, is_slow, fast, is_fast):
    """Entries of a matrix in float32, (slow, fast)."""
    mask = is_slow[:, None] & is_fast[None, :]
    return tl.load(base + slow[:, None] + fast[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _stirred(last, direction, back, m, M, mask):
    """The last row of a frame plus the direction, rolled."""
    rolled = m - back
    rolled = tl.where(rolled < 0, rolled + M, rolled)
    return last + tl.load(direction + rolled, mask=mask, other=0.0)


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
        last = _stirred(last, direction, back, m, M, is_m)
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
def _image_over_slow(entry, block, frames, direction, back, parts,
                     DTYPE: tl.constexpr, IS_STIRRED: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Eight rows times a part of a matrix, summed over its slow side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    frame = _frame(frames, entry + _M_BEFORE)
    M = tl.load(entry + _M).to(tl.int32)
    N = size_at(entry + _N, IS_ALIGNED)
    m_inner, m_outer = tl.load(entry + _M_INNER), tl.load(entry + _M_INNER + 1)
    m_stride = stride_at(entry + _M_INNER + 2, IS_ALIGNED)
    n_inner, n_outer, n_stride = levels_at(entry + _N_INNER)
    n = fast_start_at(block + 1) + tl.arange(0, _FAST)
    m_start, m_stop = tl.load(block + 2).to(tl.int32), tl.load(block + 3).to(tl.int32)
    out = parts + tl.load(block + 4)
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
def _image_over_fast(entry, block, frames, direction, back, parts,
                     DTYPE: tl.constexpr, IS_STIRRED: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Eight rows times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    frame = _frame(frames, entry + _M_BEFORE)
    M = size_at(entry + _M, IS_ALIGNED)
    N = tl.load(entry + _N).to(tl.int32)
    m_inner, m_outer, m_stride = levels_at(entry + _M_INNER)
    n_inner, n_outer = tl.load(entry + _N_INNER), tl.load(entry + _N_INNER + 1)
    n_stride = stride_at(entry + _N_INNER + 2, IS_ALIGNED)
    m_start = fast_start_at(block + 2)
    m_stop = size_at(block + 3, IS_ALIGNED)
    out = parts + tl.load(block + 4)
    # Each of the SLOW rows of a tile loads the frame for itself: a vector that all share would have to be passed round
    # the threads through shared memory.
    row = tl.arange(0, _SLOW)
    n = tl.load(block + 1).to(tl.int32) + row
    next_n = n + _SLOW
    at_n = slow_offsets(n, n_inner, n_outer, n_stride, IS_ALIGNED)
    at_next_n = slow_offsets(next_n, n_inner, n_outer, n_stride, IS_ALIGNED)
    y0 = tl.zeros((_SLOW, _FAST), tl.float32)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    x0, x1, x2, x3, x4, x5, x6, x7 = y0, y0, y0, y0, y0, y0, y0, y0
    for start in range(m_start, m_stop, _FAST):
        m = start + tl.arange(0, _FAST)
        is_m = m < m_stop
        at_m = fast_offsets(m, m_inner, m_outer, m_stride, IS_ALIGNED)
        y = _tile(base, at_n, n < N, at_m, is_m)
        x = _tile(base, at_next_n, next_n < N, at_m, is_m)
        ms = m[None, :] + 0 * row[:, None]
        mask = is_m[None, :] & (row < _SLOW)[:, None]
        f = tl.load(frame + ms, mask=mask, other=0.0)
        y0, x0 = y0 + f * y, x0 + f * x
        f = tl.load(frame + M + ms, mask=mask, other=0.0)
        y1, x1 = y1 + f * y, x1 + f * x
        f = tl.load(frame + 2 * M + ms, mask=mask, other=0.0)
        y2, x2 = y2 + f * y, x2 + f * x
        f = tl.load(frame + 3 * M + ms, mask=mask, other=0.0)
        y3, x3 = y3 + f * y, x3 + f * x
        f = tl.load(frame + 4 * M + ms, mask=mask, other=0.0)
        y4, x4 = y4 + f * y, x4 + f * x
        f = tl.load(frame + 5 * M + ms, mask=mask, other=0.0)
        y5, x5 = y5 + f * y, x5 + f * x
        f = tl.load(frame + 6 * M + ms, mask=mask, other=0.0)
        y6, x6 = y6 + f * y, x6 + f * x
        f = tl.load(frame + 7 * M + ms, mask=mask, other=0.0)
        if IS_STIRRED:
            f = _stirred(f, direction, back, ms, M, mask)
        y7, x7 = y7 + f * y, x7 + f * x
    _stored(out, N, n, n < N, y0, y1, y2, y3, y4, y5, y6, y7, 1)
    _stored(out, N, next_n, next_n < N, x0, x1, x2, x3, x4, x5, x6, x7, 1)


@triton.jit(do_not_specialize=["step"])
def images_kernel(maps, blocks, frames, directions, shifts, step, parts,
                  IS_STIRRED: tl.constexpr, DTYPE: tl.constexpr, REVISION: tl.constexpr):  # fmt: skip
    """Parts of Y = F A: one program for each block of N and part of M."""
    block = blocks + tl.program_id(0) * 5
    which = tl.load(block)
    entry = maps + which * _WIDTH
    direction = directions + tl.load(entry + _DIRECTION)
    back = ((tl.load(shifts + which) + step) % tl.load(entry + _M)).to(tl.int32)
    if tl.load(entry + _FAST_IS_M) != 0:
        if tl.load(entry + _IS_ALIGNED) != 0:
            _image_over_fast(entry, block, frames, direction, back, parts, DTYPE, IS_STIRRED, True)
        else:
            _image_over_fast(entry, block, frames, direction, back, parts, DTYPE, IS_STIRRED, False)
    else:
        if tl.load(entry + _IS_ALIGNED) != 0:
            _image_over_slow(entry, block, frames, direction, back, parts, DTYPE, IS_STIRRED, True)
        else:
            _image_over_slow(entry, block, frames, direction, back, parts, DTYPE, IS_STIRRED, False)


@triton.jit(do_not_specialize=["step", "num_image_spans"])
def grams_kernel(maps, spans, num_image_spans, frames, directions, shifts, step, parts, images, grams,
                 IS_STIRRED: tl.constexpr, REVISION: tl.constexpr):  # fmt: skip
    """Y from its parts; the shares of spans of Y in Y Y^T, and of spans of F in F F^T."""
    span = tl.program_id(0)
    which = tl.load(spans + 2 * span)
    start = tl.load(spans + 2 * span + 1).to(tl.int32)
    entry = maps + which * _WIDTH
    M = tl.load(entry + _M).to(tl.int32)
    N = tl.load(entry + _N).to(tl.int32)
    row = tl.arange(0, 8)
    gram = tl.zeros((8, 8), tl.float32)
    if span < num_image_spans:
        first_part = parts + tl.load(entry + _IMAGE_PARTS)
        num_parts = tl.load(entry + _IMAGE_PARTS + 1).to(tl.int32)
        image = images + 8 * tl.load(entry + _N_BEFORE)
        for chunk in range(start, tl.minimum(start + _SPAN, N), _CHUNK):
            n = chunk + tl.arange(0, _CHUNK)
            mask = (n < N)[None, :] & (row < 8)[:, None]
            places = row[:, None] * N + n[None, :]
            y = tl.zeros((8, _CHUNK), tl.float32)
            part = first_part
            for _ in range(0, num_parts):
                y += tl.load(part + places, mask=mask, other=0.0)
                part += 8 * N
            tl.store(image + places, y, mask=mask)
            gram += tl.sum(y[:, None, :] * y[None, :, :], axis=2)
    else:
        frame = frames + 8 * tl.load(entry + _M_BEFORE)
        direction = directions + tl.load(entry + _DIRECTION)
        back = ((tl.load(shifts + which) + step) % M).to(tl.int32)
        for chunk in range(start, tl.minimum(start + _SPAN, M), _CHUNK):
            m = chunk + tl.arange(0, _CHUNK)
            is_m = m < M
            mask = is_m[None, :] & (row < 8)[:, None]
            f = tl.load(frame + row[:, None] * M + m[None, :], mask=mask, other=0.0)
            if IS_STIRRED:
                f += tl.where(
                    row[:, None] == 7,
                    _stirred(tl.zeros((_CHUNK,), tl.float32), direction, back, m, M, is_m)[None, :],
                    0.0,
                )
            gram += tl.sum(f[:, None, :] * f[None, :, :], axis=2)
    tl.store(grams + span * 64 + row[:, None] * 8 + row[None, :], gram)


@triton.jit
def _product(left, right):
    """Of (8, 8) matrices."""
    return tl.sum(left[:, :, None] * right[None, :, :], axis=1)


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
    for _ in range(_SQUARINGS):
        trace = tl.sum(_diagonal(power), axis=0)
        power = power / tl.maximum(trace, _TINY)
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
def _total_gram(grams, first, number):
    row = tl.arange(0, 8)
    total = tl.zeros((8, 8), tl.float32)
    for index in range(first, first + number):
        total += tl.load(grams + index * 64 + row[:, None] * 8 + row[None, :])
    return total


@triton.jit
def turns_kernel(maps, grams, turns, REVISION: tl.constexpr):
    """As `tracking._ritz_turns`: one program for each matrix."""
    which = tl.program_id(0)
    entry = maps + which * _WIDTH
    start_gram = _total_gram(grams, tl.load(entry + _M_SPANS).to(tl.int32), tl.load(entry + _M_SPANS + 1).to(tl.int32))
    image_gram = _total_gram(grams, tl.load(entry + _N_SPANS).to(tl.int32), tl.load(entry + _N_SPANS + 1).to(tl.int32))
    row = tl.arange(0, 8)
    white = _whitening(start_gram)
    turn = _product(_reflection(_product(_product(white, image_gram), tl.trans(white))), white)
    lengths = tl.sum(_product(turn, image_gram) * turn, axis=1)
    longest = tl.sum(tl.where(row == 0, lengths, 0.0), axis=0)
    turn = turn * tl.rsqrt(tl.maximum(lengths, _EPS * longest + _TINY))[:, None]
    tl.store(turns + which * 64 + row[:, None] * 8 + row[None, :], turn)


@triton.jit
def frames_kernel(maps, spans, images, turns, frames, next_frames, squares, REVISION: tl.constexpr):
    """The turned frame T Y, and the shares of spans in the square of its first row's length.

    T Y is the next frame, unless the frame is complete.
    """
    span = tl.program_id(0)
    which = tl.load(spans + 2 * span)
    entry = maps + which * _WIDTH
    N = tl.load(entry + _N).to(tl.int32)
    n = tl.load(spans + 2 * span + 1).to(tl.int32) + tl.arange(0, _SPAN)
    is_n = n < N
    row = tl.arange(0, 8)
    before = 8 * tl.load(entry + _N_BEFORE)
    rows = tl.zeros((8, _SPAN), tl.float32)
    for index in tl.static_range(8):
        factor = tl.load(turns + which * 64 + row * 8 + index)
        rows += factor[:, None] * tl.load(images + before + index * N + n, mask=is_n, other=0.0)[None, :]
    turned = next_frames + 8 * tl.load(entry + _TURNED)
    tl.store(turned + row[:, None] * N + n[None, :], rows, mask=is_n[None, :] & (row < 8)[:, None])
    first = tl.sum(tl.where(row[:, None] == 0, rows, 0.0), axis=0)
    tl.store(squares + span, tl.sum(first * first, axis=0))
    kept = tl.load(entry + _KEPT)
    if (kept >= 0) & (tl.load(spans + 2 * span + 1) == 0):
        place = tl.arange(0, 64)  # a complete frame has at most eight columns
        is_entry = place < 8 * tl.load(entry + _M)
        frame = tl.load(frames + 8 * tl.load(entry + _M_BEFORE) + place, mask=is_entry, other=0.0)
        tl.store(next_frames + 8 * kept + place, frame, mask=is_entry)


@triton.jit
def _other_over_slow(entry, block, frames, parts, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its slow side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = _frame(frames, entry + _TURNED)
    M = size_at(entry + _M, IS_ALIGNED)
    m_inner, m_outer, m_stride = levels_at(entry + _M_INNER)
    n_inner, n_outer = tl.load(entry + _N_INNER), tl.load(entry + _N_INNER + 1)
    n_stride = stride_at(entry + _N_INNER + 2, IS_ALIGNED)
    m = fast_start_at(block + 1) + tl.arange(0, _FAST)
    n_start, n_stop = tl.load(block + 2).to(tl.int32), tl.load(block + 3).to(tl.int32)
    out = parts + tl.load(block + 4)
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
def _other_over_fast(entry, block, frames, parts, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The first row of a frame times a part of a matrix, summed over its fast side."""
    base = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    lead = _frame(frames, entry + _TURNED)
    M = tl.load(entry + _M).to(tl.int32)
    m_inner, m_outer = tl.load(entry + _M_INNER), tl.load(entry + _M_INNER + 1)
    m_stride = stride_at(entry + _M_INNER + 2, IS_ALIGNED)
    n_inner, n_outer, n_stride = levels_at(entry + _N_INNER)
    n_start = fast_start_at(block + 2)
    n_stop = size_at(block + 3, IS_ALIGNED)
    out = parts + tl.load(block + 4)
    row = tl.arange(0, _SLOW)
    m = tl.load(block + 1).to(tl.int32) + row
    next_m = m + _SLOW
    at_m = slow_offsets(m, m_inner, m_outer, m_stride, IS_ALIGNED)
    at_next_m = slow_offsets(next_m, m_inner, m_outer, m_stride, IS_ALIGNED)
    z = tl.zeros((_SLOW, _FAST), tl.float32)
    next_z = z
    for start in range(n_start, n_stop, _FAST):
        n = start + tl.arange(0, _FAST)
        is_n = n < n_stop
        at_n = fast_offsets(n, n_inner, n_outer, n_stride, IS_ALIGNED)
        tile = _tile(base, at_m, m < M, at_n, is_n)
        next_tile = _tile(base, at_next_m, next_m < M, at_n, is_n)
        x = tl.load(lead + n[None, :] + 0 * row[:, None], mask=is_n[None, :] & (row < _SLOW)[:, None], other=0.0)
        z += x * tile
        next_z += x * next_tile
    tl.store(out + m, tl.sum(z, axis=1), mask=m < M)
    tl.store(out + next_m, tl.sum(next_z, axis=1), mask=next_m < M)


@triton.jit
def others_kernel(maps, blocks, frames, parts, DTYPE: tl.constexpr, REVISION: tl.constexpr):
    """Parts of z = A x for the frame's first row x: one program for each block of M and part of N."""
    block = blocks + tl.program_id(0) * 5
    entry = maps + tl.load(block) * _WIDTH
    if tl.load(entry + _FAST_IS_M) != 0:
        if tl.load(entry + _IS_ALIGNED) != 0:
            _other_over_slow(entry, block, frames, parts, DTYPE, True)
        else:
            _other_over_slow(entry, block, frames, parts, DTYPE, False)
    else:
        if tl.load(entry + _IS_ALIGNED) != 0:
            _other_over_fast(entry, block, frames, parts, DTYPE, True)
        else:
            _other_over_fast(entry, block, frames, parts, DTYPE, False)


@triton.jit(do_not_specialize=["first_span"])
def sums_kernel(maps, spans, first_span, parts, others, squares, REVISION: tl.constexpr):
    """z from its parts, and the shares of spans in the square of its length."""
    span = first_span + tl.program_id(0)
    entry = maps + tl.load(spans + 2 * span) * _WIDTH
    M = tl.load(entry + _M).to(tl.int32)
    m = tl.load(spans + 2 * span + 1).to(tl.int32) + tl.arange(0, _SPAN)
    is_m = m < M
    part = parts + tl.load(entry + _OTHER_PARTS)
    z = tl.zeros((_SPAN,), tl.float32)
    for _ in range(0, tl.load(entry + _OTHER_PARTS + 1).to(tl.int32)):
        z += tl.load(part + m, mask=is_m, other=0.0)
        part += M
    tl.store(others + tl.load(entry + _M_BEFORE) + m, z, mask=is_m)
    tl.store(squares + span, tl.sum(z * z, axis=0))


@triton.jit
def _length(squares, range_of_spans):
    first = tl.load(range_of_spans).to(tl.int32)
    stop = first + tl.load(range_of_spans + 1).to(tl.int32)
    total = 0.0
    for start in range(first, stop, 32):
        index = start + tl.arange(0, 32)
        total += tl.sum(tl.load(squares + index, mask=index < stop, other=0.0), axis=0)
    return tl.sqrt_rn(total)


@triton.jit
def _at_least(value, bound):
    """As `clamp_min`: NaN stays."""
    return tl.where(value < bound, bound, value)


@triton.jit(do_not_specialize=["num_lead_spans"])
def vectors_kernel(
    maps, spans, num_lead_spans, frames, others, squares, leads, ends, sigmas, eps, REVISION: tl.constexpr
):
    """Both vectors at unit length and in the tensor's order, and sigma."""
    span = tl.program_id(0)
    which = tl.load(spans + 2 * span)
    start = tl.load(spans + 2 * span + 1).to(tl.int32)
    entry = maps + which * _WIDTH
    length = _at_least(_length(squares, entry + _N_SPANS), eps)
    index = start + tl.arange(0, _SPAN)
    if span < num_lead_spans:
        mask = index < tl.load(entry + _N).to(tl.int32)
        before = tl.load(entry + _N_BEFORE)
        inner, outer, stride = levels_at(entry + _N_PLACE_INNER)
        x = tl.load(frames + 8 * tl.load(entry + _TURNED) + index, mask=mask, other=0.0)
        tl.store(leads + before + offsets(index.to(tl.int64), inner, outer, stride), x / length, mask=mask)
    else:
        mask = index < tl.load(entry + _M).to(tl.int32)
        before = tl.load(entry + _M_BEFORE)
        inner, outer, stride = levels_at(entry + _M_PLACE_INNER)
        sigma = _length(squares, entry + _M_SPANS) / length
        z = tl.load(others + before + index, mask=mask, other=0.0) / length
        z = z / _at_least(sigma, eps)
        tl.store(ends + before + offsets(index.to(tl.int64), inner, outer, stride), z, mask=mask)
        if start == 0:
            tl.store(sigmas + which, sigma)


@triton.jit
def wholes_kernel(table, spans, vectors, sigmas, wholes, whole_sigmas, REVISION: tl.constexpr):
    """The vectors of each weight's largest block among zeros: one program for each span of a whole vector."""
    span = spans + 2 * tl.program_id(0)
    entry = table + tl.load(span) * _WHOLE_WIDTH
    start = tl.load(span + 1).to(tl.int32)
    first = tl.load(entry + _WHOLE_FIRST)
    num_blocks = tl.load(entry + _WHOLE_BLOCKS).to(tl.int32)
    # Of equal ones the first, and NaN before any number, as torch.argmax has it.
    best = tl.load(sigmas + first)
    largest = 0
    for index in range(1, num_blocks):
        sigma = tl.load(sigmas + first + index)
        is_larger = (best == best) & ((sigma > best) | (sigma != sigma))
        best = tl.where(is_larger, sigma, best)
        largest = tl.where(is_larger, index, largest)
    size = tl.load(entry + _WHOLE_SIZE).to(tl.int32)
    is_stacked = tl.load(entry + _WHOLE_IS_STACKED) != 0
    total = tl.where(is_stacked, size * num_blocks, size)
    index = start + tl.arange(0, _SPAN)
    own = tl.where(is_stacked, index, largest * size + index)
    value = tl.load(vectors + tl.load(entry + _WHOLE_SOURCE) + own, mask=index < total, other=0.0)
    value = tl.where(is_stacked & (index // size != largest), 0.0, value)
    tl.store(wholes + tl.load(entry + _WHOLE_TARGET) + index, value, mask=index < total)
    if start == 0:  # both vectors of a weight come here, and say the same
        tl.store(whole_sigmas + tl.load(entry + _WHOLE_WEIGHT), best)
