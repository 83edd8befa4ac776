"""Upper bounds of norms of matrices for certificates: in float64, every rounding accounted for, tight to 1e-9.

For any c and any triangular L, A A^H = c^2 - L L^H - E with E := c^2 - A A^H - L L^H, and L L^H is not negative, so
||A||^2 <= c^2 + ||E||. With c barely above the norm and L the Cholesky factor of c^2 - A A^H, E is rounding alone, and
is bounded by what is computed of it and what that may be wrong by. This is the idea of Rump 2006 ("Verification of
positive definiteness", BIT 46), but nothing is assumed of how the Cholesky factor was computed, nor of the approximate
norm: a wrong one makes a loose bound and no false one. The proof is in docs/library/rigorous-bounds.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.rounding import (
    binary_scale,
    largest_component,
    next_up,
    norm_above,
    power_of_two,
    product_gamma,
)

__all__ = ["rigorous_largest_norm", "rigorous_matrix_bound", "rigorous_norm_bounds"]

_U = 2.0**-53
# Above what underflow takes from a Gram matrix in scaling and multiplying; far below the rounding of one near to one.
_UNDERFLOW = 2.0**-400
_ATTEMPTS = 3
_EXAMINED = 4  # matrices of a batch whose norm is computed to guess the largest
_SQUARINGS_INSTEAD = 30  # where no factor was found: what is left of the order's logarithm is then below 1e-8


def rigorous_matrix_bound(matrix: Tensor) -> float:
    """An upper bound of the 2-norm of ``matrix``, with all rounding accounted for, above it by 1e-9 of it or less.

    Args:
        matrix: (m, n), real or complex floating of any precision, read exactly.

    Returns:
        Zero for a zero or empty matrix, infinity for one that is not finite.

    Raises:
        UserError: ``matrix`` is not a floating matrix.
    """
    if matrix.ndim != 2:
        raise UserError(f"rigorous_matrix_bound takes one matrix (m, n), got shape {tuple(matrix.shape)}.")
    return rigorous_norm_bounds(matrix).item()


@torch.no_grad()
def rigorous_norm_bounds(matrices: Tensor, *, error: float | Tensor = 0.0) -> Tensor:
    """An upper bound of the 2-norm of each matrix, with all rounding accounted for. It waits for the device.

    Args:
        matrices: (..., m, n), real or complex floating of any precision, read exactly.
        error: how far, in the Frobenius norm, each may be from the matrix that is meant: a number or (...).

    Returns:
        (...), float64: above the norm by 1e-9 of it or less, beside ``error``. Infinity where a matrix or ``error`` is
        not finite.

    Raises:
        UserError: ``matrices`` are not floating matrices, or ``error`` is negative.
    """
    scaled, exponent, largest, error = _prepared(matrices, error)
    bounds = torch.zeros_like(largest)
    usable = (largest > 0) & largest.isfinite()
    if bool(usable.any()):
        gram, slack, frobenius = _gram(scaled[usable])
        squares = _squares(gram, slack, _eigenvalues(gram))
        bounds[usable] = _norms(squares, frobenius, scaled[usable], exponent[usable])
    return _finished(bounds, largest, error).reshape(matrices.shape[:-2])


@torch.no_grad()
def rigorous_largest_norm(matrices: Tensor, *, error: float | Tensor = 0.0) -> float:
    """The maximum of `rigorous_norm_bounds`, for about half the work: the same c for all of them.

    Where many matrices are of one family, such as the symbol of a convolution at its frequencies.

    Args:
        matrices: as there.
        error: as there.

    Returns:
        An upper bound of the norm of all matrices; zero if there are none.

    Raises:
        UserError: as there.
    """
    scaled, exponent, largest, error = _prepared(matrices, error)
    usable = (largest > 0) & largest.isfinite()
    if not bool(usable.all()) or len(largest) <= _EXAMINED:
        bounds = rigorous_norm_bounds(matrices, error=error.reshape(matrices.shape[:-2]))
        return bounds.max().item() if bounds.numel() else 0.0
    # One scale for all, because of the common c: what is much smaller than the largest may underflow.
    shift = (exponent - exponent.max()).clamp_min(-1022)
    scaled = scaled * power_of_two(shift)[:, None, None]
    gram, slack, _ = _gram(scaled)
    examined = _estimates(gram).topk(_EXAMINED).indices
    level = _eigenvalues(gram[examined]).max()
    squares = torch.full_like(slack, math.nan)
    for _ in range(_ATTEMPTS):
        left = squares.isnan()
        squares[left] = _attempt(gram[left], slack[left], (level * _raised(gram)).expand(int(left.sum())))
        left = squares.isnan()
        if not bool(left.any()):
            break
        level = _eigenvalues(gram[left]).max()
    bounds = _norms(squares, norm_above(scaled, (-2, -1)), scaled, exponent.max().expand_as(exponent))
    return _finished(bounds, largest, error).max().item()


def _prepared(matrices: Tensor, error: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the bounds are computed from.

    Returns:
        (batch, m, n) with m <= n, float64 or complex128, near to one; the exponents of the powers of two that it was
        divided by; the largest component of each matrix before; and the error of each.
    """
    if matrices.ndim < 2 or not (matrices.is_floating_point() or matrices.is_complex()):
        raise UserError(f"Expected floating matrices (..., m, n), got {matrices.dtype} {tuple(matrices.shape)}.")
    if not isinstance(error, Tensor):
        error = torch.tensor(error, device=matrices.device)
    if bool((error < 0).any()):
        raise UserError(f"error must be zero or more, got {error.min().item()}.")
    batch = matrices.shape[:-2]
    error = error.to(matrices.device, torch.float64).expand(batch).reshape(-1)
    matrices = matrices.reshape(math.prod(batch), *matrices.shape[-2:])
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float64))
    if matrices.numel() == 0:
        largest = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
        return matrices, torch.zeros_like(largest).long(), largest, error
    largest = largest_component(matrices)
    exponent = binary_scale(largest, matrices.dtype)
    matrices = matrices * power_of_two(-exponent)[:, None, None]
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mH, exponent, largest, error


