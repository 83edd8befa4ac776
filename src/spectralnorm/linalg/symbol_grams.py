"""The Gram matrices of a convolution's symbol at the frequencies of a torus, with what rounding may have changed.

Two ways to them. The Gram matrices are sums over the shifts d of the kernel against itself,

    What(w) What(w)^H = sum_d R_d e^{i d w},    R_d = sum_a K_{a + d} K_a^T,

so with many frequencies the R_d are formed once for all. With few of them it is less work to form the symbol itself,
A + i B, and then two real products for each frequency instead of three: with P = (A + B)(A - B)^T,

    (A + i B)(A + i B)^H = (P + P^T) / 2 + 2 B B^T + i (P - P^T) / 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.rounding import gamma

__all__ = ["CorrelatedGrams", "DirectGrams", "grams_of"]

_BLOCK = 128  # columns that one product sums; the sums of blocks are added up after
_TABLE_ERROR = 2.0**-48  # of the sine and cosine of a rounded angle below 2 pi


def grams_of(
    kernel: Tensor, taps: Sequence[int], frequencies: Tensor, sizes: Sequence[int], *, chunk_bytes: int
) -> CorrelatedGrams | DirectGrams:
    """Whichever is less work.

    Args:
        kernel: (number of taps, groups, rows, columns), real, of float32 or float64, its largest entry near to one.
        taps: along each axis.
        frequencies: whole numbers j of the frequencies 2 pi j / sizes, (num_frequencies, axes).
        sizes: of the torus.
        chunk_bytes: of Gram matrices that are held at once.
    """
    num_taps = math.prod(taps)
    if 2 * len(frequencies) < (num_taps**2 + num_taps) / 2:
        return DirectGrams(kernel, taps, frequencies, sizes, chunk_bytes=chunk_bytes)
    return CorrelatedGrams(kernel, taps, frequencies, sizes, chunk_bytes=chunk_bytes)


class _Grams:
    """What both ways have in common.

    Attributes:
        tap_sum: an upper bound of the sum over taps of ||K_a||_F, for the group that has the largest.
    """

    def __init__(self, kernel: Tensor, *, chunk_bytes: int) -> None:
        self._dtype, (self._num_taps, self._groups, self._rows, self._columns) = kernel.dtype, kernel.shape
        self.tap_sum = _tap_sum(kernel)
        # What underflows when the kernel is scaled is below 2^-149 for each entry.
        self._underflow = kernel.numel() * 2.0**-100 * (1 + self.tap_sum)
        matrix_bytes = self._groups * self._rows**2 * 2 * torch.finfo(self._dtype).bits // 8
        self._length = max(1, chunk_bytes // matrix_bytes)


def _tap_sum(kernel: Tensor) -> float:
    taps = kernel.flatten(2)
    share = 1 + gamma(taps.shape[-1] + 4, kernel.dtype)
    if share > 1.05:  # as part of small terms alone it need not be sharp
        taps, share = taps.double(), 1 + gamma(taps.shape[-1] + 4)
    # The largest entry is near to one, so what underflows elsewhere is covered by the smallest factor.
    norms = torch.linalg.vector_norm(taps, dim=-1).double() * share + 2.0**-60
    return float(norms.sum(0).amax()) * (1 + 2.0**-40)


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


class DirectGrams(_Grams):
    """Through the symbol at each frequency."""

    def __init__(
        self, kernel: Tensor, taps: Sequence[int], frequencies: Tensor, sizes: Sequence[int], *, chunk_bytes: int
    ) -> None:
        super().__init__(kernel, chunk_bytes=chunk_bytes)
        self._table = _angles(frequencies, sizes, _places(taps))
        self._kernel = kernel.flatten(1)
        self._largest_trace = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        """(frequencies * groups, rows, rows), complex."""
        for angles in self._table.split(self._length):
            real = (angles.cos().to(self._dtype) @ self._kernel).view(-1, self._rows, self._columns)
            imaginary = (angles.sin().to(self._dtype) @ self._kernel).view(-1, self._rows, self._columns)
            crossed = _product(real + imaginary, real - imaginary)
            squared = _product(imaginary, imaginary)
            even = (crossed + crossed.mT).mul_(0.5).add_(squared, alpha=2)
            grams = torch.complex(even, (crossed - crossed.mT).mul_(0.5))
            trace = even.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).amax()
            self._largest_trace = max(self._largest_trace, float(trace))
            yield grams

    def norm_above(self, square: float) -> float:
        """A bound of ||What|| at all frequencies, if the matrices were not above ``square``; after the iteration.

        The symbol is off by ``sqrt(2) gamma`` of the sum over the taps. With ||A + B||_F ||A - B||_F at most
        ||What||_F^2, the Gram matrices are off by three times the gamma of a product's ||What||_F^2, and so is the
        trace, which is that.
        """
        terms = min(self._columns, _BLOCK) + math.ceil(self._columns / _BLOCK) + 12
        share = 3.04 * gamma(terms, self._dtype)
        square_error = math.inf if share >= 0.5 else share / (1 - share) * self._largest_trace * (1 + 2.0**-20)
        relative = gamma(self._num_taps + 2, self._dtype) + 2 * gamma(1, self._dtype) + _TABLE_ERROR
        return math.sqrt(square + square_error + self._underflow) + 1.42 * relative * self.tap_sum


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, summed over blocks of columns."""
    total: Tensor | None = None
    for a, b in zip(left.split(_BLOCK, -1), right.split(_BLOCK, -1), strict=True):
        total = a @ b.mT if total is None else total.add_(a @ b.mT)
    assert total is not None
    return total


