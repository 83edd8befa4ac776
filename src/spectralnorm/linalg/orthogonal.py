"""Matrices made orthogonal, or their singular values brought below a limit, as functions that can be differentiated.

In exact arithmetic all of them are below their limit; `rescaled_below` makes it true of the rounded numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.rounding import binary_exponent, power_of_two, round_up

__all__ = ["bjorck", "cayley", "rescaled_below", "soft_cap"]


def bjorck(matrix: Tensor, *, num_iterations: int = 15, num_squarings: int = 3) -> Tensor:
    """Björck and Bowie's iteration towards the nearest orthogonal matrix (1971; order 1, as in Anil et al. 2019).

    ``A <- A (3 - A^H A) / 2`` takes each singular value s to ``s (3 - s^2) / 2`` and leaves the vectors. That map's
    maximum over [0, 2] is 1, at 1. So the matrix is first divided by a bound of its norm, and then the singular values
    rise towards 1 and do not pass it: **whenever the iteration stops, the norm is at most 1**, and the smaller singular
    values are below 1, by much if they were small: each iteration makes a small one 1.5 times as large. Those that are
    zero stay zero.

    Args:
        matrix: (..., m, n), real or complex.
        num_iterations: 15 bring singular values from a two-hundredth of the largest to 0.9, 20 from a thousandth to 1.
        num_squarings: of the Gram matrix, for the bound. A tight one saves iterations.

    Returns:
        As ``matrix``. Zero for zero.

    Raises:
        UserError: no matrix, or a negative number.
    """
    _require_matrix(matrix, "bjorck")
    if num_iterations < 0 or num_squarings < 0:
        raise UserError(
            f"num_iterations and num_squarings must be zero or more, got {num_iterations} and {num_squarings}."
        )
    transposes = matrix.shape[-2] < matrix.shape[-1]
    tall = matrix.mH if transposes else matrix
    tall = tall / _smooth_bound(tall, num_squarings)[..., None, None]
    for _ in range(num_iterations):
        tall = 1.5 * tall - 0.5 * tall @ (tall.mH @ tall)
    return tall.mH if transposes else tall


def _smooth_bound(tall: Tensor, num_squarings: int) -> Tensor:
    """The norm's bound from Gram iteration, as a function with derivatives; one for a zero matrix."""
    # Rounding may leave it below the norm, by a few units: the iteration bears singular values up to two.
    largest = tall.detach().abs().amax((-2, -1)) if tall.numel() else tall.new_zeros(tall.shape[:-2]).real
    is_zero = largest == 0
    scale = power_of_two(binary_exponent(largest.double()).clamp(-120, 120)).to(largest.dtype)
    tall = tall / scale[..., None, None]
    gram = tall.mH @ tall
    bound, power = None, 0.5
    for _ in range(num_squarings + 1):
        # Divided by its own norm each time: the roots of these norms multiply up to the bound.
        size = torch.where(is_zero, 1.0, torch.linalg.vector_norm(gram, dim=(-2, -1)))
        gram = gram / size[..., None, None]
        bound = size**power if bound is None else bound * size**power
        gram, power = gram @ gram, power / 2
    assert bound is not None
    return bound * scale


def cayley(matrix: Tensor) -> Tensor:
    """A matrix with orthonormal columns (or rows, if it is wide) from any, by the Cayley transform.

    For a square block ``U`` above the rest ``V``: with ``A = U - U^H + V^H V`` the columns of
    ``[(I - A) (I + A)^-1; -2 V (I + A)^-1]`` are orthonormal (Trockman and Kolter 2021, section 3, which is the
    classical transform for ``V = 0``). ``I + A`` can always be inverted: its Hermitian part is ``I + V^H V``. One
    solve, no iteration; not the nearest orthogonal matrix, and of the square ones it reaches only those without the
    eigenvalue -1.

    Args:
        matrix: (..., m, n), real or complex.

    Returns:
        As ``matrix``; all singular values are 1.

    Raises:
        UserError: no matrix.
    """
    _require_matrix(matrix, "cayley")
    if matrix.shape[-2] < matrix.shape[-1]:
        return cayley(matrix.mH).mH
    order = matrix.shape[-1]
    upper, lower = matrix[..., :order, :], matrix[..., order:, :]
    skew = upper - upper.mH + lower.mH @ lower
    identity = torch.eye(order, dtype=matrix.dtype, device=matrix.device)
    above = torch.cat((identity - skew, -2 * lower), dim=-2)
    return torch.linalg.solve(identity + skew, above, left=False)


def soft_cap(matrix: Tensor, limit: float = 1.0) -> Tensor:
    """Singular values s become ``s / sqrt(1 + (s / limit)^2)``: almost as they were far below the limit, never above.

    With the Cholesky factor ``L L^H = I + A^H A / limit^2``, that is ``A L^-H``: its product with its adjoint is
    ``A (I + A^H A / limit^2)^-1 A^H``. The left singular vectors stay (for a wide matrix the right ones); the others
    turn with ``L``. No iteration, and no singular value loses its gradient, as with a hard cap. A smooth stand-in for
    the projection ``min(s, limit)`` (Yoshida and Miyato 2017 penalize, Sedghi et al. 2019 clip).

    Args:
        matrix: (..., m, n), real or complex, of norm below about 1e3 limits in float32: beyond, rounding shows.
        limit: positive.

    Returns:
        As ``matrix``.

    Raises:
        UserError: no matrix, or a limit that is not positive.
    """
    _require_matrix(matrix, "soft_cap")
    if not limit > 0:
        raise UserError(f"limit must be positive, got {limit}.")
    if matrix.shape[-2] < matrix.shape[-1]:
        return soft_cap(matrix.mH, limit).mH
    scaled = matrix / limit
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky(identity + scaled.mH @ scaled)
    return torch.linalg.solve_triangular(factor.mH, matrix, upper=True, left=False)


def rescaled_below(matrix: Tensor, limit: float = 1.0, *, num_squarings: int = 5) -> Tensor:
    """The matrix divided by what its norm may be above ``limit``, so that the stored result is not above it.

    The divisor is `gram_upper_bound` over the limit, which for nearly orthogonal float32 matrices is some 1e-4 too
    large; a matrix that is bounded by the limit already is returned as it is. No gradient goes through the divisor,
    which is one but for rounding where this is meant for.

    Args:
        matrix: (..., m, n).
        limit: positive.
        num_squarings: see `gram_upper_bound`.

    Returns:
        As ``matrix``: the norm of the stored numbers is at most ``limit``.
    """
    excess = gram_upper_bound(matrix, num_squarings=num_squarings) / limit * (1 + 2.0**-50)
    # Rounding changes every entry by half an eps of it, so the norm by sqrt(rank) times that, at most.
    format = torch.finfo(matrix.dtype)
    relative = 1 + format.eps * (min(matrix.shape[-2:]) ** 0.5 + 2)
    denormals = format.smallest_normal * format.eps * math.sqrt(2 * math.prod(matrix.shape[-2:])) / limit
    excess = torch.where(excess > 1, excess * (relative + denormals), 1.0)
    return matrix / round_up(excess, matrix.real.dtype)[..., None, None]


def _require_matrix(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or not (matrix.is_floating_point() or matrix.is_complex()):
        raise UserError(f"{name} takes floating matrices (..., m, n), got {matrix.dtype} {tuple(matrix.shape)}.")
