"""`spectralnorm.linalg.track_together` for all matrices of a model in seven launches per iteration.

    plan = TrackingPlan([weight.detach().unsqueeze(0) for weight in weights])  # (1, out, in, height, width)
    tracked = plan.track(frames)
    tracked = plan.track(tracked)  # after an optimizer step: from where it was
    us, vs, sigmas = plan.whole(tracked, [0] * len(weights))

Launches and bytes of an iteration, for matrices of P entries in all, R rows and C columns (summed), frames on the left:

| kernel | reads | writes |
|---|---|---|
| images | the matrices; the frames, 32 R bytes for every 128 columns | parts of Y: P / 16 floats |
| grams | the parts, the frames | Y: 32 C bytes |
| turns | shares of 8 x 8 | 8 x 8 for each matrix |
| frames | Y | the next frames: 32 C bytes |
| others | the matrices again | parts of z: P / 128 floats |
| sums | the parts | z: 4 R bytes |
| vectors | the leading rows and z | u, v, sigma |

So 2 P entries are read, and about a sixth of P in other things. With frames on the right, R and C change places.
`TrackingPlan.whole`, for weights in blocks, is one launch more. All sums have a fixed order: the same inputs give the
same bits, whatever else is in the plan. Matrices of several types make a launch of images and one of others for each.

The first call compiles the kernels, which takes seconds; Triton keeps them on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from spectralnorm.linalg.cuda.launch import is_capturing, launch, on_device_of, uploaded
from spectralnorm.linalg.cuda.tiles import FAST
from spectralnorm.linalg.cuda.tracking_kernels import (
    SLOW,
    SPAN,
    Field,
    WholeField,
    frames_kernel,
    grams_kernel,
    images_kernel,
    others_kernel,
    sums_kernel,
    turns_kernel,
    vectors_kernel,
    wholes_kernel,
)
from spectralnorm.linalg.kernel_arguments import packed_frames
from spectralnorm.linalg.layout import Layout, layout_of
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet

__all__ = ["TRITON_DTYPES", "Ends", "Tracked", "TrackingPlan", "track_together_cuda"]

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Entries of a matrix that one program reads.
_ENTRIES_PER_PROGRAM = 16384


class Ends(NamedTuple):
    """Where singular vectors of all weights are.

    Attributes:
        memory: a float32 tensor.
        table: (weights, 2), int64: where u and v begin, in entries from the beginning of ``memory``.
    """

    memory: Tensor
    table: Tensor


class Tracked:
    """What `TrackingPlan.track` found, in one piece of memory for each kind.

    Attributes:
        sigmas: (matrices,): those of all matrices, one after the other.
        vectors: the memory of all u and v.
        sides: for each tensor whether its frame was on the left before the last iteration.
        next_sides: the same after it.
        rows: the memory of all frames.
    """

    def __init__(self, batches: Sequence[int], tables: _Tables, sides: tuple[bool, ...], memory: _Memory) -> None:
        self.sides, self.next_sides = sides, tables.next_sides
        self.rows, self.vectors, self.sigmas = memory
        self._batches, self._tables = batches, tables

    @property
    def weight_sigmas(self) -> Tensor:
        """The norms of the tensors, each of which is one matrix."""
        return self.sigmas

    @cached_property
    def vector_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each tensor u, flat, and the same of v."""
        tables = self._tables
        leads = self.vectors[: tables.num_lead].split(tables.lead_sizes)
        ends = self.vectors[tables.num_lead :].split(tables.end_sizes)
        us = [end if is_left else lead for lead, end, is_left in zip(leads, ends, self.sides, strict=True)]
        vs = [lead if is_left else end for lead, end, is_left in zip(leads, ends, self.sides, strict=True)]
        return us, vs

    @cached_property
    def triplets(self) -> list[TrackedTriplet]:
        """For each tensor u, v, sigma and the next frame."""
        sizes = [NUM_TRACKED * size for size in self._tables.next_sizes]
        frames = self.rows[: sum(sizes)].split(sizes)
        parts = zip(
            self._batches,
            *self.vector_pairs,
            self.sigmas.split(list(self._batches)),
            frames,
            self.next_sides,
            strict=True,
        )
        return [
            TrackedTriplet(
                u.view(batch, -1), v.view(batch, -1), sigma, Frame(rows.view(batch, NUM_TRACKED, -1), is_left)
            )
            for batch, u, v, sigma, rows, is_left in parts
        ]