class CorrelatedGrams(_Grams):
    """Through the correlations R_d."""

    def __init__(
        self, kernel: Tensor, taps: Sequence[int], frequencies: Tensor, sizes: Sequence[int], *, chunk_bytes: int
    ) -> None:
        super().__init__(kernel, chunk_bytes=chunk_bytes)
        shifts, correlations = _autocorrelation(kernel, _places(taps))
        turned = correlations.mT
        self._even, self._odd = (correlations + turned).flatten(1), (correlations - turned).flatten(1)
        self._even[0] /= 2  # the shift zero is its own mirror image
        self._table = _angles(frequencies, sizes, shifts)
        # Additions that a product goes through: in its block, in its correlation, in its Gram matrix; and roundings
        # of the cosine, of the sum with the transpose, of the product of both. In units of (sum over taps of
        # ||K_a||_F)^2, which bounds the sum over d of || sum over a of |K_{a + d}| |K_a|^T ||_F.
        block = min(self._columns, _BLOCK)
        num_blocks = self._num_taps * math.ceil(self._columns / _BLOCK)
        relative = gamma(block + num_blocks + len(shifts) + 12, kernel.dtype) + _TABLE_ERROR
        self._error = self.tap_sum**2 * 1.01 * relative + self._underflow

    def __iter__(self) -> Iterator[Tensor]:
        """(frequencies * groups, rows, rows), complex."""
        for angles in self._table.split(self._length):
            real, imaginary = angles.cos().to(self._dtype) @ self._even, angles.sin().to(self._dtype) @ self._odd
            yield torch.complex(real, imaginary).view(-1, self._rows, self._rows)

    def norm_above(self, square: float) -> float:
        """As `DirectGrams.norm_above`."""
        return math.sqrt(square + self._error * 1.01)


def _autocorrelation(kernel: Tensor, places: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], Tensor]:
    """R_d for one of each pair of shifts d and -d, zero first: (shifts, groups, rows, rows).

    Args:
        kernel: (taps, groups, rows, columns).
        places: of the taps.
    """
    pairs: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for first, moved in enumerate(places):
        for second, still in enumerate(places[: first + 1]):
            shift = tuple(a - b for a, b in zip(moved, still, strict=True))
            pairs.setdefault(shift, []).append((kernel[first], kernel[second]))
    shifts = sorted(pairs)  # places are in lexicographic order, so none is below zero
    groups, rows = kernel.shape[1:3]
    found = kernel.new_zeros(len(shifts), groups, rows, rows)
    for total, shift in zip(found, shifts, strict=True):
        for moved, still in pairs[shift]:
            for a, b in zip(moved.split(_BLOCK, -1), still.split(_BLOCK, -1), strict=True):
                total += a @ b.mT
    return shifts, found


def _places(taps: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for size in taps)))
