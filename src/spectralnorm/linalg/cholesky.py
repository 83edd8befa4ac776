"""Cholesky factorizations with a bound of what they leave, found on the way.

For any L, a Hermitian matrix M has no eigenvalue below -||M - L L^H||. The factor is computed panel by panel. What the
two small steps of a panel leave is computed, whatever computed them, and the rounding of the large one, a product of
matrices, is bounded; which costs half of what multiplying L by its adjoint would. docs/library/rigorous-bounds.md
derives the constants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.rounding import norm_above, product_gamma

__all__ = ["MeasuredCholesky", "measured_cholesky"]

_WIDTH = 16  # of a panel
_UNDERFLOW = 2.0**-900  # above what underflow takes from all products of a matrix near to one


class MeasuredCholesky(NamedTuple):
    """What came of a batch of matrices.

    Attributes:
        passed: (batch,), bool, those of which a factor was found.
        factors: (number of those, n, n); the upper halves mean nothing.
        rests: (number of those,), float64: bounds of ||M - L L^H||_F.
    """

    passed: Tensor
    factors: Tensor
    rests: Tensor


def measured_cholesky(matrices: Tensor) -> MeasuredCholesky:
    """Factorize those of a batch that are positive definite, but for rounding; the others are left early.

    Args:
        matrices: (batch, n, n), float64 or complex128, near to one. Only the lower halves are read; each stands for the
            Hermitian matrix with that half.
    """
    order = matrices.shape[-1]
    index = torch.arange(len(matrices), device=matrices.device)
    passed = torch.zeros_like(index, dtype=torch.bool)
    factors = torch.empty_like(matrices)
    squares = matrices.new_zeros(2, len(matrices), dtype=torch.float64)  # of what is left, of the factor
    for start in range(0, order, _WIDTH):
        width = min(_WIDTH, order - start)
        panel = matrices[:, start:, start : start + width]
        if start:
            done = factors[:, start:, :start]
            panel = torch.baddbmm(panel, done, done[:, :width].mH, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(panel[:, :width])
        found = info == 0
        if not bool(found.all()):
            index, squares, corner = index[found], squares[:, found], corner[found]
            matrices, factors, panel = matrices[found], factors[found], panel[found]
            if not len(index):
                break
        column = factors[:, start:, start : start + width]
        column[:, :width] = corner
        if start + width < order:
            identity = torch.eye(width, dtype=corner.dtype, device=corner.device).expand_as(corner)
            inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
            torch.bmm(panel[:, width:], inverse.mH, out=column[:, width:])
        rest = torch.baddbmm(panel, column, corner.mH, alpha=-1)
        rest[:, :width].tril_()
        squares += torch.stack([_length_above(rest), _length_above(column)]).square()
    left, size = squares
    rounding = 2 * (product_gamma(order, matrices.dtype) + product_gamma(_WIDTH, matrices.dtype))
    # All of a Hermitian matrix is at most its lower half twice; 1 + 2^-30: more than these few operations round.
    rests = ((2 * left).sqrt() + rounding * size) * (1 + rounding) * (1 + 2.0**-30) + _UNDERFLOW
    usable = rests.isfinite()
    if not bool(usable.all()):
        index, factors, rests = index[usable], factors[usable], rests[usable]
    passed[index] = True
    return MeasuredCholesky(passed, factors, rests)


def _length_above(matrices: Tensor) -> Tensor:
    """An upper bound of the Frobenius norm of each of a batch."""
    # Of real numbers: torch takes the modulus of complex ones by hypot first, which is slow.
    numbers = torch.view_as_real(matrices) if matrices.is_complex() else matrices
    return norm_above(numbers.flatten(1), 1)
