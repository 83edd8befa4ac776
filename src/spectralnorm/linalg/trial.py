"""An upper bound of the 2-norm of a matrix for which a leading singular vector is known: guess it, then prove it.

With a vector that was tracked, the norm is known to several digits before anything is proved. That the guess c is above
it takes one product and one Cholesky factorization, of c^2 I - A A^H, a fraction of what Gram iteration costs
(`spectralnorm.linalg.gram`). The constants are those of docs/library/rigorous-bounds.md, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.linalg.gram import gram_matrix, gram_upper_bound
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rounding import binary_scale, gamma, largest_component, next_up, power_of_two

__all__ = ["tried_upper_bound"]

# What is tried above the estimate of the squared norm, relative, before the bound that needs no estimate.
_MARGINS = (1e-4, 1e-3, 8e-3)


@torch.no_grad()
def tried_upper_bound(matrix: Tensor, vector: Tensor) -> Tensor:
    """As `gram_upper_bound`, mostly within 1.001 times the norm if ``vector`` is good; beside the CPU the same.

    Looks at numbers, so not for what is traced or compiled.

    Args:
        matrix: (..., m, n), real or complex floating.
        vector: (..., min(m, n)), near to the leading singular vector of the shorter side (left if m <= n).

    Returns:
        (...), float64. Zero for a zero or empty matrix, infinity for one that is not finite.
    """
    # Rump's bound of a factorization is one of LAPACK's; a device's library may invert blocks. One row has a length.
    if matrix.device.type != "cpu" or matrix.numel() == 0 or min(matrix.shape[-2:]) == 1:
        return gram_upper_bound(matrix, vector=vector)
    batch = matrix.shape[:-2]
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    vector = vector.reshape(-1, vector.shape[-1])
    with full_precision(matrix.device):
        bounds = _tried(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), vector)
    missing = bounds.isnan()
    if bool(missing.any()):
        bounds[missing] = gram_upper_bound(matrix[missing], vector=vector[missing])
    return bounds.reshape(batch)


def _tried(matrix: Tensor, vector: Tensor) -> Tensor:
    """(batch, m, n) -> (batch,); NaN where nothing was proved."""
    exponent = binary_scale(largest_component(matrix), matrix.dtype)
    scale = power_of_two(-exponent)
    # Exact, but for entries so small beside the largest that they underflow, which `gram_matrix` pays for.
    factor = matrix * scale.to(matrix.real.dtype)[:, None, None]
    factor = factor if factor.shape[-2] <= factor.shape[-1] else factor.mH
    gram, relative = gram_matrix(factor)
    order = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    original = diagonal.real.clone()
    trace = original.sum(-1)
    error = trace * (relative * (1 + 2 * relative) * (1 + 2 * gamma(order + 4)))
    estimate = _estimate(factor, vector)
    bounds = torch.full_like(trace, torch.nan)
    gram = gram.neg_()
    # The factorization R of M has |R^H R - M| <= gamma |R|^H |R|, so no eigenvalue of M is below minus gamma / (1 -
    # gamma) tr M (Rump 2006), and tr M <= order c^2; the diagonal was rounded by one subtraction.
    unit = gamma(order + 4) * (4 if gram.is_complex() else 1)
    share = 1 + (unit / (1 - unit) * order * 1.01 + 2.1 * gamma(1)) * 1.01
    for margin in _MARGINS:
        todo = (bounds.isnan() & (estimate > 0) & estimate.isfinite()).nonzero()[:, 0]
        if not len(todo):
            break
        square = estimate[todo] * (1 + margin)
        all_of_them = len(todo) == len(gram)
        below = gram if all_of_them else gram[todo]
        below.diagonal(dim1=-2, dim2=-1).copy_(square[:, None] - original[todo])
        _, info = torch.linalg.cholesky_ex(below)
        norm = next_up(((square * share + error[todo]) * (1 + 2.0**-50)).sqrt()) * (1 + 2.0**-50)
        bounds[todo] = torch.where(info == 0, norm, torch.nan)
    return next_up(bounds * power_of_two(exponent))


def _estimate(factor: Tensor, vector: Tensor) -> Tensor:
    """The squared norm that the vectors show, (batch,), in float64; NaN or zero for those that show none."""
    rows = vector.conj().to(factor.dtype)[:, None]
    image = torch.linalg.vector_norm((rows @ factor)[:, 0], dim=-1).double()
    return (image / torch.linalg.vector_norm(rows[:, 0], dim=-1)).square()
