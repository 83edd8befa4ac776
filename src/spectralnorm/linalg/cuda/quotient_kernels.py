"""The kernels of `spectralnorm.linalg.cuda.quotients`.

The division does not ask what an entry means: it goes through each weight's memory in pieces. The gradient adds u v^T,
so it goes through the matrix in tiles of its slow and its fast side, as the products of `image_kernels` do; sums go
to memory of their own for each program and are added up in a fixed order. Block sizes are chosen, not measured: a
program of the division has eight 128-bit loads under way in each thread, one of the inner product four, one of the
gradient two, which leaves registers for four programs to a multiprocessor.
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
    "FAST",
    "PIECE",
    "SLOW",
    "STEPS",
    "Call",
    "Entry",
    "Rule",
    "divide_kernel",
    "gradients_kernel",
    "inner_kernel",
]

PIECE = 4096  # entries of a weight that one program divides
SLOW = 8
STEPS = 16  # tiles along the slow side in one program


class Rule(IntEnum):
    """How a weight is divided, as float32."""

    COEFFICIENT = 0
    THRESHOLD = 1  # a norm up to here is not divided by
    CONSTANT = 2  # the divisor then
    WIDTH = 3


class Entry(IntEnum):
    """What the table of weights holds for each, as int64."""

    ADDRESS = 0
    NUMEL = 1
    IS_ALIGNED = 2
    ROWS = 3
    COLUMNS = 4
    ROW_INNER = 5  # three each, as in `Levels`
    COLUMN_INNER = 8
    PLACE_INNER = 11
    FAST_IS_COLUMNS = 14
    PARTS = 15  # where the parts of its inner product are, and their number
    WIDTH = 17


class Call(IntEnum):
    """What the table of a backward pass holds for each weight, as int64."""

    GRAD = 0  # addresses
    MORE = 1  # of what is added to it; 0: nothing
    VALUE = 2
    IS_ALIGNED = 3
    WIDTH = 4


_PIECE = tl.constexpr(PIECE)
_SLOW = tl.constexpr(SLOW)
_FAST = tl.constexpr(FAST)
_STEPS = tl.constexpr(STEPS)
_RULE_COEFFICIENT = tl.constexpr(int(Rule.COEFFICIENT))
_RULE_THRESHOLD = tl.constexpr(int(Rule.THRESHOLD))
_RULE_CONSTANT = tl.constexpr(int(Rule.CONSTANT))
_RULE_WIDTH = tl.constexpr(int(Rule.WIDTH))
_ADDRESS = tl.constexpr(int(Entry.ADDRESS))
_NUMEL = tl.constexpr(int(Entry.NUMEL))
_IS_ALIGNED = tl.constexpr(int(Entry.IS_ALIGNED))
_ROWS = tl.constexpr(int(Entry.ROWS))
_COLUMNS = tl.constexpr(int(Entry.COLUMNS))
_ROW_INNER = tl.constexpr(int(Entry.ROW_INNER))
_COLUMN_INNER = tl.constexpr(int(Entry.COLUMN_INNER))
_PLACE_INNER = tl.constexpr(int(Entry.PLACE_INNER))
_FAST_IS_COLUMNS = tl.constexpr(int(Entry.FAST_IS_COLUMNS))
_PARTS = tl.constexpr(int(Entry.PARTS))
_WIDTH = tl.constexpr(int(Entry.WIDTH))
_CALL_GRAD = tl.constexpr(int(Call.GRAD))
_CALL_MORE = tl.constexpr(int(Call.MORE))
_CALL_VALUE = tl.constexpr(int(Call.VALUE))
_CALL_IS_ALIGNED = tl.constexpr(int(Call.IS_ALIGNED))
_CALL_WIDTH = tl.constexpr(int(Call.WIDTH))


@triton.jit
def _divisor(rules, sigmas, weight):
    """As `divisor_of`: the divisor, and whether it depends on sigma."""
    rule = rules + weight * _RULE_WIDTH
    sigma = tl.load(sigmas + weight)
    is_active = (sigma > tl.load(rule + _RULE_THRESHOLD)) & (sigma < float("inf"))  # false for NaN
    quotient = tl.div_rn(sigma, tl.load(rule + _RULE_COEFFICIENT))
    return tl.where(is_active, quotient, tl.load(rule + _RULE_CONSTANT)), is_active


@triton.jit
def _target(out, field, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Where a weight's result begins."""
    target = (out + tl.load(field)).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        target = tl.multiple_of(target, 16)
    return target