def _gram(scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A A^H as computed, what its Frobenius norm may be wrong by, and a bound of ||A||_F."""
    frobenius = norm_above(scaled, (-2, -1))
    # 1 + 2^-40: more than all roundings of such a product of a few factors.
    slack = product_gamma(scaled.shape[-1], scaled.dtype) * frobenius**2 * (1 + 2.0**-40) + _UNDERFLOW
    return scaled @ scaled.mH, slack, frobenius


def _eigenvalues(gram: Tensor) -> Tensor:
    """The largest of each, approximately; NaN where the iteration did not end."""
    try:
        return torch.linalg.eigvalsh(gram)[:, -1]
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return torch.full(gram.shape[:1], math.nan, dtype=torch.float64, device=gram.device)


def _raised(gram: Tensor) -> float:
    """What the largest eigenvalue is multiplied by so that the Cholesky decomposition does not fail for rounding."""
    order = gram.shape[-1]
    # It succeeds where the least eigenvalue is above N gamma_{N+1} (Demmel; Higham 2002, theorem 10.7).
    return 1 + (order**2 + 16 * order + 64) * _U * (2 if gram.is_complex() else 1)


def _squares(gram: Tensor, slack: Tensor, eigenvalues: Tensor) -> Tensor:
    """Bounds of the largest eigenvalue of each A A^H; NaN where no factor was found.

    Args:
        gram: (batch, N, N)
        slack: (batch,), what ``gram`` may be wrong by.
        eigenvalues: (batch,), the largest, approximately.
    """
    squares = torch.full_like(slack, math.nan)
    raised = _raised(gram)
    for attempt in range(_ATTEMPTS):
        left = squares.isnan()
        if not bool(left.any()):
            break
        level = eigenvalues[left] * (1 + (raised - 1) * 64**attempt)
        squares[left] = _attempt(gram[left], slack[left], level)
    return squares


def _attempt(gram: Tensor, slack: Tensor, level: Tensor) -> Tensor:
    """c^2 + ||c^2 - A A^H - L L^H|| rounded up, with c^2 = ``level`` and L the Cholesky factor of c^2 - A A^H.

    NaN where there is none.
    """
    order = gram.shape[-1]
    below = torch.diag_embed(level[:, None].expand(-1, order)) - gram
    factor, info = torch.linalg.cholesky_ex(below)
    # The decomposition reads one triangle and may leave the other as it was.
    factor = factor.tril()
    residual = norm_above(below - factor @ factor.mH, (-2, -1))
    # Of the two subtractions; of the product; of the Gram matrix.
    rounding = 2 * _U * (residual + norm_above(below, (-2, -1)))
    product = product_gamma(order, gram.dtype) * norm_above(factor, (-2, -1)) ** 2
    remainder = (residual + rounding + product + slack) * (1 + 2.0**-40)
    return torch.where(info == 0, next_up(level + remainder), math.nan)


def _norms(squares: Tensor, frobenius: Tensor, scaled: Tensor, exponent: Tensor) -> Tensor:
    """Bounds of the norms from those of their squares, and from another method where those are NaN."""
    bounds = next_up(squares.sqrt())
    missing = bounds.isnan()
    if bool(missing.any()):
        bounds[missing] = gram_upper_bound(scaled[missing], num_squarings=_SQUARINGS_INSTEAD)
    # Times a power of two: exact, unless it is denormal.
    return next_up(torch.minimum(bounds, frobenius) * power_of_two(exponent))


def _finished(bounds: Tensor, largest: Tensor, error: Tensor) -> Tensor:
    bounds = torch.where(error > 0, next_up(bounds + error), bounds)
    return torch.where(largest.isfinite() & error.isfinite() & ~bounds.isnan(), bounds, math.inf)


def _estimates(gram: Tensor) -> Tensor:
    """About the largest eigenvalue of each; a guess, good enough to say which are among the largest."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(gram.shape[-1], 2, dtype=gram.dtype, generator=generator).to(gram.device)
    image = gram @ vectors
    for _ in range(8):
        size = torch.linalg.vector_norm(image, dim=-2, keepdim=True).clamp_min(1e-300)
        image = gram @ (image / size)
    return torch.linalg.vector_norm(image, dim=-2).amax(-1)
