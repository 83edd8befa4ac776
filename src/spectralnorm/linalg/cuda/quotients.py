"""All weights of a model divided by their norms in one launch, and the gradient of that in two.

    plan = QuotientPlan([(weight.detach(), 0) for weight in weights], coefficients=[1.0] * len(weights))
    divided = plan.divide(sigmas)                         # sigmas: (weights,), as `TrackingPlan.whole` returns them
    gradients = plan.gradients(grads, divided.values, us, vs, sigmas)

The division reads and writes each entry once. The gradient reads G and W' for the inner products, then reads G again
and writes dL/dW; where the gradients lie is sent ahead in one small copy. Weights of several types make a launch for
each type.

In a captured CUDA graph the small copy becomes a launch for every eight numbers, of which there are five for each
weight. What is captured must have run once before, so that it is compiled. The mean of two views' gradients, for a
weight divided by the mean of two norms, is that of two plans with other output dimensions and the same ``sigmas``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from spectralnorm.linalg.cuda.tracking import TRITON_DTYPES
from spectralnorm.linalg.kernel_arguments import require_dense, require_vectors, rule_of
from spectralnorm.linalg.layout import Layout, layout_of

__all__ = ["Divided", "QuotientPlan"]

_ALIGNMENT_BYTES = 256
_MOST_SUBSETS = 256  # of weights whose gradients came without the others', remembered


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
        ValueError: a weight has another type or device, gaps in memory, fewer than two dimensions or no entries.
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
        caps = [False] * len(weights) if caps is None else caps
        rules = torch.zeros(len(weights), Rule.WIDTH, dtype=torch.float64)
        for rule, coefficient, cap in zip(rules, coefficients, caps, strict=True):
            wanted = rule_of(coefficient, cap, eps)
            rule[Rule.COEFFICIENT], rule[Rule.THRESHOLD], rule[Rule.CONSTANT] = wanted
        self._rules = rules.float().to(self.device)
        self._weights, self._pieces, self._blocks, self._num_parts, self._num_bytes = _tables(
            [weight for weight, _ in weights], self._layouts
        )
        self._targets = self._weights[:, Entry.TARGET].contiguous()
        self._last_distances: tuple[list[int], Tensor] | None = None
        self._some_blocks: dict[tuple[int, ...], _Launches] = {}
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
        values, out, targets = self._targets_of(outs)
        divisors = torch.empty_like(sigmas)
        active = torch.empty(len(values), dtype=torch.int8, device=self.device)
        with on_device_of(sigmas):
            for dtype, blocks in self._pieces:
                launch(
                    divide_kernel,
                    blocks.shape[0],
                    self._weights,
                    self._rules,
                    targets,
                    blocks,
                    sigmas,
                    out,
                    divisors,
                    active,
                    dtype,
                )
        return Divided(values, divisors, active.view(torch.bool))

    def gradients(
        self,
        grads: Sequence[Tensor],
        values: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        sigmas: Tensor,
        outs: Sequence[Tensor] | None = None,
        *,
        places: Sequence[int] | None = None,
        are_checked: bool = False,
    ) -> list[Tensor]:
        """dL/dW, with the vectors held constant (Miyato et al. 2018, eq. 12).

            dL/dW = G / d - active <G, W'> / sigma u v^T

        Args:
            grads: G, of the weights' shapes, strides and types.
            values: W', as `divide` returned them.
            us: whole left vectors, float32, (out,).
            vs: whole right vectors in torch's order, float32, (everything else,).
            sigmas: (weights,), float32: the norms that all weights were divided by.
            outs: as for `divide`; may be ``grads``.
            places: of which weights the others are; None: of all. For some of them it waits for the device the first
                time.
            are_checked: whether the caller knows that all tensors fit.

        Raises:
            ValueError: something has another shape, type or layout than the weight it belongs to.
        """
        sigmas = self._checked(sigmas)
        is_whole = places is None or tuple(places) == tuple(range(len(self._layouts)))
        some = range(len(self._layouts)) if is_whole else places
        assert some is not None
        if not are_checked:
            for tensors in (grads, values):
                self._check_layouts(tensors, some)
            layouts = (self._layouts[place] for place in some)
            require_vectors(us, vs, ((layout.rows, layout.columns) for layout in layouts))
        calls = [0] * (Call.WIDTH * len(self._layouts))
        for place, grad, value, u, v in zip(some, grads, values, us, vs, strict=True):
            layout = self._layouts[place]
            addresses = grad.data_ptr(), value.data_ptr()
            row = Call.WIDTH * place
            calls[row + Call.GRAD], calls[row + Call.VALUE] = addresses
            calls[row + Call.U], calls[row + Call.V] = u.data_ptr(), v.data_ptr()
            calls[row + Call.IS_ALIGNED] = int(layout.is_aligned and not any(address % 16 for address in addresses))
        if is_whole:
            results, out, targets = self._targets_of(outs)
        else:
            results, out, targets = self._targets_of_some(some, grads, outs)
        parts = torch.empty(self._num_parts, dtype=torch.float32, device=self.device)
        blocks_of_types = self._blocks if is_whole else self._blocks_of(tuple(some))
        with on_device_of(sigmas):
            table = uploaded(calls, self.device)
            for dtype, blocks in blocks_of_types:
                launch(inner_kernel, blocks.shape[0], self._weights, table, blocks, parts, dtype)
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
                    parts,
                    out,
                    dtype,
                )
        return results

    def _checked(self, sigmas: Tensor) -> Tensor:
        shape = (len(self._layouts),)
        if sigmas.shape != shape or sigmas.dtype != torch.float32:
            raise ValueError(f"Expected sigmas of shape {shape} in float32, got {tuple(sigmas.shape)} {sigmas.dtype}.")
        return sigmas.contiguous()

    def _check_layouts(self, tensors: Sequence[Tensor], places: Sequence[int]) -> None:
        for tensor, place in zip(tensors, places, strict=True):
            _, dtype, shape, stride, _ = self._identity[place]
            if tensor.dtype != dtype or tensor.shape != shape or tensor.stride() != stride:
                raise ValueError(
                    f"Expected a tensor of {dtype}, shape {tuple(shape)} and strides {stride} as the weight, got "
                    f"{tensor.dtype}, {tuple(tensor.shape)} and {tensor.stride()}."
                )

    def _targets_of(self, outs: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor, Tensor]:
        """The tensors to write to, an address and the distances in bytes from it."""
        if outs is not None:
            self._check_outs(outs, range(len(self._layouts)))
            return list(outs), _as_bytes(outs[0]), self._distances(outs)
        memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self.device)
        made = []
        start = 0
        for _, dtype, shape, stride, _ in self._identity:
            # Set, not viewed: what is written into one later must not change the version of the others.
            tensor = torch.empty(0, dtype=dtype, device=self.device)
            made.append(tensor.set_(memory.untyped_storage(), start // dtype.itemsize, shape, stride))
            start += _padded(shape.numel() * dtype.itemsize)
        return made, memory, self._targets

    def _targets_of_some(
        self, places: Sequence[int], grads: Sequence[Tensor], outs: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As `_targets_of`, each in memory of its own."""
        made = [torch.empty_like(grad) for grad in grads] if outs is None else list(outs)
        self._check_outs(made, places)
        distances = [0] * len(self._layouts)
        for place, distance in zip(places, relative_addresses(made), strict=True):
            distances[place] = distance
        return made, _as_bytes(made[0]), uploaded(distances, self.device)

    def _check_outs(self, outs: Sequence[Tensor], places: Sequence[int]) -> None:
        self._check_layouts(outs, places)
        if any(out.data_ptr() % 16 for out in outs):
            raise ValueError("outs must lie at addresses that 16 divides; pass None, or tensors of their own.")

    def _blocks_of(self, places: tuple[int, ...]) -> _Launches:
        """Those of some weights."""
        blocks_of_types = self._some_blocks.get(places)
        if blocks_of_types is None:
            if len(self._some_blocks) >= _MOST_SUBSETS:
                self._some_blocks.clear()
            wanted = torch.tensor(places, device=self.device)
            chosen = [(dtype, blocks[torch.isin(blocks[:, 0], wanted)]) for dtype, blocks in self._blocks]
            blocks_of_types = self._some_blocks[places] = [each for each in chosen if len(each[1])]
        return blocks_of_types

    def _distances(self, outs: Sequence[Tensor]) -> Tensor:
        """In bytes, of each from the first; on the device already if they are those of the last time."""
        distances = relative_addresses(outs)
        if self._last_distances is None or self._last_distances[0] != distances:
            on_device = uploaded(distances, self.device)
            if is_capturing(self.device):
                return on_device
            self._last_distances = distances, on_device
        return self._last_distances[1]


