"""`spectralnorm.linalg.track_together` for all matrices of a model in two launches, or four.

    plan = TrackingPlan([weight.detach().unsqueeze(0) for weight in weights])  # (1, out, in, height, width)
    tracked = plan.track(frames)
    tracked = plan.track(tracked)  # after an optimizer step: from where it was
    us, vs, sigmas = plan.whole(tracked, [0] * len(weights))

Launches and bytes of an iteration, for matrices of P entries in all, R rows and C columns (summed), frames on the left:

| kernel | reads | writes |
|---|---|---|
| images | the matrices; the frames, 32 R bytes for every 128 columns | parts of Y: P / 32 floats |
| | the parts | Y: 32 C bytes |
| | Y | the next frames: 32 C bytes |
| others | the matrices again | parts of z: P / 1024 floats |
| | the parts, the leading rows | z: 4 R bytes; u, v, sigma |

So 2 P entries are read, and about a tenth of P in other things; of several iterations the last alone has the second
product, and those before it read P. With frames on the right, R and C change places, and
both kinds of parts are P / 128 floats, where the weights lie in memory as torch has them. What an iteration writes is
one piece of memory. Matrices of several types make launches for each. `TrackingPlan.whole`, for weights in blocks, is
one launch more.

What follows from a product is done by its last program for a matrix. In a large set that one would be waited for: the
next frames and the vectors are two launches of many programs then. All sums have a fixed order: the same inputs give
the same bits, whatever else is in the plan. Programs count themselves in memory of the plan, which is at zero between
launches: a plan must not run on two streams at a time.

Squares are added up in float32 and not rescaled before: a norm is found up to 1e18, and is infinite or NaN far above.

The first call compiles the kernels, which takes seconds; Triton keeps them on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spectralnorm.linalg.cuda.image_kernels import images_kernel, turned_kernel
from spectralnorm.linalg.cuda.launch import is_capturing, launch, on_device_of, uploaded
from spectralnorm.linalg.cuda.other_kernels import ends_kernel, others_kernel, wholes_kernel
from spectralnorm.linalg.cuda.return_kernel import RETURNED, return_kernel
from spectralnorm.linalg.cuda.tracking_fields import SPAN, WholeField
from spectralnorm.linalg.cuda.tracking_tables import TRITON_DTYPES, Tables, identity_of, is_complete, tables_of
from spectralnorm.linalg.kernel_arguments import packed_frames, require_countable
from spectralnorm.linalg.layout import layout_of
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet

__all__ = ["Ends", "Tracked", "TrackingPlan", "track_together_cuda"]

# From here on what a program for each matrix would do after a product is worth launches of its own.
_SPLIT_BYTES = 32 * 2**20


class Divides(Protocol):
    """A division that waits for the norms."""

    def divide(self, sigmas: Tensor) -> None:
        """Divide the weights by their norms, (weights,)."""


class Ends(NamedTuple):
    """Where singular vectors of all weights are.

    Attributes:
        memory: a float32 tensor.
        table: (weights, 2), int64: where u and v begin, in entries from the beginning of ``memory``.
    """

    memory: Tensor
    table: Tensor


class Tracked:
    """What `TrackingPlan.track` found.

    Attributes:
        sides: for each tensor whether its frame was on the left before the last iteration.
        next_sides: the same after it.
        memory: of all frames, one after the other; behind them that of all vectors and norms.
    """

    def __init__(self, batches: Sequence[int], tables: Tables, sides: tuple[bool, ...], memory: Tensor) -> None:
        self.sides, self.next_sides, self.memory = sides, tables.next_sides, memory
        self._batches, self._tables = batches, tables

    @property
    def weight_sigmas(self) -> Tensor:
        """The norms of the tensors, each of which is one matrix."""
        return self.sigmas

    @cached_property
    def sigmas(self) -> Tensor:
        """(matrices,): those of all matrices, one after the other."""
        return self._tables.sigmas_in(self.memory)

    @cached_property
    def vector_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """For each tensor u, flat, and the same of v."""
        sizes, number = self._tables.vector_sizes, len(self.sides)
        vectors = self.memory[self._tables.first_vector : self._tables.first_vector + sum(sizes)].split(sizes)
        leads, ends = vectors[:number], vectors[number:]
        us = [end if is_left else lead for lead, end, is_left in zip(leads, ends, self.sides, strict=True)]
        vs = [lead if is_left else end for lead, end, is_left in zip(leads, ends, self.sides, strict=True)]
        return us, vs

    @cached_property
    def triplets(self) -> list[TrackedTriplet]:
        """For each tensor u, v, sigma and the next frame."""
        sizes = [NUM_TRACKED * size for size in self._tables.next_sizes]
        frames = self.memory[: sum(sizes)].split(sizes)
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
        is_split: whether what follows from a product is done in launches of its own; None: for more than 32 MiB.

    Raises:
        ValueError: a matrix has another type or device, no entries, strides that no kernel reads (`layout_of`), or too
            many entries for them (`require_countable`).
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        directions: Sequence[tuple[Tensor, Tensor]] | None = None,
        *,
        is_split: bool | None = None,
    ) -> None:
        if not matrices:
            raise ValueError("A plan needs at least one matrix, got none.")
        self.device = matrices[0].device
        for matrix in matrices:
            if matrix.dtype not in TRITON_DTYPES:
                raise ValueError(f"matrices must be of {', '.join(map(str, TRITON_DTYPES))}, got {matrix.dtype}.")
            if matrix.device != self.device:
                raise ValueError(f"All matrices must be on {self.device}, got one on {matrix.device}.")
        self._identity = identity_of(matrices)
        num_bytes = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
        self._is_split = num_bytes > _SPLIT_BYTES if is_split is None else is_split
        self._layouts = [layout_of(matrix) for matrix in matrices]
        for layout in self._layouts:
            require_countable(layout)
        self._directions = None
        if directions is not None:
            self._directions = torch.cat([each.detach().float() for pair in directions for each in pair])
        self._tables: dict[tuple[bool, ...], Tables] = {}
        self._wholes: dict[tuple[tuple[bool, ...], tuple[int, ...]], tuple[Tensor, Tensor, list[int]]] = {}
        self._ends: dict[tuple[bool, ...], Tensor] = {}
        self._returns: dict[tuple[bool, ...], Tensor] = {}
        self._batches = [layout.batch for layout in self._layouts]
        self.divides = all(layout.batch == 1 for layout in self._layouts)
        self._shifts: tuple[tuple[int, ...], Tensor] | None = None
        self.vector_sizes = [size for layout in self._layouts for size in (layout.rows, layout.columns)]
        self.vector_owners = [place for place in range(len(self._layouts)) for _ in range(2)]

    def fits(self, matrices: Sequence[Tensor]) -> bool:
        """Whether the plan is for these matrices, where they are now."""
        return self._identity == identity_of(matrices)

    def track(
        self,
        frames: Sequence[Frame] | Tracked,
        ages: Sequence[int] | None = None,
        num_iterations: int = 1,
        *,
        eps: float = 1e-12,
        division: Divides | None = None,
    ) -> Tracked:
        """One step of power iteration for all matrices, as `track_together`.

        The results are new tensors; those of one kind lie one after the other in memory. A captured graph can only
        begin on sides on which the plan has been called before, because it makes tables for each; it repeats the ages
        it was captured with. For one that goes on from where its last replay ended there is `track_in_place`.

        Args:
            frames: what this plan found last, whose frames are read where they are; or for each tensor its rows,
                float32, (batch, 8, out or in), which are copied together first. Columns have the order of the memory,
                the largest stride first, as in `MatrixView.memory_matrix`.
            ages: for each tensor by how much its direction is rolled before it is added to the frame's last row; None:
                nothing is added. After the first iteration nothing is.
            num_iterations: at least 1.
            eps: smallest length to divide by.
            division: of the tensors, of which each must be one matrix, by the norms: `QuotientPlan.prepared`.

        Returns:
            The triplets, u (batch, out), v (batch, in) with the columns in the order of the matrix' own dimensions,
            sigma (batch,), and frames with the columns in that of the memory.
        """
        is_going_on = isinstance(frames, Tracked)
        sides = frames.next_sides if is_going_on else tuple(frame.is_left for frame in frames)
        shifts, step = self._rolled(ages)
        rows = (
            frames.memory
            if is_going_on
            else packed_frames(frames, [(each.batch, each.rows, each.columns) for each in self._layouts])
        )
        with on_device_of(rows):
            for remaining in reversed(range(num_iterations)):
                tables = self._tables_of(sides)
                rows = self._next_frames(tables, rows, shifts, step)
                shifts, step = None, 0
                if remaining > 0:
                    sides = tables.next_sides
            self._find_vectors(tables, rows, eps)
        tracked = Tracked(self._batches, tables, sides, rows)
        if division is not None:
            division.divide(tracked.sigmas)
        return tracked

    def prepare_in_place(self, frames: Tracked, out_dims: Sequence[int]) -> None:
        """Make all that `track_in_place` and what comes after it read, and compile what nothing else runs.

        Args:
            frames: what this plan found last; later ones are on the same sides or on all the others.
            out_dims: as for `whole`.
        """
        sides = frames.next_sides
        for each in (sides, self._tables_of(sides).next_sides):
            spans = self._returns_of(each)
            if self.divides:
                self._ends_of(each)
            else:
                self._wholes_of(each, tuple(out_dims))
        # With a norm that is none nothing is copied.
        nothing = torch.zeros(sum(self._batches), dtype=torch.float32, device=self.device)
        with on_device_of(nothing):
            launch(return_kernel, spans.shape[0], spans, frames.memory, nothing, 0.0, frames.memory)

    def restart(self, frames: Tracked, place: int, frame: Frame) -> None:
        """Let what goes on from ``frames`` start from another one for one tensor, if that is of the same side.

        Args:
            frames: what this plan found last.
            place: of the tensor.
            frame: as for `track`.
        """
        layout, is_left = self._layouts[place], frames.next_sides[place]
        if frame.is_left == is_left:
            packed = packed_frames([frame], [(layout.batch, layout.rows, layout.columns)])
            frames.triplets[place].frame.rows.view(-1).copy_(packed)

    def track_in_place(
        self,
        frames: Tracked,
        ages: Sequence[int] | None = None,
        num_iterations: int = 1,
        *,
        eps: float = 1e-12,
        division: Divides | None = None,
    ) -> Tracked:
        """As `track`, and the next frames go to where these were read: what a captured graph does at every replay.

        The frames have to come back to their sides, so that an odd number of iterations is one more. Those of a matrix
        that has no norm, because it is zero or not finite, stay as they are.

        Args:
            frames: what this plan found last. In a captured graph `prepare_in_place` must have been called before.
            ages: as for `track`, of the first iteration; the following ones have the next ages.
            num_iterations: as for `track`.
            eps: as for `track`; a norm up to here is none.
            division: as for `track`.
        """
        sides, rows = frames.next_sides, frames.memory
        shifts, step = self._rolled(ages)
        with on_device_of(rows):
            for index in range(num_iterations + num_iterations % 2):
                tables, before = self._tables_of(sides), sides
                rows = self._next_frames(tables, rows, shifts, step + index)
                sides = tables.next_sides
            self._find_vectors(tables, rows, eps)
            spans, sigmas = self._returns_of(sides), tables.sigmas_in(rows)
            launch(return_kernel, spans.shape[0], spans, rows, sigmas, eps, frames.memory)
        tracked = Tracked(self._batches, tables, before, rows)
        if division is not None:
            division.divide(tracked.sigmas)
        return tracked

    def whole(self, tracked: Tracked, out_dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The vectors of whole weights whose batch is that of their diagonal blocks: `MatrixView.vectors_of_largest`.

        Args:
            tracked: what `track` returned.
            out_dims: for each weight its dimension that counts outputs. Blocks follow each other along dimension 0: for
                0 it is u that becomes longer, else v.

        Returns:
            For each weight u and v, those of its largest block among zeros, and the norms of all, (weights,).
        """
        if self.divides:
            return *tracked.vector_pairs, tracked.sigmas
        table, spans, sizes = self._wholes_of(tracked.sides, tuple(out_dims))
        wholes = self._empty(sum(sizes))
        with on_device_of(wholes):
            launch(wholes_kernel, spans.shape[0], table, spans, tracked.memory, wholes)
        sigmas, *parts = wholes.split(sizes)
        return parts[0::2], parts[1::2], sigmas

    def ends(self, tracked: Tracked) -> Ends | None:
        """Where u and v of each weight are, if each is one matrix; else None."""
        return Ends(tracked.memory, self._ends_of(tracked.sides)) if self.divides else None

    def _next_frames(self, tables: Tables, frames: Tensor, shifts: Tensor | None, step: int) -> Tensor:
        """The memory that an iteration writes, with the next frames in it."""
        memory = self._empty(tables.size)
        is_stirred = shifts is not None
        # Without stirring nothing is read from these two.
        stirring = (self._directions, shifts, step) if is_stirred else (frames, tables.maps, 0)
        maps, counters = tables.maps, tables.counters
        is_split = tables.spans is not None
        for dtype, blocks, number in tables.image_blocks:
            launch(
                images_kernel, number, maps, blocks, counters, frames, *stirring, memory, is_stirred, is_split, dtype
            )
        if tables.spans is not None:
            launch(turned_kernel, len(tables.spans.along_n), maps, tables.spans.along_n, memory)
        return memory

    def _find_vectors(self, tables: Tables, memory: Tensor, eps: float) -> None:
        """Add the vectors and norms to the memory of the last iteration; of earlier ones nobody wants to know them."""
        maps, is_split = tables.maps, tables.spans is not None
        for dtype, blocks, number in tables.other_blocks:
            launch(others_kernel, number, maps, blocks, tables.counters, memory, eps, is_split, dtype)
        if tables.spans is not None:
            launch(ends_kernel, len(tables.spans.along_m), maps, tables.spans.along_m, memory, eps)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def _rolled(self, ages: Sequence[int] | None) -> tuple[Tensor | None, int]:
        """Ages as those of the matrices relative to the first, which stay the same, and that of the first."""
        if ages is None:
            return None, 0
        if self._directions is None:
            raise ValueError("Ages were given to a plan without directions; make it with directions.")
        relative = tuple(age - ages[0] for age in ages)
        if self._shifts is not None and self._shifts[0] == relative and not is_capturing(self.device):
            return self._shifts[1], ages[0]
        of_matrices = [age for age, layout in zip(relative, self._layouts, strict=True) for _ in range(layout.batch)]
        shifts = uploaded(of_matrices, self.device)
        if not is_capturing(self.device):  # a graph has its own: what is remembered here may be replaced
            self._shifts = relative, shifts
        return shifts, ages[0]

    def _tables_of(self, sides: tuple[bool, ...]) -> Tables:
        if sides not in self._tables:
            self._tables[sides] = tables_of(self._identity, self._layouts, sides, self._is_split, self.device)
        return self._tables[sides]

    def _ends_of(self, sides: tuple[bool, ...]) -> Tensor:
        if sides not in self._ends:
            tables, number = self._tables_of(sides), len(self._layouts)
            places = list(accumulate(tables.vector_sizes, initial=tables.first_vector))
            both = zip(places[:number], places[number : 2 * number], sides, strict=True)
            starts = [[end, lead] if is_left else [lead, end] for lead, end, is_left in both]
            self._ends[sides] = torch.tensor(starts, device=self.device)
        return self._ends[sides]

    def _returns_of(self, sides: tuple[bool, ...]) -> Tensor:
        """Pieces of the frames on ``sides``: (programs, 3), of each where it begins and ends, and its matrix."""
        if sides not in self._returns:
            spans, start, which = [], 0, 0
            for layout, is_left in zip(self._layouts, sides, strict=True):
                size = NUM_TRACKED * (layout.rows if is_left else layout.columns)
                for _ in range(layout.batch):
                    stop = start + size
                    spans += [[piece, min(piece + RETURNED, stop), which] for piece in range(start, stop, RETURNED)]
                    start, which = stop, which + 1
            self._returns[sides] = torch.tensor(spans, device=self.device)
        return self._returns[sides]

    def _wholes_of(self, sides: tuple[bool, ...], out_dims: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        """Table, spans, and sizes: of all norms, of u, v of the first whole weight, u, v of the next, ..."""
        if (sides, out_dims) in self._wholes:
            return self._wholes[sides, out_dims]
        tables = self._tables_of(sides)
        first_sigma, number = tables.first_sigma, len(self._layouts)
        table, spans, sizes = [], [], [number]
        places = list(accumulate(tables.vector_sizes, initial=tables.first_vector))
        parts = zip(self._layouts, sides, out_dims, places[:number], places[number : 2 * number], strict=True)
        for weight, (layout, is_left, out_dim, lead, end) in enumerate(parts):
            u = layout.rows, (end if is_left else lead), out_dim == 0
            v = layout.columns, (lead if is_left else end), out_dim != 0
            for size, source, is_stacked in (u, v):
                row = [0] * WholeField.WIDTH
                row[WholeField.SIGMAS], row[WholeField.BLOCKS], row[WholeField.SIZE] = first_sigma, layout.batch, size
                row[WholeField.SOURCE], row[WholeField.TARGET] = source, sum(sizes)
                row[WholeField.IS_STACKED], row[WholeField.SIGMA] = int(is_stacked), weight
                sizes.append(size * layout.batch if is_stacked else size)
                spans += [[len(table), start] for start in range(0, sizes[-1], SPAN)]
                table.append(row)
            first_sigma += layout.batch
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
        frame if probe is None or is_complete(frame.rows.shape[-1]) else Frame(frame.rows + probe, frame.is_left)
        for frame, probe in zip(frames, probes, strict=True)
    ]
    return plan.track(starts, None, num_iterations, eps=eps).triplets
