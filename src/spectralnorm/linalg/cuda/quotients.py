"""All weights of a model divided by their norms in one launch, and the gradient of that in two.

    plan = QuotientPlan([(weight.detach(), 0) for weight in weights], coefficients=[1.0] * len(weights))
    divided = plan.divide(sigmas)                         # sigmas: (weights,), as `TrackingPlan.whole` returns them
    gradients = plan.gradients(grads, divided.values, us, vs, sigmas)

The division reads and writes each entry once. The gradient reads G and W' for the inner products, then reads G again
and writes dL/dW. G is the sum of what came from one or two uses, which is added up where it is read. Where the
gradients lie is sent ahead in one small copy, unless they lie where others lay before. Weights of several types make a
launch for each type.

In a captured CUDA graph the small copy becomes a launch for every eight numbers, of which there are four for each
weight. What is captured must have run once before, so that it is compiled. The mean of two views' gradients, for a
weight divided by the mean of two norms, is that of two plans with other output dimensions and the same ``sigmas``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.cuda.launch import is_capturing, launch, on_device_of, relative_addresses, uploaded, written
from spectralnorm.linalg.cuda.quotient_kernels import (
    PIECE,
    SLOW,
    STEPS,
    Call,
    Entry,
    Rule,
    divide_kernel,
    gradients_kernel,
    inner_kernel,
)
from spectralnorm.linalg.cuda.tiles import FAST
from spectralnorm.linalg.cuda.tracking import Ends
from spectralnorm.linalg.cuda.tracking_tables import TRITON_DTYPES
from spectralnorm.linalg.kernel_arguments import require_countable, require_dense, require_vectors, rule_of
from spectralnorm.linalg.layout import Layout, layout_of

__all__ = ["Divided", "Division", "QuotientPlan"]

_ALIGNMENT_BYTES = 256
_MOST_SENT = 32  # tables of integers that are the same again, step after step


class Divided(NamedTuple):
    """What `QuotientPlan.divide` computed.

    Attributes:
        values: for each weight W / d, in its shape, strides and type.
        divisors: (weights,): d.
        active: (weights,): whether d is ``sigma / coefficient``, not a constant.
    """

    values: list[Tensor]
    divisors: Tensor
    active: Tensor


class Division(NamedTuple):
    """A division whose norms are still to be found: `QuotientPlan.prepared`.

    Attributes:
        plan: whose weights are divided.
        targets: (weights, 2), int64: where each value and the same in a narrower type is written.
        narrow: that type, or None.
    """

    plan: QuotientPlan
    targets: Tensor
    narrow: torch.dtype | None

    def divide(self, sigmas: Tensor) -> None:
        """Divide all weights by their norms, (weights,), float32."""
        self.plan._divide(sigmas, self)


class QuotientPlan:
    """Where the weights of a model are and how each is divided by its norm.

    Args:
        weights: each weight and its dimension that counts outputs. They are dense in memory, in any order of their
            dimensions, of float32, bfloat16 or float16, on one device, and are read at every call where they were when
            the plan was made (`fits`).
        coefficients: for each the norm that is wanted.
        caps: for each whether a smaller norm is left alone; None: for none.
        eps: a norm up to here counts as zero, and is not divided by; nor is one that is not finite.

    Raises:
        ValueError: a weight has another type or device, gaps in memory, fewer than two dimensions, no entries, or too
            many (`require_countable`).
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, int]],
        coefficients: Sequence[float],
        caps: Sequence[bool] | None = None,
        *,
        eps: float = 1e-12,
    ) -> None:
        if not weights:
            raise ValueError("A plan needs at least one weight, got none.")
        self.device = weights[0][0].device
        for weight, _ in weights:
            if weight.dtype not in TRITON_DTYPES:
                raise ValueError(f"weights must be of {', '.join(map(str, TRITON_DTYPES))}, got {weight.dtype}.")
            if weight.device != self.device:
                raise ValueError(f"All weights must be on {self.device}, got one on {weight.device}.")
            require_dense(weight)
        self._identity = _identity_of(weights)
        self._layouts = [layout_of(weight.movedim(out_dim, 0).unsqueeze(0)) for weight, out_dim in weights]
        for layout in self._layouts:
            require_countable(layout)
        caps = [False] * len(weights) if caps is None else caps
        rules = torch.zeros(len(weights), Rule.WIDTH, dtype=torch.float64, device="cpu")
        for rule, coefficient, cap in zip(rules, coefficients, caps, strict=True):
            wanted = rule_of(coefficient, cap, eps)
            rule[Rule.COEFFICIENT], rule[Rule.THRESHOLD], rule[Rule.CONSTANT] = wanted
        self._rules = rules.float().to(self.device)
        # Addresses are given to the kernels as distances from here, or from one piece of memory for all results.
        self._origin = self._rules.view(torch.uint8)
        starts, self._num_bytes = _starts([weight for weight, _ in weights])
        self._forms = [
            (weight.dtype, weight.shape, weight.stride(), start // weight.element_size())
            for (weight, _), start in zip(weights, starts, strict=True)
        ]
        self._dtypes = {weight.dtype for weight, _ in weights}
        self._weights, self._pieces, self._blocks, self._block_rows, self._num_parts = _tables(
            [weight for weight, _ in weights], self._layouts
        )
        self._flat_targets = torch.tensor(starts, dtype=torch.int64, device=self.device)
        self._sent: dict[Hashable, Tensor] = {}
        self._last_targets: tuple[Tensor, Tensor | None, Tensor] | None = None
        if self.device.type == "cuda":
            with on_device_of(self._rules):
                written([0], self.device)  # compiled, for a capture

    def fits(self, weights: Sequence[tuple[Tensor, int]]) -> bool:
        """Whether the plan is for these weights, where they are now."""
        return self._identity == _identity_of(weights)

    def divide(self, sigmas: Tensor, outs: Sequence[Tensor] | None = None) -> Divided:
        """Each weight divided by its norm, in its own type; the arithmetic is that of float32.

        Args:
            sigmas: (weights,), float32: the norms.
            outs: for each weight a tensor of its shape, strides and type to write to, at an address that 16 divides;
                None: new ones, which lie in one piece of memory but are written to independently. Torch does not notice
                that something is written to them: their versions stay.
        """
        sigmas = self._checked(sigmas)
        # `data`: what is written into one later must not change the version of the others.
        values = [value.data for value in self._in_one_piece()[0]] if outs is None else list(outs)
        self.prepared(values).divide(sigmas)
        return Divided(values, *self.divisors(sigmas))

    def divisors(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """What `divide` divides by, and whether that is ``sigma / coefficient``; each (weights,)."""
        active = (sigmas > self._rules[:, Rule.THRESHOLD]) & (sigmas < math.inf)  # false for NaN
        quotients = sigmas / self._rules[:, Rule.COEFFICIENT]
        return torch.where(active, quotients, self._rules[:, Rule.CONSTANT]), active

    def prepared(
        self,
        outs: Sequence[Tensor],
        *,
        targets: Tensor | None = None,
        narrows: Sequence[Tensor] | None = None,
        narrow_targets: Tensor | None = None,
    ) -> Division:
        """The division into ``outs`` as `TrackingPlan.track` takes it.

        Args:
            outs: as for `divide`.
            targets: their addresses, int64 on the CPU, where the caller has had them checked before; None: not yet.
                For the same tensor as at the last call nothing is sent to the device.
            narrows: for each weight a tensor of its shape and strides, all of one narrower type, to which the value is
                written as well; None: none.
            narrow_targets: as ``targets``, of ``narrows``.
        """
        if targets is None:
            self._check_outs(outs, range(len(self._layouts)))
            targets = torch.tensor([out.data_ptr() for out in outs], dtype=torch.int64, device="cpu")
        narrow = None if narrows is None else narrows[0].dtype
        last = self._last_targets
        if last is not None and last[0] is targets and last[1] is narrow_targets:
            return Division(self, last[2], narrow)
        origin = self._origin.data_ptr()
        wide = (targets - origin).tolist()
        second = wide if narrow_targets is None else (narrow_targets - origin).tolist()
        table = self._on_device([number for pair in zip(wide, second, strict=True) for number in pair])
        if not is_capturing(self.device):
            self._last_targets = targets, narrow_targets, table
        return Division(self, table, narrow)

    def _divide(self, sigmas: Tensor, division: Division) -> None:
        narrow = division.narrow
        with on_device_of(sigmas):
            for dtype, blocks in self._pieces:
                launch(
                    divide_kernel,
                    blocks.shape[0],
                    self._weights,
                    self._rules,
                    division.targets,
                    blocks,
                    sigmas,
                    self._origin,
                    dtype,
                    narrow is not None,
                    dtype if narrow is None else TRITON_DTYPES[narrow],
                )

    def gradients(
        self,
        grads: Sequence[Tensor],
        values: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        sigmas: Tensor,
        outs: Sequence[Tensor] | None = None,
        *,
        more_grads: Sequence[Tensor | None] | None = None,
        places: Sequence[int] | None = None,
        are_checked: bool = False,
    ) -> list[Tensor]:
        """dL/dW, with the vectors held constant (Miyato et al. 2018, eq. 12).

            dL/dW = G / d - active <G, W'> / sigma u v^T

        Args:
            grads: G, of the weights' shapes, strides and types, or of the same narrower type for all.
            values: W', as `divide` returned them.
            us: whole left vectors, float32, (out,).
            vs: whole right vectors in torch's order, float32, (everything else,).
            sigmas: (weights,), float32: the norms that all weights were divided by.
            outs: as for `divide`; may be ``grads``, if nothing is added to them. New ones share a version.
            more_grads: for each what is added to its G, like that; None: nothing.
            places: of which weights the others are; None: of all. For some of them there are two launches for each run
                of weights that follow each other.
            are_checked: whether the caller knows that all tensors fit.

        Raises:
            ValueError: something has another shape, type or layout than the weight it belongs to.
        """
        sigmas = self._checked(sigmas)
        some = range(len(self._layouts)) if places is None else places
        others = [None] * len(grads) if more_grads is None else more_grads
        if not are_checked:
            narrow = grads[0].dtype if all(grad.dtype == grads[0].dtype for grad in grads) else None
            self._check_layouts(grads, some, narrow)
            added = [grad if other is None else other for grad, other in zip(grads, others, strict=True)]
            self._check_layouts(added, some, narrow)
            self._check_layouts(values, some)
            layouts = (self._layouts[place] for place in some)
            require_vectors(us, vs, ((layout.rows, layout.columns) for layout in layouts))
        vectors = [vector for pair in zip(us, vs, strict=True) for vector in pair]
        distances = [0] * (2 * len(self._layouts))
        for place, (u, v) in zip(some, _pairs(relative_addresses(vectors)), strict=True):
            distances[2 * place], distances[2 * place + 1] = u // 4, v // 4
        ends = Ends(vectors[0], self._on_device(distances))
        addresses = [value.data_ptr() for value in values]
        return self.differentiate(grads, others, addresses, ends, sigmas, places, outs)

    def differentiate(
        self,
        grads: Sequence[Tensor],
        more_grads: Sequence[Tensor | None],
        values: Sequence[int],
        ends: Ends,
        sigmas: Tensor,
        places: Sequence[int] | None,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """`gradients`, of what is known to fit.

        Args:
            grads: as for `gradients`.
            more_grads: the same.
            values: addresses of W'.
            ends: where the vectors of all weights are.
            sigmas: contiguous.
            places: of which weights ``grads``, ``more_grads`` and ``values`` are; None: of all.
            outs: as for `gradients`.
        """
        everywhere = tuple(range(len(self._layouts)))
        some = everywhere if places is None else tuple(places)
        is_whole = some == everywhere
        calls = [0] * (Call.WIDTH * len(self._layouts))
        for place, grad, other, value in zip(some, grads, more_grads, values, strict=True):
            row = Call.WIDTH * place
            address, more = grad.data_ptr(), 0 if other is None else other.data_ptr()
            is_aligned = self._layouts[place].is_aligned and not (address | more | value) & 15
            calls[row : row + Call.WIDTH] = address, more, value, is_aligned
        if outs is not None:
            results, out = list(outs), self._origin
            self._check_outs(results, some)
        elif is_whole:
            results, out = self._in_one_piece()
        else:
            likes = (self._identity[place] for place in some)
            results = [_new(dtype, shape, stride, self.device) for _, dtype, shape, stride, _ in likes]
            out = self._origin
        targets = self._flat_targets
        if out is self._origin:
            distances = [0] * len(self._layouts)
            for place, result in zip(some, results, strict=True):
                distances[place] = result.data_ptr() - out.data_ptr()
            targets = self._on_device(distances)
        parts = torch.empty(self._num_parts, dtype=torch.float32, device=self.device)
        blocks_of_types = self._blocks if is_whole else self._blocks_of(some)
        is_narrow = grads[0].dtype != self._identity[some[0]][1]
        narrow = TRITON_DTYPES[grads[0].dtype] if is_narrow else None
        with on_device_of(sigmas):
            table = self._on_device(calls)
            for dtype, blocks in blocks_of_types:
                launch(inner_kernel, blocks.shape[0], self._weights, table, blocks, parts, dtype, narrow or dtype)
            for dtype, blocks in blocks_of_types:
                launch(
                    gradients_kernel,
                    blocks.shape[0],
                    self._weights,
                    self._rules,
                    targets,
                    table,
                    blocks,
                    sigmas,
                    ends.memory,
                    ends.table,
                    parts,
                    out,
                    dtype,
                    narrow or dtype,
                )
        return results

    def _on_device(self, values: list[int]) -> Tensor:
        """Integers, sent if they are not those of an earlier call; in a step like the last one they often are."""
        if is_capturing(self.device):
            return uploaded(values, self.device)
        key = tuple(values)
        found = self._sent.get(key)
        if found is None:
            if len(self._sent) >= _MOST_SENT:
                self._sent.clear()
            found = self._sent[key] = uploaded(values, self.device)
        return found

    def _checked(self, sigmas: Tensor) -> Tensor:
        shape = (len(self._layouts),)
        if sigmas.shape != shape or sigmas.dtype != torch.float32:
            raise ValueError(f"Expected sigmas of shape {shape} in float32, got {tuple(sigmas.shape)} {sigmas.dtype}.")
        return sigmas.contiguous()

    def _check_layouts(
        self, tensors: Sequence[Tensor], places: Sequence[int], narrow: torch.dtype | None = None
    ) -> None:
        """Refuse tensors that are not like the weights, but for the type if it is ``narrow``."""
        for tensor, place in zip(tensors, places, strict=True):
            _, dtype, shape, stride, _ = self._identity[place]
            is_of_type = tensor.dtype == dtype or (tensor.dtype == narrow and narrow in TRITON_DTYPES)
            if not is_of_type or tensor.shape != shape or tensor.stride() != stride:
                raise ValueError(
                    f"Expected a tensor of {dtype}, shape {tuple(shape)} and strides {stride} as the weight, got "
                    f"{tensor.dtype}, {tuple(tensor.shape)} and {tensor.stride()}."
                )

    def _in_one_piece(self) -> tuple[list[Tensor], Tensor]:
        """New tensors as the weights, and the memory they lie in."""
        memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self.device)
        by_dtype = {dtype: memory.view(dtype) for dtype in self._dtypes}
        made = [by_dtype[dtype].as_strided(shape, stride, start) for dtype, shape, stride, start in self._forms]
        return made, memory

    def _check_outs(self, outs: Sequence[Tensor], places: Sequence[int]) -> None:
        self._check_layouts(outs, places)
        if any(out.data_ptr() % 16 for out in outs):
            raise ValueError("outs must lie at addresses that 16 divides; pass None, or tensors of their own.")

    def _blocks_of(self, places: Sequence[int]) -> _Launches:
        """Those of some weights: pieces of the tables, so that nothing is sent, which a capture would refuse."""
        runs: list[list[Any]] = []  # each a table, and its first and last row
        tables = dict(self._blocks)
        for place in places:
            dtype, rows = TRITON_DTYPES[self._identity[place][1]], self._block_rows[place]
            run = next((run for run in runs if run[0] is dtype and run[2] == rows.start), None)
            if run is None:
                runs.append([dtype, rows.start, rows.stop])
            else:
                run[2] = rows.stop
        return [(dtype, tables[dtype][start:stop]) for dtype, start, stop in runs]


_Identity = tuple[tuple[int, torch.dtype, torch.Size, tuple[int, ...], int], ...]


def _identity_of(weights: Sequence[tuple[Tensor, int]]) -> _Identity:
    return tuple((weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), dim) for weight, dim in weights)


def _pairs(values: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(values[0::2], values[1::2], strict=True))


def _new(dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


_Launches = list[tuple[Any, Tensor]]


def _starts(weights: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each weight begins if they follow each other in memory, in bytes, and where they end."""
    starts, stop = [], 0
    for weight in weights:
        starts.append(stop)
        size = weight.numel() * weight.element_size()
        stop += math.ceil(size / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return starts, stop


def _tables(
    weights: Sequence[Tensor], layouts: Sequence[Layout]
) -> tuple[Tensor, _Launches, _Launches, list[range], int]:
    """The table of weights; for each type the pieces of the division and the blocks of the gradient.

    Returns:
        Besides, for each weight the rows of its blocks in the table of its type, and the number of all parts.
    """
    entries, block_rows = [], []
    pieces: dict[torch.dtype, list[list[int]]] = {}
    blocks: dict[torch.dtype, list[list[int]]] = {}
    num_parts = 0
    for index, (weight, layout) in enumerate(zip(weights, layouts, strict=True)):
        entry = [0] * Entry.WIDTH
        entry[Entry.ADDRESS], entry[Entry.NUMEL] = weight.data_ptr(), weight.numel()
        entry[Entry.IS_ALIGNED] = int(weight.data_ptr() % 16 == 0)
        entry[Entry.ROWS], entry[Entry.COLUMNS] = layout.rows, layout.columns
        entry[Entry.ROW_INNER : Entry.ROW_INNER + 3] = layout.row_levels
        entry[Entry.COLUMN_INNER : Entry.COLUMN_INNER + 3] = layout.column_levels
        entry[Entry.PLACE_INNER : Entry.PLACE_INNER + 3] = layout.column_places
        entry[Entry.FAST_IS_COLUMNS] = int(layout.fast_is_columns)
        slow, fast = (layout.rows, layout.columns) if layout.fast_is_columns else (layout.columns, layout.rows)
        starts = [(start, fast_start) for start in range(0, slow, SLOW * STEPS) for fast_start in range(0, fast, FAST)]
        entry[Entry.PARTS : Entry.PARTS + 2] = num_parts, len(starts)
        of_dtype = blocks.setdefault(weight.dtype, [])
        block_rows.append(range(len(of_dtype), len(of_dtype) + len(starts)))
        of_dtype += [[index, start, fast_start, num_parts + part] for part, (start, fast_start) in enumerate(starts)]
        pieces.setdefault(weight.dtype, []).extend([index, start] for start in range(0, weight.numel(), PIECE))
        num_parts += len(starts)
        entries.append(entry)
    device = weights[0].device
    on_device = [
        [(TRITON_DTYPES[dtype], torch.tensor(some, device=device)) for dtype, some in launches.items()]
        for launches in (pieces, blocks)
    ]
    return torch.tensor(entries, device=device), on_device[0], on_device[1], block_rows, num_parts
