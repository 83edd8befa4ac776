"""Gram matrices of a convolution's symbol, made, iterated and factorized by the compiled kernels.

    packed = PackedKernel(parts, kernel_layout(parts, num_axes))
    for matrices in PanelGrams(packed, exponent, tables):
        value, vectors = matrices.followed(effort, vectors)
        failed = matrices.without_factor(square)

They do what `SymbolGrams` and `HermitianBatch` do in float32, on all threads: a frequency to a thread, whose matrix
stays in that core's cache. Of a Hermitian matrix the lower half is kept, in the panels that panels.h tells of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.compiled import kernels
from spectralnorm.linalg.cpu.tables import floats
from spectralnorm.linalg.hermitian_batch import Effort
from spectralnorm.linalg.rounding import gamma
from spectralnorm.linalg.symbol_grams import SymbolRounding, SymbolTables

__all__ = ["LIMIT", "KernelLayout", "PackedKernel", "PanelGrams", "PanelMatrices", "kernel_layout"]

LIMIT = 40  # of the exponent of a kernel's largest entry, so that no square of an entry over- or underflows
_DEPTH = 64  # columns whose sum is kept in registers
_CHUNK_BYTES = 2**24  # of matrices at once: a few for each thread, and the last cache holds them


class KernelLayout(NamedTuple):
    """How the kernel of a convolution on a torus lies in memory.

    Attributes:
        shape: groups, rows, columns, taps.
        strides: of groups and rows.
        column_offsets: where each column begins, int64.
        tap_offsets: the same of taps.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int]
    column_offsets: Tensor
    tap_offsets: Tensor


def kernel_layout(parts: Tensor, num_axes: int) -> KernelLayout:
    """Of ``parts``, (groups, rows, *columns, *taps) with so many axes of taps."""
    columns, taps = _offsets(parts, 2, parts.ndim - num_axes), _offsets(parts, parts.ndim - num_axes, parts.ndim)
    shape = parts.shape[0], parts.shape[1], len(columns), len(taps)
    return KernelLayout(shape, (parts.stride(0), parts.stride(1)), columns, taps)