_Identity = tuple[tuple[int, torch.dtype, torch.Size, tuple[int, ...], int], ...]


def _identity_of(weights: Sequence[tuple[Tensor, int]]) -> _Identity:
    return tuple((weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), dim) for weight, dim in weights)


def _padded(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _as_bytes(tensor: Tensor) -> Tensor:
    """A tensor of bytes that begins where ``tensor`` does."""
    first = tensor.storage_offset() * tensor.element_size()
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), first, (tensor.numel() * tensor.element_size(),), (1,))


_Launches = list[tuple[Any, Tensor]]


def _tables(weights: Sequence[Tensor], layouts: Sequence[Layout]) -> tuple[Tensor, _Launches, _Launches, int, int]:
    """The table of weights; for each type the pieces of the division and the blocks of the gradient; sizes."""
    entries = []
    pieces: dict[torch.dtype, list[list[int]]] = {}
    blocks: dict[torch.dtype, list[list[int]]] = {}
    num_parts = num_bytes = 0
    for index, (weight, layout) in enumerate(zip(weights, layouts, strict=True)):
        entry = [0] * Entry.WIDTH
        entry[Entry.ADDRESS], entry[Entry.NUMEL] = weight.data_ptr(), weight.numel()
        entry[Entry.IS_ALIGNED], entry[Entry.TARGET] = int(weight.data_ptr() % 16 == 0), num_bytes
        entry[Entry.ROWS], entry[Entry.COLUMNS] = layout.rows, layout.columns
        entry[Entry.ROW_INNER : Entry.ROW_INNER + 3] = layout.row_levels
        entry[Entry.COLUMN_INNER : Entry.COLUMN_INNER + 3] = layout.column_levels
        entry[Entry.PLACE_INNER : Entry.PLACE_INNER + 3] = layout.column_places
        entry[Entry.FAST_IS_COLUMNS] = int(layout.fast_is_columns)
        slow, fast = (layout.rows, layout.columns) if layout.fast_is_columns else (layout.columns, layout.rows)
        starts = [(start, fast_start) for start in range(0, slow, SLOW * STEPS) for fast_start in range(0, fast, FAST)]
        entry[Entry.PARTS : Entry.PARTS + 2] = num_parts, len(starts)
        blocks.setdefault(weight.dtype, []).extend(
            [index, start, fast_start, num_parts + part] for part, (start, fast_start) in enumerate(starts)
        )
        pieces.setdefault(weight.dtype, []).extend([index, start] for start in range(0, weight.numel(), PIECE))
        num_parts += len(starts)
        num_bytes += _padded(weight.numel() * weight.element_size())
        entries.append(entry)
    device = weights[0].device
    on_device = [
        [(TRITON_DTYPES[dtype], torch.tensor(some, device=device)) for dtype, some in launches.items()]
        for launches in (pieces, blocks)
    ]
    return torch.tensor(entries, device=device), on_device[0], on_device[1], num_parts, num_bytes
