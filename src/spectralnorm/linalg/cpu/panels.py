"""Gram matrices of a convolution's symbol, made, iterated and factorized by the compiled kernels.

    grams = PanelGrams(PackedKernel(torus), exponent, tables)
    for matrices in grams:
        values, vectors = matrices.rayleigh(2, vectors)
        passed = matrices.have_factor(square)

They do what `SymbolGrams` and `HermitianBatch` do in float32, on all threads: a frequency to a thread, whose matrix
stays in that core's cache. Of a Hermitian matrix the lower half is kept, in the panels that symbols.c tells of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.compiled import is_trusted, kernels
from spectralnorm.linalg.cpu.tables import floats
from spectralnorm.linalg.rounding import gamma
from spectralnorm.linalg.symbol_grams import SymbolRounding, SymbolTables, tap_sum
from spectralnorm.linalg.torus import OnTorus

__all__ = ["LIMIT", "PackedKernel", "PanelGrams", "PanelMatrices", "can_be_in_panels"]

LIMIT = 40  # of the exponent of a kernel's largest entry
_DEPTH = 64  # columns whose sum is kept in registers
_FEW_ROWS = 8  # fewer in each of several groups would fill panels with zeros
_CHUNK_BYTES = 2**24  # of matrices at once: a few for each thread, and the last cache holds them


def can_be_in_panels(torus: OnTorus) -> bool:
    """Whether `PanelGrams` takes the kernel of a convolution that was brought to a torus, and is worth it."""
    parts = torus.parts
    is_single = parts.dtype in (torch.float32, torch.bfloat16, torch.float16)
    is_worth_it = parts.shape[0] == 1 or parts.shape[1] >= _FEW_ROWS
    return parts.device.type == "cpu" and is_single and is_worth_it and parts.numel() > 0 and is_trusted()


class PackedKernel:
    """The kernel of a convolution that was brought to a torus, with its rows side by side.

    Attributes:
        values: float32, (groups, taps, columns, rows), rows filled up with zeros.
        shape: (groups, rows, columns, taps).
        order: rows, filled up.
        largest: the largest modulus of an entry; NaN if one is.
    """

    def __init__(self, torus: OnTorus) -> None:
        """Copy it.

        Args:
            torus: one that `can_be_in_panels`.
        """
        parts = torus.parts.to(torch.float32)
        columns, taps = (_offsets(parts, *each) for each in ((2, -len(torus.sizes)), (-len(torus.sizes), None)))
        groups, rows = parts.shape[:2]
        panel_rows = kernels().spectralnorm_panel_rows()
        num_panels = -(-rows // panel_rows)
        self.shape, self.order = (groups, rows, len(columns), len(taps)), num_panels * panel_rows
        self.values = floats(groups * len(taps) * len(columns) * self.order)
        largest = floats(groups * num_panels)
        kernels().spectralnorm_pack_kernel(
            parts.data_ptr(),
            *self.shape,
            *parts.stride()[:2],
            columns.data_ptr(),
            taps.data_ptr(),
            self.values.data_ptr(),
            largest.data_ptr(),
            torch.get_num_threads(),
        )
        self.largest = largest.amax().double()


class PanelGrams:
    """As `SymbolGrams`.

    Attributes:
        dtype: float32.
        tap_sum: an upper bound of the sum over taps of ||K_a||_F, for the group that has the largest.
        factor_unit: a factor R that is found leaves |R^H R - M| <= factor_unit |R|^H |R|, entry by entry.
    """

    dtype = torch.float32

    def __init__(self, packed: PackedKernel, exponent: int, tables: SymbolTables) -> None:
        """Compute nothing yet.

        Args:
            packed: the kernel.
            exponent: of the power of two that it is divided by, which brings its largest entry near to one; `LIMIT` at
                most, or minus that, so that no square over- or underflows before.
            tables: for its taps.
        """
        self._kernel, self._order, self._tables = packed.values, packed.order, tables
        self._groups, self._rows, self._columns, self._taps = packed.shape
        scale = 2.0**-exponent
        self.tap_sum = tap_sum(packed.values.view(self._groups, self._taps, -1).transpose(0, 1), scale)
        single = tables.in_single_precision()
        # The symbol is a sum of products with these.
        self._cosines, self._sines = single.cosines * scale, single.sines * scale
        # Each sum is of 2 DEPTH products and of what came of them. A factor's entry loses the products of up to three
        # more columns, and is divided.
        terms = 2 * min(self._columns, _DEPTH) + math.ceil(self._columns / _DEPTH) + 8
        self._rounding = SymbolRounding(
            self.tap_sum,
            len(packed.values),
            self._taps,
            product_share=1.42 * gamma(terms, self.dtype),
            dtype=self.dtype,
        )
        self.factor_unit = 1.42 * gamma(2 * _DEPTH + math.ceil(self._order / _DEPTH) + 12, self.dtype)
        self._matrix_size = self._order * (self._order + kernels().spectralnorm_panel_rows())

    def __iter__(self) -> Iterator[PanelMatrices]:
        """Of the frequencies and their groups, as they follow one another in `SymbolGrams`."""
        bytes_of_one = 4 * self._matrix_size * self._groups
        length = max(1, _CHUNK_BYTES // bytes_of_one)
        single = self._tables.in_single_precision()
        num_samples = len(self._cosines)
        if single.even is None or single.odd is None:
            for first in range(0, num_samples, length):
                yield self._of(self._at(first, min(length, num_samples - first)))
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
            yield self._of(found)

    def _of(self, found: Tensor) -> PanelMatrices:
        return PanelMatrices(found, len(found) // self._matrix_size, self._order, self._rows, None)

    def _at(self, first: int, count: int) -> Tensor:
        """The matrices of some samples."""
        found = floats(count * self._groups * self._matrix_size)
        trace = torch.zeros(1, dtype=torch.float64, device="cpu")
        status = kernels().spectralnorm_symbol_grams(
            self._kernel.data_ptr(),
            self._groups,
            self._order,
            self._columns,
            self._taps,
            self._cosines[first].data_ptr(),
            self._sines[first].data_ptr(),
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

    def __init__(self, matrices: Tensor, count: int, order: int, rows: int, which: Tensor | None) -> None:
        """Keep them.

        Args:
            matrices: float32, in the order of symbols.c.
            count: of those that are meant.
            order: rows of one, filled up.
            rows: of one.
            which: the index of each; None: the first ``count``.
        """
        self._matrices, self._count, self._order, self._rows, self._which = matrices, count, order, rows, which

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __getitem__(self, which: Tensor) -> PanelMatrices:
        """Those of an index, or those that a mask is true for."""
        index = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        index = index if self._which is None else self._which[index]
        return PanelMatrices(self._matrices, len(index), self._order, self._rows, index.contiguous())

    def rayleigh(self, num_iterations: int, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Matrices.rayleigh`."""
        shape = (self._count, self._rows)
        is_cold = vectors is None
        found = (
            torch.empty(shape, dtype=torch.complex64, device="cpu")
            if is_cold
            else vectors.clone(memory_format=torch.contiguous_format)
        )
        values = torch.empty(self._count, dtype=torch.float64, device="cpu")
        status = kernels().spectralnorm_iterate(
            self._matrices.data_ptr(),
            None if self._which is None else self._which.data_ptr(),
            self._count,
            self._order,
            self._rows,
            num_iterations,
            is_cold,
            found.data_ptr(),
            values.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory(status)
        return values, found

    def have_factor(self, square: float) -> Tensor:
        """As `Matrices.have_factor`."""
        passed = torch.empty(self._count, dtype=torch.int8, device="cpu")
        status = kernels().spectralnorm_factorize(
            self._matrices.data_ptr(),
            None if self._which is None else self._which.data_ptr(),
            self._count,
            self._order,
            square,
            passed.data_ptr(),
            torch.get_num_threads(),
        )
        _require_memory(status)
        return passed.bool()


def _offsets(parts: Tensor, first: int, last: int | None) -> Tensor:
    """Where the entries of some axes of a tensor lie, from the first one, in their order; int64."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(parts.shape[first:last], parts.stride()[first:last], strict=True):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        offsets = (offsets[:, None] + steps).flatten()
    return offsets


def _require_memory(status: int) -> None:
    if status:
        raise MemoryError("There is no memory for the factorization of a convolution's Gram matrices.")