class TrackingPlan:
    """Where the matrices of a model are, in the form that the kernels read.

    Args:
        matrices: each (batch, out, *columns), of float32, bfloat16 or float16 and all on one device: views of the
            weights with their columns in any number of dimensions. They are read at every call where they were when
            the plan was made (`fits`), and are not kept alive by it.
        directions: for each tensor what is added to the last row of its frames, rolled (`track`): a vector (out,) for
            frames on the left and one (in,) for frames on the right. None: nothing.

    Raises:
        ValueError: a matrix has another type or device, no entries, or strides that no kernel reads (`layout_of`).
    """

    def __init__(self, matrices: Sequence[Tensor], directions: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        if not matrices:
            raise ValueError("A plan needs at least one matrix, got none.")
        self.device = matrices[0].device
        for matrix in matrices:
            if matrix.dtype not in TRITON_DTYPES:
                raise ValueError(f"matrices must be of {', '.join(map(str, TRITON_DTYPES))}, got {matrix.dtype}.")
            if matrix.device != self.device:
                raise ValueError(f"All matrices must be on {self.device}, got one on {matrix.device}.")
        self._identity = _identity_of(matrices)
        self._layouts = [layout_of(matrix) for matrix in matrices]
        self._directions = None
        if directions is not None:
            self._directions = torch.cat([each.detach().float() for pair in directions for each in pair])
        self._tables: dict[tuple[bool, ...], _Tables] = {}
        self._wholes: dict[tuple[tuple[bool, ...], tuple[int, ...]], tuple[Tensor, Tensor, list[int]]] = {}
        self._ends: dict[tuple[bool, ...], Tensor] = {}
        self.divides = all(layout.batch == 1 for layout in self._layouts)
        self._shifts: tuple[tuple[int, ...], Tensor] | None = None
        self.vector_sizes = [size for layout in self._layouts for size in (layout.rows, layout.columns)]
        self.vector_owners = [place for place in range(len(self._layouts)) for _ in range(2)]

    def fits(self, matrices: Sequence[Tensor]) -> bool:
        """Whether the plan is for these matrices, where they are now."""
        return self._identity == _identity_of(matrices)

    def track(
        self,
        frames: Sequence[Frame] | Tracked,
        ages: Sequence[int] | None = None,
        num_iterations: int = 1,
        *,
        eps: float = 1e-12,
        division: Any = None,
    ) -> Tracked:
        """One step of power iteration for all matrices, as `track_together`.

        The results are new tensors; those of one kind lie one after the other in memory. A captured graph can only
        begin on sides on which the plan has been called before, because it makes tables for each; it repeats the ages
        it was captured with.

        Args:
            frames: what this plan found last, whose frames are read where they are; or for each tensor its rows,
                float32, (batch, 8, out or in), which are copied together first. Columns have the order of the memory,
                the largest stride first, as in `MatrixView.memory_matrix`.
            ages: for each tensor by how much its direction is rolled before it is added to the frame's last row; None:
                nothing is added. After the first iteration nothing is.
            num_iterations: at least 1.
            eps: smallest length to divide by.
            division: of the same weights, each one matrix, by their norms: `QuotientPlan.prepared`.

        Returns:
            The triplets, u (batch, out), v (batch, in) with the columns in the order of the matrix' own dimensions,
            sigma (batch,), and frames with the columns in that of the memory.
        """
        is_going_on = isinstance(frames, Tracked)
        sides = frames.next_sides if is_going_on else tuple(frame.is_left for frame in frames)
        shifts, step = self._rolled(ages)
        rows = (
            frames.rows
            if is_going_on
            else packed_frames(frames, [(each.batch, each.rows, each.columns) for each in self._layouts])
        )
        with on_device_of(rows):
            tables = self._tables_of(sides)
            memory = self._iterated(tables, rows, shifts, step, eps)
            for _ in range(num_iterations - 1):
                sides = tables.next_sides
                tables = self._tables_of(sides)
                memory = self._iterated(tables, memory.rows, None, 0, eps)
            if division is not None:
                division.divide(memory.sigmas)
        return Tracked([layout.batch for layout in self._layouts], tables, sides, memory)

    def whole(self, tracked: Tracked, out_dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The vectors of whole weights whose batch is that of their diagonal blocks: `MatrixView.vectors_of_largest`.

        Args:
            tracked: what `track` returned.
            out_dims: for each weight its dimension that counts outputs. Blocks follow each other along dimension 0: for
                0 it is u that becomes longer, else v.

        Returns:
            For each weight u and v, those of its largest block among zeros, and the norms of all, (weights,).
        """
        if all(layout.batch == 1 for layout in self._layouts):
            return *tracked.vector_pairs, tracked.sigmas
        table, spans, sizes = self._wholes_of(tracked.sides, tuple(out_dims))
        wholes = self._empty(sum(sizes))
        sigmas = self._empty(len(self._layouts))
        with on_device_of(wholes):
            launch(wholes_kernel, spans.shape[0], table, spans, tracked.vectors, tracked.sigmas, wholes, sigmas)
        parts = wholes.split(sizes)
        return list(parts[0::2]), list(parts[1::2]), sigmas

    def ends(self, tracked: Tracked) -> Ends | None:
        """Where u and v of each weight are, if each is one matrix; else None."""
        if not self.divides:
            return None
        if tracked.sides not in self._ends:
            tables = self._tables_of(tracked.sides)
            starts, lead, end = [], 0, tables.num_lead
            for lead_size, end_size, is_left in zip(tables.lead_sizes, tables.end_sizes, tracked.sides, strict=True):
                starts.append([end, lead] if is_left else [lead, end])
                lead, end = lead + lead_size, end + end_size
            self._ends[tracked.sides] = torch.tensor(starts, device=self.device)
        return Ends(tracked.vectors, self._ends[tracked.sides])

    def _iterated(self, tables: _Tables, frames: Tensor, shifts: Tensor | None, step: int, eps: float) -> _Memory:
        num_spans, num_maps = tables.spans.shape[0], tables.maps.shape[0]
        images, rows = self._empty(8 * tables.num_lead), self._empty(8 * tables.num_turned)
        parts, others = self._empty(tables.num_parts), self._empty(tables.num_end)
        grams, turns = self._empty(64 * num_spans), self._empty(64 * num_maps)
        squares, sigmas = self._empty(num_spans), self._empty(num_maps)
        vectors = self._empty(tables.num_lead + tables.num_end)
        is_stirred = shifts is not None
        # Without stirring nothing is read from these two.
        stirring = (self._directions, shifts, step) if is_stirred else (frames, tables.maps, 0)
        maps, spans, num_lead_spans = tables.maps, tables.spans, tables.num_lead_spans
        for dtype, blocks in tables.image_blocks:
            launch(images_kernel, blocks.shape[0], maps, blocks, frames, *stirring, parts, is_stirred, dtype)
        launch(
            grams_kernel, num_spans, maps, spans, num_lead_spans, frames, *stirring, parts, images, grams, is_stirred
        )
        launch(turns_kernel, num_maps, maps, grams, turns, num_warps=1)
        launch(frames_kernel, num_lead_spans, maps, spans, images, turns, frames, rows, squares)
        for dtype, blocks in tables.other_blocks:
            launch(others_kernel, blocks.shape[0], maps, blocks, rows, parts, dtype)
        launch(sums_kernel, num_spans - num_lead_spans, maps, spans, num_lead_spans, parts, others, squares)
        ends = vectors[tables.num_lead :]
        launch(
            vectors_kernel, num_spans, maps, spans, num_lead_spans, rows, others, squares, vectors, ends, sigmas, eps
        )
        return _Memory(rows, vectors, sigmas)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def _rolled(self, ages: Sequence[int] | None) -> tuple[Tensor | None, int]:
        """Ages as those of the matrices relative to the first, which stay the same, and that of the first."""
        if ages is None:
            return None, 0
        if self._directions is None:
            raise ValueError("Ages were given to a plan without directions; make it with directions.")
        relative = tuple(age - ages[0] for age in ages)
        if self._shifts is None or self._shifts[0] != relative:
            of_matrices = [
                age for age, layout in zip(relative, self._layouts, strict=True) for _ in range(layout.batch)
            ]
            shifts = uploaded(of_matrices, self.device)
            if is_capturing(self.device):
                return shifts, ages[0]
            self._shifts = relative, shifts
        return self._shifts[1], ages[0]

    def _tables_of(self, sides: tuple[bool, ...]) -> _Tables:
        if sides not in self._tables:
            self._tables[sides] = _tables(self._identity, self._layouts, sides, self.device)
        return self._tables[sides]

    def _wholes_of(self, sides: tuple[bool, ...], out_dims: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        """Table, spans and sizes of the whole vectors: u, v of the first weight, u, v of the next, ..."""
        if (sides, out_dims) in self._wholes:
            return self._wholes[sides, out_dims]
        tables = self._tables_of(sides)
        table, spans, sizes = [], [], []
        first, lead_start, end_start = 0, 0, tables.num_lead
        for weight, (layout, is_left, out_dim) in enumerate(zip(self._layouts, sides, out_dims, strict=True)):
            lead, end = (layout.columns, layout.rows) if is_left else (layout.rows, layout.columns)
            u = layout.rows, (end_start if is_left else lead_start), out_dim == 0
            v = layout.columns, (lead_start if is_left else end_start), out_dim != 0
            for size, source, is_stacked in (u, v):
                row = [0] * WholeField.WIDTH
                row[WholeField.FIRST], row[WholeField.BLOCKS], row[WholeField.SIZE] = first, layout.batch, size
                row[WholeField.SOURCE], row[WholeField.TARGET] = source, sum(sizes)
                row[WholeField.IS_STACKED], row[WholeField.WEIGHT] = int(is_stacked), weight
                sizes.append(size * layout.batch if is_stacked else size)
                spans += [[len(table), start] for start in range(0, sizes[-1], SPAN)]
                table.append(row)
            first += layout.batch
            lead_start += layout.batch * lead
            end_start += layout.batch * end
        made = torch.tensor(table, device=self.device), torch.tensor(spans, device=self.device), sizes
        self._wholes[sides, out_dims] = made
        return made


def track_together_cuda(
    matrices: Sequence[Tensor],
    frames: Sequence[Frame],
    probes: Sequence[Tensor | None],
    num_iterations: int = 1,
    *,
    eps: float = 1e-12,
    plan: TrackingPlan | None = None,
) -> list[TrackedTriplet]:
    """`track_together`, by a plan.

    Any probes are added by torch's own operations, as many as there are probes; a `TrackingPlan` with directions needs
    none.

    Args:
        matrices: as for `TrackingPlan`.
        frames: as for `TrackingPlan.track`.
        probes: for each what is added to the frame first, (8, out or in), or None.
        num_iterations: at least 1.
        eps: smallest length to divide by.
        plan: one that fits; None: it is made for this call.
    """
    plan = TrackingPlan(matrices) if plan is None else plan
    starts = [
        # A complete frame has every direction, and comes back as it was given.
        frame if probe is None or _is_complete(frame.rows.shape[-1]) else Frame(frame.rows + probe, frame.is_left)
        for frame, probe in zip(frames, probes, strict=True)
    ]
    return plan.track(starts, None, num_iterations, eps=eps).triplets


def _is_complete(size: int) -> bool:
    """Whether a frame on a side of that size spans all of it, and stays as it is (`complete_frame`)."""
    return size <= NUM_TRACKED


_Identity = tuple[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], ...]


def _identity_of(matrices: Sequence[Tensor]) -> _Identity:
    return tuple((matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride()) for matrix in matrices)


class _Memory(NamedTuple):
    """What an iteration writes: the next frames, the vectors (leading ones first) and the norms."""

    rows: Tensor
    vectors: Tensor
    sigmas: Tensor


class _Tables(NamedTuple):
    """What the kernels read for frames on given sides.

    The side of the frame counts M, the other N; a vector along N is a leading one, along M an end.
    """

    maps: Tensor  # (matrices, Field.WIDTH)
    image_blocks: list[tuple[Any, Tensor]]  # for each type: which matrix, N from, M from, M to, where the part goes
    other_blocks: list[tuple[Any, Tensor]]  # the same with N and M exchanged
    spans: Tensor  # which matrix, from where: first all spans of leading vectors, then those of ends
    num_lead_spans: int
    num_parts: int  # entries of all parts
    num_lead: int  # entries of all leading vectors
    num_end: int
    lead_sizes: list[int]  # entries of each tensor's leading vectors
    end_sizes: list[int]
    next_sizes: list[int]  # an eighth of the entries of each tensor's next frames
    next_sides: tuple[bool, ...]
    num_turned: int  # an eighth of the entries of all next frames, and of those turned ones that are none


def _tables(identity: _Identity, layouts: Sequence[Layout], sides: Sequence[bool], device: torch.device) -> _Tables:
    maps: list[list[int]] = []
    image_blocks: dict[torch.dtype, list[list[int]]] = {}
    other_blocks: dict[torch.dtype, list[list[int]]] = {}
    lead_spans: list[list[int]] = []
    end_spans: list[list[int]] = []
    lead_sizes, end_sizes, next_sizes, next_sides = [], [], [], []
    complete: list[list[int]] = []
    num_next = 0
    num_lead = num_end = num_image_parts = num_other_parts = direction = 0
    for (address, dtype, *_), layout, is_left in zip(identity, layouts, sides, strict=True):
        rows, columns = layout.rows, layout.columns
        of_rows = rows, layout.row_levels, (rows, 0, 1)
        of_columns = columns, layout.column_levels, layout.column_places
        (m, m_levels, m_places), (n, n_levels, n_places) = (of_rows, of_columns) if is_left else (of_columns, of_rows)
        fast_is_m = layout.fast_is_columns != is_left
        is_complete = _is_complete(m)
        for index in range(layout.batch):
            entry = [0] * Field.WIDTH
            entry[Field.ADDRESS] = address + index * layout.batch_stride * dtype.itemsize
            entry[Field.M], entry[Field.N] = m, n
            for field, levels in (
                (Field.M_INNER, m_levels),
                (Field.N_INNER, n_levels),
                (Field.M_PLACE_INNER, m_places),
                (Field.N_PLACE_INNER, n_places),
            ):
                entry[field : field + 3] = levels
            entry[Field.IS_ALIGNED], entry[Field.FAST_IS_M] = int(layout.is_aligned), int(fast_is_m)
            entry[Field.M_BEFORE], entry[Field.N_BEFORE] = num_end, num_lead
            entry[Field.M_SPANS : Field.M_SPANS + 2] = len(end_spans), math.ceil(m / SPAN)
            entry[Field.N_SPANS : Field.N_SPANS + 2] = len(lead_spans), math.ceil(n / SPAN)
            entry[Field.DIRECTION] = direction if is_left else direction + rows
            entry[Field.TURNED], entry[Field.KEPT] = num_next, -1
            if is_complete:
                entry[Field.KEPT] = num_next
                complete.append(entry)
            num_next += m if is_complete else n
            of_images = _blocks(len(maps), n, m, fast_is_m, num_image_parts, NUM_TRACKED * n)
            of_others = _blocks(len(maps), m, n, not fast_is_m, num_other_parts, m)
            for field, blocks, first, size in (
                (Field.IMAGE_PARTS, of_images, num_image_parts, NUM_TRACKED * n),
                (Field.OTHER_PARTS, of_others, num_other_parts, m),
            ):
                entry[field : field + 2] = first, (blocks[-1][-1] - first) // size + 1
            image_blocks.setdefault(dtype, []).extend(of_images)
            other_blocks.setdefault(dtype, []).extend(of_others)
            lead_spans += [[len(maps), start] for start in range(0, n, SPAN)]
            end_spans += [[len(maps), start] for start in range(0, m, SPAN)]
            num_image_parts = of_images[-1][-1] + NUM_TRACKED * n
            num_other_parts = of_others[-1][-1] + m
            num_lead, num_end = num_lead + n, num_end + m
            maps.append(entry)
        lead_sizes.append(layout.batch * n)
        end_sizes.append(layout.batch * m)
        next_sizes.append(layout.batch * (m if is_complete else n))
        next_sides.append(is_left if is_complete else not is_left)
        direction += rows + columns
    for entry in maps:
        entry[Field.M_SPANS] += len(lead_spans)
    # Next frames lie one after the other, so that they can be read where they are; what is turned for its first row
    # alone comes after them.
    for entry in complete:
        entry[Field.TURNED] = num_next
        num_next += entry[Field.N]
    return _Tables(
        maps=torch.tensor(maps, device=device),
        image_blocks=_on_device(image_blocks, device),
        other_blocks=_on_device(other_blocks, device),
        spans=torch.tensor(lead_spans + end_spans, device=device),
        num_lead_spans=len(lead_spans),
        num_parts=max(num_image_parts, num_other_parts),
        num_lead=num_lead,
        num_end=num_end,
        lead_sizes=lead_sizes,
        end_sizes=end_sizes,
        next_sizes=next_sizes,
        next_sides=tuple(next_sides),
        num_turned=num_next,
    )


def _blocks(which: int, kept: int, summed: int, sums_fast: bool, first: int, part_size: int) -> list[list[int]]:
    """Programs of a product: blocks of the side that is kept, times parts of the one that is summed over.

    A part's blocks follow each other, so that programs that run at the same time read the same piece of the frame.
    """
    width = 2 * SLOW if sums_fast else FAST
    length = _ENTRIES_PER_PROGRAM // width
    return [
        [which, kept_start, start, min(start + length, summed), first + part * part_size]
        for part, start in enumerate(range(0, summed, length))
        for kept_start in range(0, kept, width)
    ]


def _on_device(blocks: dict[torch.dtype, list[list[int]]], device: torch.device) -> list[tuple[Any, Tensor]]:
    return [(TRITON_DTYPES[dtype], torch.tensor(some, device=device)) for dtype, some in blocks.items()]
