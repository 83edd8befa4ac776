"""A batch of Hermitian matrices: about their largest eigenvalue, and whether a multiple of the identity is above them.

`spectralnorm.linalg.cpu.panels` has another one, with the same methods and matrices in panels.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from spectralnorm.linalg.cholesky import measured_cholesky
from spectralnorm.linalg.rounding import gamma, norm_above, product_gamma

__all__ = ["Effort", "HermitianBatch", "Matrices", "leading_places"]

_Some = TypeVar("_Some", bound="Matrices")


class Effort(NamedTuple):
    """What is done to guess the largest eigenvalue of many matrices.

    Attributes:
        iterations: of power iteration, for each.
        num_leading: how many of them, those with the largest quotients then, are iterated on.
        more_iterations: as often.
    """

    iterations: int
    num_leading: int
    more_iterations: int


class Matrices(Protocol):
    """What a search among matrices G asks of them."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self: _Some, places: Tensor) -> _Some:
        """Those at some places, an index."""
        ...

    def followed(self, effort: Effort, vectors: Tensor | None) -> tuple[float, Tensor]:
        """About the largest eigenvalue of all, not above it but for rounding; and vectors for the next time.

        Args:
            effort: to make.
            vectors: to start from, (batch, rows), complex; None: a column of each matrix.
        """
        ...

    def without_factor(self, square: float) -> Tensor | None:
        """The places of those for which ``square`` I - G has no Cholesky factor; None if there are none."""
        ...


class HermitianBatch:
    """`Matrices` as a tensor.

    Attributes:
        matrices: (batch, rows, rows), complex.
    """

    def __init__(self, matrices: Tensor) -> None:
        """Keep them."""
        self.matrices = matrices

    def __len__(self) -> int:
        """How many there are."""
        return len(self.matrices)

    def __getitem__(self, places: Tensor) -> HermitianBatch:
        """Those at some places, an index."""
        return HermitianBatch(self.matrices[places])

    def followed(self, effort: Effort, vectors: Tensor | None) -> tuple[float, Tensor]:
        """As `Matrices.followed`."""
        values, vectors = self.rayleigh(effort.iterations, vectors)
        leading = leading_places(values, effort.num_leading)
        values, vectors[leading] = self[leading].rayleigh(effort.more_iterations, vectors[leading])
        return float(values.amax()), vectors

    def rayleigh(self, num_iterations: int, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rayleigh quotients after power iteration, (batch,), and the vectors, (batch, rows)."""
        # Rows from the left, x G = (conj(G) x^T)^T, are several times faster, and conj(G) has the eigenvalues of G.
        rows = (self._start() if vectors is None else vectors)[:, None]
        tiny = torch.finfo(self.matrices.dtype).tiny
        for _ in range(num_iterations):
            rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(tiny)
            rows = rows @ self.matrices
        rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(tiny)
        return torch.linalg.vecdot(rows, rows @ self.matrices)[:, 0].real, rows[:, 0]

    def _start(self) -> Tensor:
        """The column with the largest diagonal entry of each, (batch, rows): no stranger to the leading eigenvector."""
        diagonal = self.matrices.diagonal(dim1=-2, dim2=-1).real
        index = diagonal.argmax(-1)[:, None, None].expand(-1, self.matrices.shape[-1], 1)
        return self.matrices.gather(-1, index)[..., 0].conj()

    def largest_eigenvalue(self) -> float:
        """Of all."""
        return float(torch.linalg.eigvalsh(self.matrices).amax())

    def without_factor(self, square: float) -> Tensor | None:
        """As `Matrices.without_factor`."""
        return _places(torch.linalg.cholesky_ex(self._below(square)).info != 0)

    def without_measured_factor(self, square: float) -> tuple[Tensor | None, float]:
        """As `without_factor`, whatever computes factors L; and what ||M - L L^H||_F is not above for any of those."""
        shifted = self._below(square)
        factors, info = torch.linalg.cholesky_ex(shifted)
        passed = info == 0
        rest = _rest_above(shifted[passed], factors[passed]) if bool(passed.any()) else 0.0
        return _places(~passed), rest

    def without_factor_measured_on_the_way(self, square: float) -> tuple[Tensor | None, float]:
        """As `without_measured_factor`, faster for many large matrices in float64."""
        passed, _, rests = measured_cholesky(self._below(square))
        return _places(~passed), max(rests.tolist(), default=0.0)

    def _below(self, square: float) -> Tensor:
        shifted = -self.matrices
        shifted.diagonal(dim1=-2, dim2=-1).add_(square)
        return shifted


def leading_places(values: Tensor, count: int) -> Tensor:
    """Those of the ``count`` largest, or of all if there are not so many."""
    return values.topk(min(count, len(values))).indices


def _places(mask: Tensor) -> Tensor | None:
    return mask.nonzero()[:, 0] if bool(mask.any()) else None


def _rest_above(matrices: Tensor, factors: Tensor) -> float:
    """What ||M - L L^H||_F is not above for any of a batch: then no eigenvalue of M is below minus that.

    Whatever computed L. The product is rounded by `product_gamma` ||L||_F^2 at most, the difference relative to itself.
    """
    order = factors.shape[-1]
    num_blocks = 4 if order >= 64 else 1
    square = 0.0
    for block in range(num_blocks):
        start, end = order * block // num_blocks, order * (block + 1) // num_blocks
        # The lower half is a third of the multiplications, because L ends at its diagonal; the upper half mirrors it.
        rest = matrices[:, start:, start:end] - factors[:, start:, :end] @ factors[:, start:end, :end].mH
        diagonal, below = rest[:, : end - start], rest[:, end - start :]
        square = square + _length_above(diagonal) ** 2 + 2 * _length_above(below) ** 2
    # Of what was computed of M, in case its halves do not mirror each other to the last digit.
    rest = torch.as_tensor(square).sqrt() * (1 + 2.0**-48) + _length_above(matrices - matrices.mH)
    rest = rest * (1 + 2 * gamma(1, factors.dtype))
    size = _length_above(factors)
    return float((rest + product_gamma(order, factors.dtype) * size.square() * (1 + 2.0**-50)).amax())


def _length_above(matrices: Tensor) -> Tensor:
    """An upper bound of the Frobenius norm of each of a batch."""
    # Of real numbers: torch takes the modulus of complex ones by hypot first, which is slow.
    return norm_above(torch.view_as_real(matrices).double(), (-3, -2, -1))
