"""Where the entries of a matrix lie in memory: what a kernel needs to know of a weight beside its address.

The columns of a weight's matrix are several dimensions of the weight. In the order in which they lie in memory they
are one run with one stride (a dense weight, ``channels_last`` or not), or runs at regular distances (a transposed
convolution: its outputs lie between its inputs and its kernel). So two levels of strides are enough, and no weight of a
usual layer is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["LANES", "Layout", "Levels", "is_dense", "layout_of"]

# Entries of a 128-bit load of float32. Sizes and strides that it divides allow such loads in the aligned variants.
LANES = 4
_ADDRESS_BYTES = 16


class Levels(NamedTuple):
    """Offsets of indices: ``(index // inner) * outer_stride + (index % inner) * stride``."""

    inner: int
    outer_stride: int
    stride: int

    def offset(self, index: int) -> int:
        """That of one index, in entries."""
        return index // self.inner * self.outer_stride + index % self.inner * self.stride


class Layout(NamedTuple):
    """A batch of matrices in memory.

    Attributes:
        batch: number of matrices.
        rows: of each.
        columns: of each; their index runs in the order of the memory.
        batch_stride: entries from one matrix to the next.
        row_levels: where rows lie.
        column_levels: where columns lie.
        column_places: a column's index in the order in which the tensor has them.
        fast_is_columns: whether neighbours in memory are neighbours in a row, not in a column.
        is_aligned: whether all runs along the fast side start at multiples of 16 bytes and have a multiple of four
            entries.
    """

    batch: int
    rows: int
    columns: int
    batch_stride: int
    row_levels: Levels
    column_levels: Levels
    column_places: Levels
    fast_is_columns: bool
    is_aligned: bool


def layout_of(matrices: Tensor) -> Layout:
    """The layout of ``matrices``.

    Args:
        matrices: (batch, out, *columns): a view of the weight with any number of column dimensions.

    Raises:
        ValueError: there are fewer than three dimensions or no entries, or the columns need more than two levels of
            strides; a contiguous copy does not.
    """
    if matrices.ndim < 3 or matrices.numel() == 0:
        raise ValueError(f"matrices must be a non-empty (batch, out, *columns) tensor, got {tuple(matrices.shape)}.")
    batch, rows, *sizes = matrices.shape
    batch_stride, row_stride, *strides = matrices.stride()
    columns = math.prod(sizes)
    order = sorted((dim for dim in range(len(sizes)) if sizes[dim] > 1), key=lambda dim: -strides[dim])
    places = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    column_levels = _levels([(sizes[dim], strides[dim]) for dim in order])
    column_places = _levels([(sizes[dim], places[dim]) for dim in order])
    if column_levels is None or column_places is None:
        raise ValueError(
            f"The columns of a matrix of shape {tuple(matrices.shape)} and strides {matrices.stride()} lie in memory "
            "in more than two levels; pass a contiguous copy."
        )
    row_levels = Levels(rows, 0, row_stride)
    fast_is_columns = rows == 1 or (columns > 1 and column_levels.stride <= row_stride)
    fast, slow, size = (column_levels, row_levels, columns) if fast_is_columns else (row_levels, column_levels, rows)
    is_flat = column_levels.inner >= columns
    starts = [slow.stride] if (columns if slow is column_levels else rows) > 1 else []
    starts += [batch_stride] if batch > 1 else []
    is_aligned = (
        is_flat
        and (fast.stride == 1 or size == 1)
        and size % LANES == 0
        and all(start * matrices.element_size() % _ADDRESS_BYTES == 0 for start in starts)
        and matrices.data_ptr() % _ADDRESS_BYTES == 0
    )
    return Layout(
        batch, rows, columns, batch_stride, row_levels, column_levels, column_places, fast_is_columns, is_aligned
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in memory without gaps, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _levels(dims: Sequence[tuple[int, int]]) -> Levels | None:
    """Sizes and strides, outermost first, as two levels; None where they are not enough."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    if not merged:
        return Levels(1, 0, 1)
    inner, stride = merged[-1]
    return Levels(inner, merged[0][1] if len(merged) == 2 else 0, stride)
