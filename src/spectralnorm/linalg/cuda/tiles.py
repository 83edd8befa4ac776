"""Reading sizes, strides and tiles of matrices: what all kernels share.

A matrix has a slow and a fast side; neighbours in memory lie along the fast one. A tile is always slow x fast.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The bodies are Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

from spectralnorm.linalg.layout import LANES

__all__ = [
    "FAST",
    "address_at",
    "fast_offsets",
    "fast_start_at",
    "levels_at",
    "offsets",
    "size_at",
    "slow_offsets",
    "stride_at",
]

FAST = 128  # entries of a tile along the fast side: 128 bits of float32 for each thread of a warp

_FAST = tl.constexpr(FAST)
_LANES = tl.constexpr(LANES)

# What `Layout.is_aligned` promises is said where the compiler looks for it. A hint sticks to the operation that made
# the value and so reaches all of its uses, and it is lost where the value is an argument or a result of a function. So
# these read what they say something about, and each form of a product reads for itself.


@triton.jit
def levels_at(entry):
    """A `Levels` of the table."""
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def size_at(field, IS_ALIGNED: tl.constexpr):
    """A size of the table."""
    size = tl.load(field).to(tl.int32)
    if IS_ALIGNED:
        size = tl.multiple_of(size, _LANES)
    return size


@triton.jit
def stride_at(field, IS_ALIGNED: tl.constexpr):
    """A stride of the table."""
    stride = tl.load(field)
    if IS_ALIGNED:
        stride = tl.multiple_of(stride, _LANES)
    return stride


@triton.jit
def address_at(field, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """A matrix' address of the table."""
    address = tl.load(field).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def fast_start_at(field):
    """Where a block begins along the fast side."""
    return tl.multiple_of(tl.load(field).to(tl.int32), _FAST)


@triton.jit
def offsets(index, inner, outer_stride, stride):
    """`Levels.offset` of each index; divided in 32 bits, which takes a fraction of the time."""
    index, inner = index.to(tl.int32), inner.to(tl.int32)
    return (index // inner).to(tl.int64) * outer_stride + (index % inner).to(tl.int64) * stride


@triton.jit
def fast_offsets(index, inner, outer_stride, stride, IS_ALIGNED: tl.constexpr):
    """Of indices along the fast side."""
    if IS_ALIGNED:
        return index.to(tl.int64)
    # Threads are ordered by what the compiler believes to be contiguous. Without alignment it joins no loads, so the
    # claim has no effect beyond that where it is not true.
    inner = inner.to(tl.int32)
    outer = (index // inner).to(tl.int64) * outer_stride
    return tl.max_contiguous(outer + (index % inner).to(tl.int64) * stride, _FAST)


@triton.jit
def slow_offsets(index, inner, outer_stride, stride, IS_ALIGNED: tl.constexpr):
    """Of indices along the slow side."""
    if IS_ALIGNED:
        return index.to(tl.int64) * stride
    return offsets(index, inner, outer_stride, stride)
