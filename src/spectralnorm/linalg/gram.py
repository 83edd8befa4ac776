"""A guaranteed upper bound of the 2-norm of a matrix, cheap enough for every training step.

Gram iteration (Delattre et al. 2023): with G = A A^H and G <- G G^H, ||A||^(2^t) <= ||G||_F. In floating point that is
no bound: it falls below the norm of some matrices. Here every product's rounding error is bounded and carried
back, powers of two keep the range, and a deflated bound of ||G|| takes the place of ||G||_F. The proof of the constants
is in docs/library/rigorous-bounds.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.precision import full_precision, is_full_precision
from spectralnorm.linalg.rounding import binary_scale, gamma, largest_component, norm_above, power_of_two, product_gamma

__all__ = ["gram_matrix", "gram_upper_bound"]

_U64 = 2.0**-53
_BLOCK = 64  # columns summed in float32 before the sum goes on in float64
_BLOCK_PAYS_FROM = 3e-4  # estimated relative margin of a product that is not blocked
_BLOCK_BYTES = {"cpu": 2**21}  # of products held at once: what a core's cache holds; elsewhere memory decides
_BLOCK_BYTES_ELSEWHERE = 2**27
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


@torch.no_grad()
def gram_upper_bound(matrix: Tensor, *, vector: Tensor | None = None, num_squarings: int = 5) -> Tensor:
    """A number that the 2-norm of each matrix, as stored, does not exceed.

    Gram iteration with its rounding accounted for. It never waits for the device, and works under ``torch.compile`` and
    in CUDA graphs. No gradient goes through it.

    Args:
        matrix: (..., m, n), real or complex floating. Half types are read as float32, exactly.
        vector: (..., min(m, n)), an approximate leading singular vector of the shorter side (left if m <= n). It only
            tightens, and little after several squarings; zero or not finite, it is not used.
        num_squarings: products of the Gram matrix with itself. Each halves the logarithm of what the bound is above the
            norm, down to the rounding margin of a few units of ``m n u``.

    Returns:
        (...), float64. Zero for a zero or empty matrix, infinity for one that is not finite.

    Raises:
        UserError: ``matrix`` is no floating matrix, or ``num_squarings`` is negative.
    """
    if matrix.ndim < 2 or not (matrix.is_floating_point() or matrix.is_complex()):
        raise UserError(
            f"gram_upper_bound takes floating matrices (..., m, n), got {matrix.dtype} {tuple(matrix.shape)}."
        )
    if num_squarings < 0:
        raise UserError(f"num_squarings must be zero or more, got {num_squarings}.")
    batch = matrix.shape[:-2]
    if matrix.numel() == 0:
        return torch.zeros(batch, dtype=torch.float64, device=matrix.device)
    dtype = _working_dtype(matrix)
    matrix = matrix.reshape(-1, *matrix.shape[-2:]).to(dtype)
    if vector is not None:
        vector = vector.reshape(-1, vector.shape[-1])
    with full_precision(matrix.device):
        return _bounds(matrix, vector, num_squarings).reshape(batch)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    least = torch.float32
    if torch.compiler.is_compiling() and not is_full_precision(matrix.device):
        least = torch.float64  # to which no reduced precision applies
    return torch.promote_types(matrix.dtype, least)


def _bounds(matrix: Tensor, vector: Tensor | None, num_squarings: int) -> Tensor:
    """(batch, m, n) in a working dtype -> (batch,)."""
    real = _REAL.get(matrix.dtype, matrix.dtype)
    largest = largest_component(matrix)
    if min(matrix.shape[-2:]) == 1:
        return _lengths_above(matrix, largest)
    factor = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH

    size = largest
    exponents, errors = [], []
    for squared in range(num_squarings + 1):
        exponent = binary_scale(size, matrix.dtype)
        # Exact, but for entries so small beside the largest that they underflow.
        factor = factor * power_of_two(-exponent).to(real)[:, None, None]
        gram, relative = _product_with_adjoint(factor, squared)
        trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=torch.float64)
        # The diagonal has no cancellation, so it gives ||factor||_F^2 up to the same relative error.
        exponents.append(exponent)
        errors.append(trace * (relative * (1 + 2 * relative) * (1 + 2 * gamma(gram.shape[-1] + 4))))
        factor, size = gram, trace

    bound = _norm_bound_of_hermitian(factor, vector)
    for exponent, error in zip(reversed(exponents), reversed(errors), strict=True):
        # ||factor||^2 <= ||gram|| + error; the factor 1 + 8 u pays for the roundings of this line.
        bound = ((bound + error) * (1 + 8 * _U64)).sqrt() * power_of_two(exponent)
    bound = bound + 5e-324  # the scaling back rounds where the bound is denormal
    bound = torch.where(bound.isnan() | ~largest.isfinite(), float("inf"), bound)
    return torch.where(largest == 0, 0.0, bound)


def _lengths_above(vectors: Tensor, largest: Tensor) -> Tensor:
    """Of matrices with one row or one column, whose norm is their length."""
    exponent = binary_scale(largest, vectors.dtype)
    scaled = vectors.to(torch.promote_types(vectors.dtype, torch.float64)) * power_of_two(-exponent)[:, None, None]
    bound = norm_above(scaled, (-2, -1)) * power_of_two(exponent) + 5e-324
    return torch.where(largest.isfinite(), torch.where(largest == 0, 0.0, bound), float("inf"))


def _product_with_adjoint(factor: Tensor, squared: int) -> tuple[Tensor, float]:
    """X X^H, and what its error in the Frobenius norm is at most, in units of ||X||_F^2.

    Args:
        factor: (batch, m, n)
        squared: how often Gram matrices were squared before.
    """
    rows, columns = factor.shape[-2:]
    # The relative margin is about gamma ||X||_F^2 / ||X||^2 / 2^squared. Of a weight, half of the rows or fewer count
    # in that quotient, and of each further Gram matrix half as many.
    is_costly = columns * rows * 2.0**-24 > _BLOCK_PAYS_FROM * 4**squared
    if factor.dtype in (torch.float64, torch.complex128) or not is_costly:
        return factor @ factor.mH, product_gamma(columns, factor.dtype)
    # Entries of a sum in float64, rounded to float32 at the end: 1.01 u ||G||_F, of which ||X||_F^2 is no less.
    num_blocks = columns // _BLOCK + 1
    relative = product_gamma(min(columns, _BLOCK), factor.dtype) + 1.01 * gamma(num_blocks + 2) + 1.01 * 2.0**-24
    return _blocked_product(factor).to(factor.dtype), relative


def gram_matrix(factor: Tensor) -> tuple[Tensor, float]:
    """X X^H in float64, and what its error in the Frobenius norm is at most, in units of ||X||_F^2.

    Args:
        factor: (batch, m, n), its largest entries near to one.
    """
    columns = factor.shape[-1]
    if factor.dtype in (torch.float64, torch.complex128):
        return factor @ factor.mH, product_gamma(columns, factor.dtype)
    num_blocks = columns // _BLOCK + 1
    return _blocked_product(factor), product_gamma(min(columns, _BLOCK), factor.dtype) + 1.01 * gamma(num_blocks + 2)


def _blocked_product(factor: Tensor) -> Tensor:
    """X X^H, summed in float64 over products of `_BLOCK` columns."""
    batch, rows, columns = factor.shape
    double = torch.promote_types(factor.dtype, torch.float64)
    if factor.device.type == "cpu" and rows >= _BLOCK:  # block by block what is added stays in the cache
        total = torch.zeros(batch, rows, rows, dtype=double, device="cpu")
        for part in factor.split(_BLOCK, -1):
            total += part @ part.mH
        return total
    limit = _BLOCK_BYTES.get(factor.device.type, _BLOCK_BYTES_ELSEWHERE)
    at_once = max(1, limit // (batch * rows * rows * factor.element_size()))
    width = at_once * _BLOCK
    total = torch.zeros(batch, rows, rows, dtype=double, device=factor.device)
    for start in range(0, columns, width):
        part = factor[..., start : start + width]
        whole = part.shape[-1] // _BLOCK * _BLOCK
        if whole:
            blocks = part[..., :whole].unflatten(-1, (-1, _BLOCK)).movedim(-2, 0)
            total += (blocks @ blocks.mH).sum(0, dtype=double)
        if whole < part.shape[-1]:
            rest = part[..., whole:]
            total += rest @ rest.mH
    return total


def _norm_bound_of_hermitian(gram: Tensor, vector: Tensor | None) -> Tensor:
    """An upper bound of the largest eigenvalue of the Hermitian part of each matrix, in float64.

    In a basis that begins with a unit vector v, G = [[theta, r^H], [r, C]], so its largest eigenvalue is not above that
    of [[theta, |r|], [|r|, c]] where c bounds C's. With C's mean eigenvalue tau and D = C - tau, one such c is
    tau + sqrt((n-1)/n) ||D||_F for C of order n, because the eigenvalues of D add to zero; another is ||C||_F.
    Differences of squares, as in |r|^2 = |G v|^2 - theta^2, would cancel.

    Args:
        gram: (batch, N, N), entries of moderate size.
        vector: (batch, N) or None
    """
    order = gram.shape[-1]
    hermitian = gram.to(torch.promote_types(gram.dtype, torch.float64))
    hermitian = (hermitian + hermitian.mH) / 2
    plain = norm_above(hermitian, (-2, -1))
    if order == 1:
        return plain
    v = _leading_direction(hermitian, vector)
    image = (hermitian @ v[..., None])[..., 0]
    theta = torch.linalg.vecdot(v, image).real
    coupling = torch.linalg.vector_norm(image - theta[:, None] * v, dim=-1)
    diagonal = hermitian.diagonal(dim1=-2, dim2=-1)
    mean = (diagonal.real.sum(-1) - theta) / (order - 1)
    # D = G - v g^H - g v^H + theta v v^H - tau (I - v v^H) = G - tau I - v h^H - h v^H
    half = image - (theta + mean)[:, None] / 2 * v
    shifted = hermitian - torch.diag_embed(mean[:, None].expand(-1, order).to(hermitian.dtype))
    left, right = torch.stack((v, half), dim=-1), torch.stack((half, v), dim=-1)
    deviation = torch.linalg.vector_norm(torch.baddbmm(shifted, left, right.mH, alpha=-1), dim=(-2, -1))
    rest = torch.minimum(
        torch.hypot(deviation, mean * (order - 1) ** 0.5), mean + ((order - 2) / (order - 1)) ** 0.5 * deviation
    )
    deflated = (theta + rest) / 2 + torch.hypot((theta - rest) / 2, coupling)
    # All that is rounded here, also of v's length, in units of u ||G||_F; twice as much for complex numbers.
    units = (order**2 + 64 * order + 256) * (2 if gram.is_complex() else 1)
    deflated = deflated + units * _U64 * plain
    # A direction that is none gives NaN, which is not below anything.
    return torch.where(deflated < plain, deflated, plain)


def _leading_direction(hermitian: Tensor, vector: Tensor | None) -> Tensor:
    """(batch, N), of unit length or NaN: near to the leading eigenvector, from ``vector`` where that can be used."""
    diagonal = hermitian.diagonal(dim1=-2, dim2=-1).real
    # After some squarings any column that is not small is near to the eigenvector.
    index = diagonal.argmax(-1)[:, None, None].expand(-1, hermitian.shape[-1], 1)
    start = hermitian.gather(-1, index)
    if vector is not None:
        given = _unit(vector.to(hermitian.dtype))
        usable = given.abs().sum(-1, keepdim=True).isfinite()
        start = torch.where(usable, given, start[..., 0])[..., None]
    return _unit((hermitian @ start)[..., 0])


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors / vectors.abs().amax(-1, keepdim=True)  # so that no square over- or underflows
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
