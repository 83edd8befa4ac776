"""The Gram matrices of a convolution's symbol at the frequencies of a torus, with what rounding may have changed.

The symbol A + i B of a frequency is a sum over the taps, and its Gram matrix takes two real products: with
P = (A + B)(A - B)^T,

    (A + i B)(A + i B)^H = (P + P^T) / 2 + 2 B B^T + i (P - P^T) / 2.

In each axis this is a trigonometric polynomial of a degree below k, the number of taps, so its values on a grid of
2 k - 1 frequencies are all there is to know of it. Where the torus has more, it is computed on that grid, and the
matrices of the torus are sums of those with real factors (`Interpolation`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.hermitian_batch import HermitianBatch
from spectralnorm.linalg.rounding import gamma
from spectralnorm.linalg.torus import half_of_frequencies

__all__ = ["Interpolation", "SymbolGrams", "SymbolRounding", "SymbolTables"]

_BLOCK = 128  # columns that one product sums; the sums of blocks are added up after
_TABLE_ERROR = 2.0**-48  # of the sine and cosine of a rounded angle below 2 pi


class Interpolation(NamedTuple):
    """Values at frequencies, from those at half of a grid that a real kernel has: the other half is their conjugate.

    Attributes:
        even: factors of the real parts, (frequencies, samples), float64.
        odd: factors of the imaginary parts.
        size: the largest sum of moduli of the factors of one frequency, over the whole grid.
    """

    even: Tensor
    odd: Tensor
    size: float


class SingleTables(NamedTuple):
    """Tables in float32, as kernels read them.

    Attributes:
        cosines: times a power of two, (samples, taps).
        sines: likewise.
        even: factors of the real parts, (samples, frequencies); None: samples and frequencies are the same.
        odd: factors of the imaginary parts.
    """

    cosines: Tensor
    sines: Tensor
    even: Tensor | None
    odd: Tensor | None


class SymbolTables:
    """What depends on the sizes of kernel and torus alone, and so is the same at every step.

    Attributes:
        cosines: of sample times tap, (samples, taps), float64.
        sines: likewise.
        interpolation: from samples to frequencies; None: they are the same.
        num_frequencies: one of each pair that a real kernel makes alike.
    """

    def __init__(self, taps: Sequence[int], sizes: Sequence[int], device: torch.device) -> None:
        frequencies = half_of_frequencies(sizes, device)
        grid = tuple(2 * size - 1 for size in taps)
        samples = half_of_frequencies(grid, device)
        self.num_frequencies = len(frequencies)
        self.interpolation = None
        if len(samples) < len(frequencies):
            self.interpolation = _interpolation(frequencies, sizes, samples, grid)
        else:
            samples, grid = frequencies, tuple(sizes)
        angles = _angles(samples, grid, list(itertools.product(*(range(size) for size in taps))))
        self.cosines, self.sines = angles.cos(), angles.sin()
        self._single: dict[int, SingleTables] = {}

    def in_single_precision(self, exponent: int) -> SingleTables:
        """The same, rounded, with cosines and sines times a power of two; made once for each.

        Args:
            exponent: of that power: of few different ones, and small enough that nothing over- or underflows.
        """
        if exponent not in self._single:
            even, odd = None, None
            if self.interpolation is not None:
                even, odd = (table.float().t().contiguous() for table in self.interpolation[:2])
            cosines, sines = ((table.float() * 2.0**exponent).contiguous() for table in (self.cosines, self.sines))
            self._single[exponent] = SingleTables(cosines, sines, even, odd)
        return self._single[exponent]


def _angles(frequencies: Tensor, sizes: Sequence[int], steps: Sequence[tuple[int, ...]]) -> Tensor:
    """Of each frequency times each step, (frequencies, steps), float64 below 2 pi."""
    # Whole numbers keep the angle exact until its last two operations.
    of_axis = [
        frequencies[:, axis, None] * torch.tensor([step[axis] for step in steps], device=frequencies.device) % size
        for axis, size in enumerate(sizes)
    ]
    common = math.lcm(*sizes)
    turns = torch.stack([turn * (common // size) for turn, size in zip(of_axis, sizes, strict=True)]).sum(0) % common
    return turns.double() * (2 * math.pi / common)


def _interpolation(frequencies: Tensor, sizes: Sequence[int], samples: Tensor, grid: Sequence[int]) -> Interpolation:
    """Of a trigonometric polynomial of degree (grid - 1) / 2 in each axis, by Dirichlet's kernel."""
    mirrored = torch.stack([-samples[:, axis] % size for axis, size in enumerate(grid)], 1)
    here = _dirichlet(frequencies, sizes, samples, grid)
    there = _dirichlet(frequencies, sizes, mirrored, grid) * (mirrored != samples).any(1)
    size = float((here.abs() + there.abs()).sum(1).amax())
    return Interpolation(here + there, here - there, size)


