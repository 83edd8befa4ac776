"""Vectors of many weights copied to where they are kept, in one launch, each only if its norm is one.

    store = VectorStore()
    store.copy(vectors, owners, sigmas, buffers, eps=1e-12)
    store.copy_from(ends, sizes, owners, sigmas, buffers, eps=1e-12)  # without as many tensors being made

A weight that is zero or not finite has no singular vectors: what was kept of it stays. Whether it is so is known to the
device alone, and the kernel asks there.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The kernel's body is Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralnorm.linalg.cuda.launch import is_capturing, launch, on_device_of, relative_addresses, uploaded
from spectralnorm.linalg.cuda.tracking import Ends
from spectralnorm.linalg.cuda.tracking_tables import TRITON_DTYPES
from spectralnorm.linalg.kernel_arguments import require_target

__all__ = ["VectorStore", "store_kernel"]

_SPAN_ENTRIES = 1024  # that one program copies
_MOST_TABLES = 8  # usually there is one


class _Row(IntEnum):
    """What the table holds for each vector, as int64."""

    SOURCE = 0  # which of the ends
    TARGET = 1  # an address
    SIZE = 2
    OWNER = 3  # whose norm decides
    WIDTH = 4


_SPAN = tl.constexpr(_SPAN_ENTRIES)
_SOURCE = tl.constexpr(int(_Row.SOURCE))
_TARGET = tl.constexpr(int(_Row.TARGET))
_SIZE = tl.constexpr(int(_Row.SIZE))
_OWNER = tl.constexpr(int(_Row.OWNER))
_WIDTH = tl.constexpr(int(_Row.WIDTH))


@triton.jit
def store_kernel(table, spans, vectors, ends, sigmas, eps, DTYPE: tl.constexpr, REVISION: tl.constexpr):
    """One span of one vector."""
    span = spans + 2 * tl.program_id(0)
    row = table + tl.load(span) * _WIDTH
    sigma = tl.load(sigmas + tl.load(row + _OWNER))
    if (sigma > eps) & (sigma < float("inf")):  # false for NaN
        index = tl.load(span + 1) + tl.arange(0, _SPAN)
        mask = index < tl.load(row + _SIZE)
        value = tl.load(vectors + tl.load(ends + tl.load(row + _SOURCE)) + index, mask=mask, other=0.0)
        target = tl.load(row + _TARGET).to(tl.pointer_type(DTYPE))
        tl.store(target + index, value.to(DTYPE), mask=mask)


class VectorStore:
    """Remembers where vectors go, as long as they come from and go to the same places."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Any, ...], list[tuple[Any, Tensor, Tensor]]] = {}
        self._held: set[tuple[Any, ...]] = set()
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def copy(
        self,
        vectors: Sequence[Tensor],
        owners: Sequence[int],
        sigmas: Tensor,
        targets: Sequence[Tensor],
        *,
        eps: float,
    ) -> None:
        """Write each vector into its target, in the target's type, if ``eps < sigmas[owner] < inf``.

        Args:
            vectors: contiguous, float32, at distances from each other that stay the same, as in one piece of memory.
            owners: for each which norm is asked.
            sigmas: float32, 1-D.
            targets: for each where it goes: contiguous, as many entries, of float32, bfloat16 or float16.
            eps: a norm up to here counts as zero.

        Raises:
            ValueError: a target has another size, another type or gaps.
        """
        for vector, target in zip(vectors, targets, strict=True):
            require_target(vector, target, TRITON_DTYPES)
        starts = tuple(distance // 4 for distance in relative_addresses(vectors))
        is_in_graph = is_capturing(sigmas.device)  # which has its own: what is remembered here may be dropped
        ends = None if is_in_graph else self._ends.get(starts)
        if ends is None:
            ends = uploaded(starts, sigmas.device)
            if not is_in_graph:
                if len(self._ends) >= _MOST_TABLES:
                    self._ends.clear()
                self._ends[starts] = ends
        self._store(Ends(vectors[0], ends), owners, sigmas, targets, eps)

    def copy_from(
        self,
        ends: Ends,
        sizes: Sequence[int],
        owners: Sequence[int],
        sigmas: Tensor,
        targets: Sequence[Tensor],
        *,
        eps: float,
    ) -> None:
        """As `copy`, of vectors that are known by where they are.

        Args:
            ends: u and v of all weights, in this order.
            sizes: entries of each.
            owners: as for `copy`.
            sigmas: as for `copy`.
            targets: as for `copy`, which the caller knows to fit.
            eps: as for `copy`.
        """
        self._store(ends, owners, sigmas, targets, eps)

    def hold(self, owners: Sequence[int], targets: Sequence[Tensor]) -> bool:
        """Whether the tables for such targets have been made, which then stay, as long as the store is there.

        They cannot be made in the capture of a graph, and what is captured reads them at every replay.
        """
        key = _key(owners, targets)
        if key in self._tables:
            self._held.add(key)
        return key in self._tables

    def _store(
        self,
        ends: Ends,
        owners: Sequence[int],
        sigmas: Tensor,
        targets: Sequence[Tensor],
        eps: float,
    ) -> None:
        key = _key(owners, targets)
        tables = self._tables.get(key)
        if tables is None:
            if len(self._tables) - len(self._held) >= _MOST_TABLES:
                self._tables = {held: self._tables[held] for held in self._held}
            tables = self._tables[key] = _tables(owners, targets, sigmas.device)
        with on_device_of(sigmas):
            for dtype, table, spans in tables:
                launch(store_kernel, spans.shape[0], table, spans, ends.memory, ends.table, sigmas, eps, dtype)


def _key(owners: Sequence[int], targets: Sequence[Tensor]) -> tuple[Any, ...]:
    # Whoever gives a tensor another type or form gives it other memory.
    return (tuple(owners), *[target.data_ptr() for target in targets], targets[0].dtype)


def _tables(owners: Sequence[int], targets: Sequence[Tensor], device: torch.device) -> list[tuple[Any, Tensor, Tensor]]:
    """For each type of target the table of vectors and that of spans."""
    rows: dict[torch.dtype, list[list[int]]] = {}
    spans: dict[torch.dtype, list[list[int]]] = {}
    for source, (owner, target) in enumerate(zip(owners, targets, strict=True)):
        row = [0] * _Row.WIDTH
        row[_Row.SOURCE], row[_Row.TARGET] = source, target.data_ptr()
        row[_Row.SIZE], row[_Row.OWNER] = target.numel(), owner
        of_dtype = rows.setdefault(target.dtype, [])
        starts = range(0, target.numel(), _SPAN_ENTRIES)
        spans.setdefault(target.dtype, []).extend([len(of_dtype), start] for start in starts)
        of_dtype.append(row)
    return [
        (TRITON_DTYPES[dtype], torch.tensor(some, device=device), torch.tensor(spans[dtype], device=device))
        for dtype, some in rows.items()
    ]