@triton.jit
def _divide_piece(entry, target_field, out, start_field, divisor, DTYPE: tl.constexpr, HAS_NARROW: tl.constexpr,
                  NARROW: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    source = address_at(entry + _ADDRESS, DTYPE, IS_ALIGNED)
    target = _target(out, target_field, DTYPE, IS_ALIGNED)
    start = tl.load(start_field)
    left = tl.load(entry + _NUMEL) - start
    if IS_ALIGNED:
        # Whole pieces only: a mask that may end anywhere would split the loads.
        index = tl.multiple_of(start, _PIECE) + tl.arange(0, _PIECE)
        value = tl.div_rn(tl.load(source + index).to(tl.float32), divisor).to(DTYPE)
        tl.store(target + index, value)
        if HAS_NARROW:
            tl.store(_target(out, target_field + 1, NARROW, True) + index, value.to(NARROW))
    else:
        index = start + tl.arange(0, _PIECE)
        mask = tl.arange(0, _PIECE) < left
        value = tl.div_rn(tl.load(source + index, mask=mask, other=0.0).to(tl.float32), divisor).to(DTYPE)
        tl.store(target + index, value, mask=mask)
        if HAS_NARROW:
            tl.store(_target(out, target_field + 1, NARROW, False) + index, value.to(NARROW), mask=mask)


@triton.jit
def divide_kernel(weights, rules, targets, blocks, sigmas, out,
                  DTYPE: tl.constexpr, HAS_NARROW: tl.constexpr, NARROW: tl.constexpr,
                  REVISION: tl.constexpr):  # fmt: skip
    """A piece of a weight divided, and the same rounded to ``NARROW`` as well."""
    block = blocks + 2 * tl.program_id(0)
    which = tl.load(block)
    start = tl.load(block + 1)
    entry = weights + which * _WIDTH
    divisor, _ = _divisor(rules, sigmas, which)
    target_field = targets + 2 * which
    is_whole = tl.load(entry + _NUMEL) - start >= _PIECE
    if is_whole & (tl.load(entry + _IS_ALIGNED) != 0):
        _divide_piece(entry, target_field, out, block + 1, divisor, DTYPE, HAS_NARROW, NARROW, True)
    else:
        _divide_piece(entry, target_field, out, block + 1, divisor, DTYPE, HAS_NARROW, NARROW, False)


@triton.jit
def _summed(grad, more, at, mask):
    """What came from one or two uses, in float32. ``more`` is null if there was one."""
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if more.to(tl.int64) != 0:
        g += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
    return g


@triton.jit
def _inner_product(entry, call, block, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
                   FAST_IS_COLUMNS: tl.constexpr, IS_ALIGNED: tl.constexpr):  # fmt: skip
    """<G, W'> over one block of the matrix."""
    grad = address_at(call + _CALL_GRAD, GRAD_DTYPE, IS_ALIGNED)
    more = address_at(call + _CALL_MORE, GRAD_DTYPE, IS_ALIGNED)
    value = address_at(call + _CALL_VALUE, DTYPE, IS_ALIGNED)
    fast_size = size_at(entry + (_COLUMNS if FAST_IS_COLUMNS else _ROWS), IS_ALIGNED)
    slow_size = tl.load(entry + (_ROWS if FAST_IS_COLUMNS else _COLUMNS)).to(tl.int32)
    fast_levels = entry + (_COLUMN_INNER if FAST_IS_COLUMNS else _ROW_INNER)
    slow_levels = entry + (_ROW_INNER if FAST_IS_COLUMNS else _COLUMN_INNER)
    fast_inner, fast_outer, fast_stride = levels_at(fast_levels)
    slow_inner, slow_outer = tl.load(slow_levels), tl.load(slow_levels + 1)
    slow_stride = stride_at(slow_levels + 2, IS_ALIGNED)
    first = tl.load(block + 1).to(tl.int32)
    fast = fast_start_at(block + 2) + tl.arange(0, _FAST)
    at_fast = fast_offsets(fast, fast_inner, fast_outer, fast_stride, IS_ALIGNED)
    total = tl.zeros((_SLOW, _FAST), tl.float32)
    for start in range(first, tl.minimum(first + _SLOW * _STEPS, slow_size), _SLOW):
        slow = start + tl.arange(0, _SLOW)
        at = slow_offsets(slow, slow_inner, slow_outer, slow_stride, IS_ALIGNED)[:, None] + at_fast[None, :]
        mask = (slow < slow_size)[:, None] & (fast < fast_size)[None, :]
        total += _summed(grad, more, at, mask) * tl.load(value + at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def inner_kernel(weights, calls, blocks, parts,
                 DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, REVISION: tl.constexpr):  # fmt: skip
    """Parts of <G, W'>: one program for each block."""
    block = blocks + 4 * tl.program_id(0)
    entry = weights + tl.load(block) * _WIDTH
    call = calls + tl.load(block) * _CALL_WIDTH
    part = parts + tl.load(block + 3)
    if tl.load(entry + _FAST_IS_COLUMNS) != 0:
        if tl.load(call + _CALL_IS_ALIGNED) != 0:
            tl.store(part, _inner_product(entry, call, block, DTYPE, GRAD_DTYPE, True, True))
        else:
            tl.store(part, _inner_product(entry, call, block, DTYPE, GRAD_DTYPE, True, False))
    else:
        if tl.load(call + _CALL_IS_ALIGNED) != 0:
            tl.store(part, _inner_product(entry, call, block, DTYPE, GRAD_DTYPE, False, True))
        else:
            tl.store(part, _inner_product(entry, call, block, DTYPE, GRAD_DTYPE, False, False))


@triton.jit
def _gradient(entry, call, block, vectors, ends, targets, out, divisor, is_active, along,
              DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, FAST_IS_COLUMNS: tl.constexpr,
              IS_ALIGNED: tl.constexpr):  # fmt: skip
    """G / d + along u v^T over one block of the matrix."""
    grad = address_at(call + _CALL_GRAD, GRAD_DTYPE, IS_ALIGNED)
    more = address_at(call + _CALL_MORE, GRAD_DTYPE, IS_ALIGNED)
    target = _target(out, targets + tl.load(block), DTYPE, IS_ALIGNED)
    end = ends + 2 * tl.load(block)
    u, v = vectors + tl.load(end), vectors + tl.load(end + 1)
    fast_size = size_at(entry + (_COLUMNS if FAST_IS_COLUMNS else _ROWS), IS_ALIGNED)
    slow_size = tl.load(entry + (_ROWS if FAST_IS_COLUMNS else _COLUMNS)).to(tl.int32)
    fast_levels = entry + (_COLUMN_INNER if FAST_IS_COLUMNS else _ROW_INNER)
    slow_levels = entry + (_ROW_INNER if FAST_IS_COLUMNS else _COLUMN_INNER)
    fast_inner, fast_outer, fast_stride = levels_at(fast_levels)
    slow_inner, slow_outer = tl.load(slow_levels), tl.load(slow_levels + 1)
    slow_stride = stride_at(slow_levels + 2, IS_ALIGNED)
    place_inner, place_outer, place_stride = levels_at(entry + _PLACE_INNER)
    first = tl.load(block + 1).to(tl.int32)
    fast = fast_start_at(block + 2) + tl.arange(0, _FAST)
    at_fast = fast_offsets(fast, fast_inner, fast_outer, fast_stride, IS_ALIGNED)
    if FAST_IS_COLUMNS:
        fast_factor = v + offsets(fast.to(tl.int64), place_inner, place_outer, place_stride)
    else:
        fast_factor = u + fast
    fast_factor = along * tl.load(fast_factor, mask=fast < fast_size, other=0.0)
    reciprocal = 1.0 / divisor
    for start in range(first, tl.minimum(first + _SLOW * _STEPS, slow_size), _SLOW):
        slow = start + tl.arange(0, _SLOW)
        at = slow_offsets(slow, slow_inner, slow_outer, slow_stride, IS_ALIGNED)[:, None] + at_fast[None, :]
        mask = (slow < slow_size)[:, None] & (fast < fast_size)[None, :]
        if FAST_IS_COLUMNS:
            slow_factor = u + slow
        else:
            slow_factor = v + offsets(slow.to(tl.int64), place_inner, place_outer, place_stride)
        slow_factor = tl.load(slow_factor, mask=slow < slow_size, other=0.0)
        g = _summed(grad, more, at, mask) * reciprocal
        # The vectors of a weight without a norm mean nothing, and may be NaN.
        g = tl.where(is_active, g + slow_factor[:, None] * fast_factor[None, :], g)
        tl.store(target + at, g.to(DTYPE), mask=mask)


@triton.jit
def gradients_kernel(weights, rules, targets, calls, blocks, sigmas, vectors, ends, parts, out,
                     DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, REVISION: tl.constexpr):  # fmt: skip
    """The gradient of one block, with the inner product from its parts."""
    block = blocks + 4 * tl.program_id(0)
    which = tl.load(block)
    entry = weights + which * _WIDTH
    call = calls + which * _CALL_WIDTH
    divisor, is_active = _divisor(rules, sigmas, which)
    part = parts + tl.load(entry + _PARTS)
    num_parts = tl.load(entry + _PARTS + 1).to(tl.int32)
    total = tl.zeros((_FAST,), tl.float32)
    for start in range(0, num_parts, _FAST):
        index = start + tl.arange(0, _FAST)
        total += tl.load(part + index, mask=index < num_parts, other=0.0)
    along = tl.where(is_active, -tl.sum(total, axis=0) / tl.load(sigmas + which), 0.0)
    if tl.load(entry + _FAST_IS_COLUMNS) != 0:
        if tl.load(call + _CALL_IS_ALIGNED) != 0:
            _gradient(entry, call, block, vectors, ends, targets, out, divisor, is_active, along, DTYPE, GRAD_DTYPE,
                      True, True)  # fmt: skip
        else:
            _gradient(entry, call, block, vectors, ends, targets, out, divisor, is_active, along, DTYPE, GRAD_DTYPE,
                      True, False)  # fmt: skip
    else:
        if tl.load(call + _CALL_IS_ALIGNED) != 0:
            _gradient(entry, call, block, vectors, ends, targets, out, divisor, is_active, along, DTYPE, GRAD_DTYPE,
                      False, True)  # fmt: skip
        else:
            _gradient(entry, call, block, vectors, ends, targets, out, divisor, is_active, along, DTYPE, GRAD_DTYPE,
                      False, False)  # fmt: skip
