"""`spectralnorm.linalg.track_together` for all matrices of a model in one call.

    plan = TrackingPlan([weight.detach().unsqueeze(0) for weight in weights])  # (1, out, in, height, width)
    tracked = plan.track(frames)
    tracked = plan.track(tracked)  # after an optimizer step: from where it was
    us, vs, sigmas = plan.whole(tracked, [0] * len(weights))

A matrix is read twice, the second time from the cache if it fits there. The numbers are those of `track_together` but
for rounding, and the same to the bit whatever else is in the plan and on however many threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.compiled import kernels
from spectralnorm.linalg.cpu.quotients import Division
from spectralnorm.linalg.cpu.tables import Ends, floats, for_one_call, form_of, integers
from spectralnorm.linalg.kernel_arguments import packed_frames
from spectralnorm.linalg.layout import layout_of
from spectralnorm.linalg.matrix_view import MatrixView
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet

__all__ = ["Tracked", "TrackingPlan"]


class _Field(IntEnum):
    """What the table holds for each matrix: ``enum map_field`` of tracking.c."""

    ADDRESS = 0
    ROWS = 1
    OUTERS = 2
    INNER = 3
    OUTER_STRIDE = 4
    ROW_STRIDE = 5
    FROM_ROWS = 6
    FRAME = 7
    NEXT = 8
    IS_COMPLETE = 9
    DIRECTION = 10
    ROW_VECTOR = 11
    ROW_PLACES = 12  # three
    COLUMN_VECTOR = 15
    COLUMN_PLACES = 16  # three
    WIDTH = 19


_Shapes = list[tuple[int, int, int]]


class Tracked:
    """What `TrackingPlan.track` found, in one piece of memory for each kind.

    Attributes:
        sigmas: (matrices,): those of all matrices, one after the other.
        weight_sigmas: (tensors,): the largest of each tensor's.
        num_bad: how many of those are up to ``eps`` or not finite.
        sides: for each tensor whether its next frame is on the left.
        num_rows: entries of all frames.
        memory: that of the frames; behind them all u and v: those of the first tensor, then those of the next.
    """

    def __init__(
        self,
        shapes: _Shapes,
        sides: tuple[bool, ...],
        memory: Tensor,
        num_rows: int,
        sigmas: Tensor,
        largest: Tensor,
        num_bad: int,
    ) -> None:
        self.sides, self.memory, self.sigmas, self.weight_sigmas = sides, memory, sigmas, largest
        self._shapes, self.num_rows, self.num_bad = shapes, num_rows, num_bad

    @cached_property
    def vector_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each tensor u, flat, and the same of v."""
        sizes = [batch * size for batch, *both in self._shapes for size in both]
        parts = self.memory[self.num_rows :].split(sizes)
        return list(parts[0::2]), list(parts[1::2])

    @cached_property
    def triplets(self) -> list[TrackedTriplet]:
        """For each tensor u, v, sigma and the next frame."""
        frames = self.memory[: self.num_rows].split(_frame_sizes(self._shapes, self.sides))
        sigmas = self.sigmas.split([batch for batch, _, _ in self._shapes])
        parts = zip(self._shapes, *self.vector_pairs, sigmas, frames, self.sides, strict=True)
        return [
            TrackedTriplet(
                u.view(batch, -1), v.view(batch, -1), sigma, Frame(rows.view(batch, NUM_TRACKED, -1), is_left)
            )
            for (batch, _, _), u, v, sigma, rows, is_left in parts
        ]


def _frame_sizes(shapes: _Shapes, sides: Sequence[bool]) -> list[int]:
    return [
        NUM_TRACKED * batch * (rows if is_left else columns)
        for (batch, rows, columns), is_left in zip(shapes, sides, strict=True)
    ]


