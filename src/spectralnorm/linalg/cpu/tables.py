"""What the kernels read: tables of numbers, and matrices as rows of entries that lie side by side in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.layout import Layout, Levels

__all__ = ["Ends", "Form", "floats", "for_one_call", "form_of", "integers"]


_CPU = torch.device("cpu")  # read once, not at every call


def floats(count: int) -> Tensor:
    """Memory for float32 numbers, whatever torch's default type and device are."""
    return torch.empty(count, dtype=torch.float32, device=_CPU)


def integers(values: Any) -> Tensor:
    """``values``, a list or a list of lists, as int64."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def for_one_call(values: Iterable[int]) -> array[int]:
    """``values`` as int64, at ``buffer_info()[0]``, for as long as it is held: made sooner than a tensor."""
    return array("q", values)


class Ends(NamedTuple):
    """Where singular vectors of all weights are.

    Attributes:
        memory: float32, in which all are; None: they are anywhere.
        table: (weights, 2): where u and v begin, in bytes from the beginning of ``memory``; without it, addresses.
    """

    memory: Tensor | None
    table: Tensor

    @property
    def beginning(self) -> int:
        """From where the table counts."""
        return 0 if self.memory is None else self.memory.data_ptr()


class Form(NamedTuple):
    """A matrix in memory, or its transpose.

    Entry (row, outer * inner + place) lies at row * row_stride + outer * outer_stride + place.

    Attributes:
        rows: in memory.
        outers: runs of a row.
        inner: entries of a run.
        outer_stride: from one run of a row to the next.
        row_stride: from one row to the next.
        is_transposed: whether these rows are the matrix' columns.
        row_places: a row's index in the order of the vector that belongs to rows.
        column_places: the same of columns.
    """

    rows: int
    outers: int
    inner: int
    outer_stride: int
    row_stride: int
    is_transposed: bool
    row_places: Levels
    column_places: Levels


def form_of(layout: Layout) -> Form:
    """The form in which the kernels read a layout.

    Raises:
        ValueError: neither rows nor columns lie side by side; a contiguous copy's do.
    """
    rows, columns = layout.row_levels, layout.column_levels
    plain = Levels(layout.rows, 0, 1)
    if layout.columns == 1 or (columns.stride == 1 and layout.fast_is_columns):
        # One column is a run of one entry in each row, wherever the rows lie.
        inner = min(columns.inner, layout.columns)
        return Form(
            layout.rows,
            layout.columns // inner,
            inner,
            columns.outer_stride,
            rows.stride,
            False,
            plain,
            layout.column_places,
        )
    if rows.stride == 1 and columns.inner >= layout.columns:
        return Form(layout.columns, 1, layout.rows, 0, columns.stride, True, layout.column_places, plain)
    raise ValueError(
        f"Neither rows nor columns of a matrix of {layout.rows} x {layout.columns} lie side by side in memory; pass a "
        "contiguous copy."
    )