def _dirichlet(frequencies: Tensor, sizes: Sequence[int], samples: Tensor, grid: Sequence[int]) -> Tensor:
    """prod over axes of sum over |d| < (n + 1) / 2 of e^{i d (frequency - sample)} / n, (frequencies, samples)."""
    product = torch.ones(len(frequencies), len(samples), dtype=torch.float64, device=frequencies.device)
    for axis, (size, n) in enumerate(zip(sizes, grid, strict=True)):
        common = math.lcm(size, n)
        turns = frequencies[:, axis, None] * (common // size) - samples[:, axis] * (common // n)
        waves = torch.arange(1, (n + 1) // 2, device=frequencies.device)
        angles = (turns[..., None] * waves % common).double() * (2 * math.pi / common)
        product *= (1 + 2 * angles.cos().sum(-1)) / n
    return product


class SymbolGrams:
    """Of one kernel.

    Attributes:
        dtype: the kernel's.
        device: likewise.
        rows: of a Gram matrix.
        num_matrices: of the frequencies and their groups.
        tap_sum: an upper bound of the sum over taps of ||K_a||_F, for the group that has the largest.
        factor_unit: a Cholesky factor R that LAPACK finds leaves |R^H R - M| <= factor_unit |R|^H |R|, entry by entry.
    """

    def __init__(self, kernel: Tensor, tables: SymbolTables, *, chunk_bytes: int) -> None:
        """Compute nothing yet.

        Args:
            kernel: (number of taps, groups, rows, columns), real, of float32 or float64, its largest entry near to one.
            tables: for its taps.
            chunk_bytes: of Gram matrices that are held at once, beside those of the grid.
        """
        self._kernel, self._tables = kernel.flatten(1), tables
        self.dtype, self.device, (_, self._groups, self.rows, columns) = kernel.dtype, kernel.device, kernel.shape
        self.num_matrices = tables.num_frequencies * self._groups
        self.tap_sum = _tap_sum(kernel)
        self.factor_unit = gamma(self.rows + 4, self.dtype)
        # With ||A + B||_F ||A - B||_F at most ||What||_F^2, a Gram matrix is off by three times a product's gamma.
        terms = min(columns, _BLOCK) + math.ceil(columns / _BLOCK) + 12
        self._rounding = SymbolRounding(
            self.tap_sum, kernel.numel(), len(kernel), product_share=3.04 * gamma(terms, self.dtype), dtype=self.dtype
        )
        matrix_bytes = self._groups * self.rows**2 * 2 * torch.finfo(self.dtype).bits // 8
        self._length = max(1, chunk_bytes // matrix_bytes)

    def __iter__(self) -> Iterator[HermitianBatch]:
        """(frequencies * groups, rows, rows)."""
        tables = self._tables
        parts = zip(tables.cosines.split(self._length), tables.sines.split(self._length), strict=True)
        if tables.interpolation is None:
            for cosines, sines in parts:
                real, imaginary = self._at(cosines, sines)
                yield HermitianBatch(torch.complex(real, imaginary))
            return
        found = [self._at(cosines, sines) for cosines, sines in parts]
        real, imaginary = (torch.cat(each).view(len(tables.cosines), -1) for each in zip(*found, strict=True))
        del found
        even, odd = tables.interpolation.even.to(self.dtype), tables.interpolation.odd.to(self.dtype)
        for of_real, of_imaginary in zip(even.split(self._length), odd.split(self._length), strict=True):
            grams = torch.complex(of_real @ real, of_imaginary @ imaginary)
            yield HermitianBatch(grams.view(-1, self.rows, self.rows))

    def _at(self, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts at some samples, (samples * groups, rows, rows) each."""
        shape = (len(cosines) * self._groups, self.rows, -1)
        real = (cosines.to(self.dtype) @ self._kernel).view(shape)
        imaginary = (sines.to(self.dtype) @ self._kernel).view(shape)
        crossed = _product(real + imaginary, real - imaginary)
        squared = _product(imaginary, imaginary)
        even = (crossed + crossed.mT).mul_(0.5).add_(squared, alpha=2)
        trace = even.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).amax()
        self._rounding.saw_trace(float(trace))
        return even, (crossed - crossed.mT).mul_(0.5)

    def norm_above(self, square: float) -> float:
        """A bound of ||What|| at all frequencies, if the matrices were not above ``square``; after the iteration."""
        return self._rounding.norm_above(square, self._tables.interpolation)


def _tap_sum(kernel: Tensor) -> float:
    """An upper bound of the sum over taps of ||K_a||_F, for the group that has the largest."""
    taps = kernel.flatten(2)
    share = 1 + gamma(taps.shape[-1] + 4, kernel.dtype)
    if share > 1.05:  # as part of small terms alone it need not be sharp
        taps, share = taps.double(), 1 + gamma(taps.shape[-1] + 4)
    # The largest entry is near to one, so what underflows elsewhere is covered by the smallest factor.
    norms = torch.linalg.vector_norm(taps, dim=-1).double() * share + 2.0**-60
    return float(norms.sum(0).amax()) * (1 + 2.0**-40)


class SymbolRounding:
    """By how much computed Gram matrices may be below exact ones; docs/library/convolution-bounds.md derives it."""

    def __init__(self, tap_sum: float, numel: int, num_taps: int, *, product_share: float, dtype: torch.dtype) -> None:
        """For one kernel.

        Args:
            tap_sum: of the kernel.
            numel: its number of entries.
            num_taps: its number of taps.
            product_share: a Gram matrix is at most this times ||What||_F^2 off that of the symbol as computed.
            dtype: that it is computed in.
        """
        self._dtype, self._product_share = dtype, product_share
        # The symbol is off by sqrt(2) gamma of the sum over the taps.
        relative = gamma(num_taps + 2, dtype) + 2 * gamma(1, dtype) + _TABLE_ERROR
        self._symbol_error = 1.42 * relative * tap_sum
        # What underflows when the kernel is scaled is below 2^-149 for each entry.
        self._underflow = numel * 2.0**-100 * (1 + tap_sum)
        self._largest_trace = 0.0

    def saw_trace(self, trace: float) -> None:
        """Of a Gram matrix as computed at a sample."""
        self._largest_trace = max(self._largest_trace, trace)

    def norm_above(self, square: float, interpolation: Interpolation | None) -> float:
        """A bound of ||What|| at all frequencies, if the matrices as computed were not above ``square``."""
        share = self._product_share
        if share >= 0.5:
            return math.inf
        trace = self._largest_trace / (1 - share) * (1 + 2.0**-20)  # above ||What||_F^2 of the symbols as computed
        if interpolation is None:
            return math.sqrt(square + share * trace + self._underflow) + self._symbol_error
        moved = self._symbol_error * (2 * math.sqrt(trace) + self._symbol_error)
        # Rounded factors, the sum of the samples, and what is wrong with a factor beyond its rounding.
        num_samples, num_places = interpolation.even.shape[1], 2 * interpolation.even.shape[1]
        combined = 1.42 * gamma(num_samples + 4, self._dtype) * (1 + share) * trace
        of_factors = num_places * (num_places + 8) * _TABLE_ERROR * (1 + share) * trace
        error = interpolation.size * (1 + 2.0**-20) * (share * trace + moved + combined + self._underflow) + of_factors
        return math.sqrt(square + error)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, summed over blocks of columns."""
    total: Tensor | None = None
    for a, b in zip(left.split(_BLOCK, -1), right.split(_BLOCK, -1), strict=True):
        total = a @ b.mT if total is None else total.add_(a @ b.mT)
    assert total is not None
    return total