class TrackingPlan:
    """Where the matrices of a model are, in the form that the kernels read.

    Args:
        matrices: each (batch, out, *columns), float32 on the CPU: views of the weights with their columns in any number
            of dimensions. They are read at every call where they were when the plan was made, and are not kept alive by
            it.
        directions: for each tensor what is added to the last row of its frames, rolled (`track`): a vector (out,) for
            frames on the left and one (in,) for frames on the right. None: nothing.

    Attributes:
        shapes: of each tensor (batch, rows, columns).
        vector_sizes: of u, v, u, v, ..., if each tensor is one matrix.
        vector_owners: which tensor each of those is of.
        divides: whether `track` takes a division.

    Raises:
        ValueError: a matrix has another type or device, no entries, or strides that no kernel reads (`form_of`).
    """

    def __init__(self, matrices: Sequence[Tensor], directions: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        if not matrices:
            raise ValueError("A plan needs at least one matrix, got none.")
        for matrix in matrices:
            if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
                raise ValueError(f"matrices must be float32 on the CPU, got {matrix.dtype} on {matrix.device}.")
        self._layouts = [layout_of(matrix) for matrix in matrices]
        self._forms = [form_of(layout) for layout in self._layouts]
        self._addresses = [matrix.data_ptr() for matrix in matrices]
        self.shapes: _Shapes = [(layout.batch, layout.rows, layout.columns) for layout in self._layouts]
        self._num_matrices = sum(batch for batch, _, _ in self.shapes)
        self._num_entries = sum(batch * (rows + columns) for batch, rows, columns in self.shapes)
        self._directions = None
        if directions is not None:
            self._directions = torch.cat([each.detach().float() for pair in directions for each in pair])
        # Of whole weights, each one matrix: where u and v lie in the memory of all vectors, in bytes.
        sizes = [size for _, *both in self.shapes for size in both]
        starts = [4 * start for start in accumulate([0, *sizes[:-1]])]
        self.vector_sizes, self._vector_places = integers(sizes), integers(starts).view(-1, 2)
        self.divides = True
        self.vector_owners = integers([place // 2 for place in range(len(sizes))])
        self._first_matrices = integers([0, *accumulate(batch for batch, _, _ in self.shapes)])
        self._tables: dict[tuple[bool, ...], tuple[Tensor, tuple[bool, ...], int]] = {}
        self._tables_of_ends: dict[int, Tensor] = {}

    def track(
        self,
        frames: Sequence[Frame] | Tracked,
        ages: Sequence[int] | None = None,
        num_iterations: int = 1,
        *,
        eps: float = 1e-12,
        division: Division | None = None,
    ) -> Tracked:
        """One step of power iteration for all matrices, as `track_together`.

        Args:
            frames: what this plan found last, whose frames are read where they are; or for each tensor its rows,
                float32, (batch, 8, out or in), which are copied together first. Columns have the order of the memory,
                the largest stride first, as in `MatrixView.memory_matrix`.
            ages: for each tensor by how much its direction is rolled before it is added to the frame's last row; None:
                nothing is added. After the first iteration nothing is, nor to a frame that spans its whole side.
            num_iterations: at least 1.
            eps: smallest length to divide by.
            division: of the same weights, to be done at once, while each is in the cache: `QuotientPlan.prepared`.

        Returns:
            The triplets, u (batch, out), v (batch, in) with the columns in the order of the matrix' own dimensions,
            sigma (batch,), and frames with the columns in that of the memory.
        """
        if isinstance(frames, Tracked):
            sides, memory = frames.sides, frames.memory
        else:
            sides, memory = tuple(frame.is_left for frame in frames), packed_frames(frames, self.shapes)
        shifts = None
        if ages is not None:
            if self._directions is None:
                raise ValueError("Ages were given to a plan without directions; make it with directions.")
            shifts = for_one_call(ages)
        for _ in range(num_iterations - 1):
            tracked = self._iterated(sides, memory, shifts, eps, None)
            sides, memory, shifts = tracked.sides, tracked.memory, None
        return self._iterated(sides, memory, shifts, eps, division)

    def ends(self, tracked: Tracked) -> Ends | None:
        """Where u and v of each weight are, if each is one matrix; else None.

        They are the vectors that `whole` returns, without as many tensors being made.
        """
        if self._num_matrices != len(self.shapes):
            return None
        return Ends(tracked.memory, self._table_of_ends(tracked.num_rows))

    def _table_of_ends(self, num_rows: int) -> Tensor:
        table = self._tables_of_ends.get(num_rows)
        if table is None:
            table = self._tables_of_ends[num_rows] = self._vector_places + 4 * num_rows
        return table

    def whole(self, tracked: Tracked, out_dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The vectors of whole weights whose batch is that of their diagonal blocks: `MatrixView.vectors_of_largest`.

        Args:
            tracked: what `track` returned.
            out_dims: for each weight its dimension that counts outputs. Blocks follow each other along dimension 0: for
                0 it is u that becomes longer, else v.

        Returns:
            For each weight u and v, those of its largest block among zeros, and the norms of all, (weights,).
        """
        if self._num_matrices == len(self.shapes):
            return *tracked.vector_pairs, tracked.sigmas
        wholes = [
            MatrixView(out_dim, batch).vectors_of_largest(triplet.u, triplet.v, triplet.sigma)
            for (batch, _, _), triplet, out_dim in zip(self.shapes, tracked.triplets, out_dims, strict=True)
        ]
        us, vs, _ = zip(*wholes, strict=True)
        return list(us), list(vs), tracked.weight_sigmas

    def _iterated(
        self, sides: tuple[bool, ...], frames: Tensor, shifts: array[int] | None, eps: float, division: Division | None
    ) -> Tracked:
        table, next_sides, num_next = self._table_of(sides)
        memory, sigmas = floats(num_next + self._num_entries), floats(self._num_matrices)
        largest = sigmas if self._num_matrices == len(self.shapes) else floats(len(self.shapes))
        address = memory.data_ptr()
        num_bad = kernels().spectralnorm_renew(
            table.data_ptr(),
            self._first_matrices.data_ptr(),
            len(self.shapes),
            frames.data_ptr(),
            None if self._directions is None else self._directions.data_ptr(),
            None if shifts is None else shifts.buffer_info()[0],
            address,
            address + 4 * num_next,
            sigmas.data_ptr(),
            largest.data_ptr(),
            eps,
            *([None] * 4 if division is None else (each.data_ptr() for each in division)),
            torch.get_num_threads(),
        )
        if num_bad < 0:
            raise MemoryError("No memory for following the singular vectors of the weights.")
        return Tracked(self.shapes, next_sides, memory, num_next, sigmas, largest, num_bad)

    def _table_of(self, sides: tuple[bool, ...]) -> tuple[Tensor, tuple[bool, ...], int]:
        """The table for frames on given sides; the sides of the next frames, and their entries in all."""
        found = self._tables.get(sides)
        if found is not None:
            return found
        entries, next_sides = [], []
        frame = following = vector = direction = 0
        parts = zip(self._addresses, self._layouts, self._forms, sides, strict=True)
        for address, layout, form, is_left in parts:
            size, other = (layout.rows, layout.columns) if is_left else (layout.columns, layout.rows)
            is_complete = size <= NUM_TRACKED
            next_size = size if is_complete else other
            u, v = vector, vector + layout.batch * layout.rows
            for index in range(layout.batch):
                entry = [0] * _Field.WIDTH
                entry[_Field.ADDRESS] = address + 4 * index * layout.batch_stride
                entry[_Field.ROWS : _Field.FROM_ROWS] = form[:5]
                entry[_Field.FROM_ROWS] = int(is_left != form.is_transposed)
                entry[_Field.FRAME], entry[_Field.NEXT] = frame, following
                entry[_Field.IS_COMPLETE] = int(is_complete)
                entry[_Field.DIRECTION] = direction if is_left else direction + layout.rows
                of_u, of_v = u + index * layout.rows, v + index * layout.columns
                row_vector, column_vector = (of_v, of_u) if form.is_transposed else (of_u, of_v)
                entry[_Field.ROW_VECTOR], entry[_Field.COLUMN_VECTOR] = row_vector, column_vector
                entry[_Field.ROW_PLACES : _Field.ROW_PLACES + 3] = form.row_places
                entry[_Field.COLUMN_PLACES : _Field.COLUMN_PLACES + 3] = form.column_places
                entries.append(entry)
                frame += NUM_TRACKED * size
                following += NUM_TRACKED * next_size
            vector += layout.batch * (layout.rows + layout.columns)
            direction += layout.rows + layout.columns
            next_sides.append(is_left if is_complete else not is_left)
        made = integers(entries), tuple(next_sides), following
        self._tables[sides] = made
        return made