def _offsets(parts: Tensor, first: int, last: int) -> Tensor:
    """Where the entries of some axes of a tensor lie, from the first one, in their order; int64."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(parts.shape[first:last], parts.stride()[first:last], strict=True):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        offsets = (offsets[:, None] + steps).flatten()
    return offsets


class PackedKernel:
    """The kernel of a convolution on a torus, with its rows side by side.

    Attributes:
        values: float32, (groups, taps, columns, rows), rows filled up with zeros.
        shape: groups, rows, columns, taps.
        largest: the largest modulus of an entry; NaN if one is.
        tap_sum: the sum over taps of ||K_a||_F, of the group that has the largest, as computed.
    """

    def __init__(self, parts: Tensor, layout: KernelLayout) -> None:
        """Copy it.

        Args:
            parts: float32, or the weight that they are a view of.
            layout: of the parts.
        """
        self.shape = layout.shape
        groups, rows, columns, taps = layout.shape
        panel_rows = _panel_rows()
        self.values = floats(groups * taps * columns * -(-rows // panel_rows) * panel_rows)
        found = torch.empty(2, dtype=torch.float64, device="cpu")
        status = kernels().spectralnorm_pack_kernel(
            parts.data_ptr(),
            *layout.shape,
            *layout.strides,
            layout.column_offsets.data_ptr(),
            layout.tap_offsets.data_ptr(),
            self.values.data_ptr(),
            found.data_ptr(),
            found.data_ptr() + 8,
            torch.get_num_threads(),
        )
        _require_memory(status)
        self.largest, self.tap_sum = found.tolist()


def _panel_rows() -> int:
    return kernels().spectralnorm_panel_rows()


class PanelGrams:
    """As `SymbolGrams`.

    Attributes:
        dtype: float32.
        device: the CPU.
        rows: of a Gram matrix.
        num_matrices: of the frequencies and their groups.
        tap_sum: an upper bound of the sum over taps of ||K_a||_F, for the group that has the largest.
        factor_unit: a factor R that is found leaves |R^H R - M| <= factor_unit |R|^H |R|, entry by entry.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, packed: PackedKernel, exponent: int, tables: SymbolTables) -> None:
        """Compute nothing yet.

        Args:
            packed: the kernel.
            exponent: of the power of two that it is divided by, which brings its largest entry near to one; `LIMIT` at
                most, or minus that.
            tables: for its taps.
        """
        self._kernel, self._tables = packed.values, tables
        self._single = tables.in_single_precision(-exponent)
        self._groups, self.rows, self._columns, self._taps = packed.shape
        self.num_matrices = tables.num_frequencies * self._groups
        # docs/library/convolution-bounds.md derives all three. Sums are of DEPTH columns, and of those sums; in a
        # factor, of two products a column. There an entry loses the products of up to three more, and is divided.
        shallow, num_sums = min(self._columns, _DEPTH), math.ceil(self._columns / _DEPTH)
        summed = packed.tap_sum * 2.0**-exponent * (1 + gamma(shallow + 4, self.dtype))
        self.tap_sum = (summed + self._taps * 2.0**-60) * (1 + 2.0**-24)
        share = 2.84 * gamma(shallow + num_sums + 8, self.dtype)
        self._rounding = SymbolRounding(
            self.tap_sum, len(self._kernel), self._taps, product_share=share, dtype=self.dtype
        )
        self.factor_unit = 1.42 * gamma(2 * _DEPTH + math.ceil(self.rows / _DEPTH) + 12, self.dtype)
        self._matrix_size = kernels().spectralnorm_panel_matrix_size(self.rows)

    def __iter__(self) -> Iterator[PanelMatrices]:
        """Of the frequencies and their groups, as they follow one another in `SymbolGrams`."""
        length = max(1, _CHUNK_BYTES // (4 * self._matrix_size * self._groups))
        single, num_samples = self._single, len(self._single.cosines)
        if single.even is None or single.odd is None:
            for first in range(0, num_samples, length):
                count = min(length, num_samples - first)
                yield self._of(self._at(first, count), count)
            return
        samples = self._at(0, num_samples)
        for first in range(0, self._tables.num_frequencies, length):
            count = min(length, self._tables.num_frequencies - first)
            found = floats(count * self._groups * self._matrix_size)
            kernels().spectralnorm_interpolate(
                samples.data_ptr(),
                num_samples,
                self._groups * self._matrix_size,
                single.even.data_ptr() + 4 * first,
                single.odd.data_ptr() + 4 * first,
                self._tables.num_frequencies,
                count,
                found.data_ptr(),
                torch.get_num_threads(),
            )
            yield self._of(found, count)

    def _of(self, found: Tensor, count: int) -> PanelMatrices:
        return PanelMatrices(found, count * self._groups, self.rows, None)

    def _at(self, first: int, count: int) -> Tensor:
        """The matrices of some samples."""
        found = floats(count * self._groups * self._matrix_size)
        trace = torch.empty(1, dtype=torch.float64, device="cpu")
        place = 4 * first * self._taps
        status = kernels().spectralnorm_symbol_grams(
            self._kernel.data_ptr(),
            self._groups,
            self.rows,
            self._columns,
            self._taps,
            self._single.cosines.data_ptr() + place,
            self._single.sines.data_ptr() + place,
            count,
            found.data_ptr(),
            trace.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory(status)
        self._rounding.saw_trace(trace.item())
        return found

    def norm_above(self, square: float) -> float:
        """As `SymbolGrams.norm_above`."""
        return self._rounding.norm_above(square, self._tables.interpolation)


class PanelMatrices:
    """As `HermitianBatch`: matrices in panels, or some of them."""

    def __init__(self, matrices: Tensor, count: int, rows: int, which: Tensor | None) -> None:
        """Keep them.

        Args:
            matrices: float32, in the order of panels.h.
            count: of those that are meant.
            rows: of one.
            which: the place of each; None: the first ``count``.
        """
        self._matrices, self._count, self._rows, self._which = matrices, count, rows, which

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __getitem__(self, places: Tensor) -> PanelMatrices:
        """Those at some places."""
        places = places if self._which is None else self._which[places]
        return PanelMatrices(self._matrices, len(places), self._rows, places.contiguous())

    def followed(self, effort: Effort, vectors: Tensor | None) -> tuple[float, Tensor]:
        """As `Matrices.followed`."""
        shape = (self._count, self._rows)
        found = torch.empty(shape, dtype=torch.complex64, device="cpu")
        if vectors is not None:
            found.copy_(vectors)
        values = torch.empty(self._count, dtype=torch.float64, device="cpu")
        status = kernels().spectralnorm_follow(
            self._matrices.data_ptr(),
            None if self._which is None else self._which.data_ptr(),
            self._count,
            self._rows,
            effort.iterations,
            effort.num_leading,
            effort.more_iterations,
            vectors is None,
            found.data_ptr(),
            values.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory(status)
        return values.amax().item(), found

    def without_factor(self, square: float) -> Tensor | None:
        """As `Matrices.without_factor`."""
        failed = torch.empty(self._count, dtype=torch.int64, device="cpu")
        count = kernels().spectralnorm_factorize(
            self._matrices.data_ptr(),
            None if self._which is None else self._which.data_ptr(),
            self._count,
            self._rows,
            square,
            failed.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory(count < 0)
        return failed[:count] if count else None


def _require_memory(is_missing: int | bool) -> None:
    if is_missing:
        raise MemoryError("There is no memory for the Gram matrices of a convolution.")
