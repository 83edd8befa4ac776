"""The small algebra between the two products: from the products of a frame's rows to the turn of the next frame."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["store_gram", "total_gram", "turn_of"]

_SHARES = tl.constexpr(16)  # shares of 8 x 8 that are under way at a time
_SQUARINGS = tl.constexpr(12)
_EPS = tl.constexpr(1.1920928955078125e-07)  # of float32
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def store_gram(place, gram):
    """An 8 x 8 matrix to where it belongs."""
    row = tl.arange(0, 8)
    tl.store(place + row[:, None] * 8 + row[None, :], gram)


@triton.jit
def total_gram(shares, number):
    """The sum of 8 x 8 matrices that follow each other in memory."""
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
def turn_of(start_gram, image_gram):
    """As `tracking._ritz_turns`."""
    row = tl.arange(0, 8)
    white = _whitening(start_gram)
    turn = _product(_reflection(_product(_product(white, image_gram), white)), tl.trans(white))
    lengths = tl.sum(_product(turn, image_gram) * turn, axis=1)
    longest = tl.sum(tl.where(row == 0, lengths, 0.0), axis=0)
    return turn * tl.rsqrt(tl.maximum(lengths, longest * _EPS + _TINY))[:, None]
