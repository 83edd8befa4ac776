"""Power iteration: the largest singular value of a matrix, and its two vectors.

Every function returns fresh tensors and leaves what it was given alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SingularTriplet", "compute_dtype", "power_iteration", "power_iteration_of_operator", "power_vectors"]


class SingularTriplet(NamedTuple):
    """``matrix @ v`` is about ``sigma * u``.

    Attributes:
        u: left vector, unit length: (..., out).
        v: right vector, unit length: (..., in).
        sigma: u^H matrix v, real: (...). An estimate, never above the norm but for rounding.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 for the half types, otherwise the weight's own.

    In bfloat16 the estimate itself would be off by up to 0.4%, and in float16 a square overflows from 256 on.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector) if matrix.ndim == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _unit(vector: Tensor, fallback: Tensor, eps: float) -> Tensor:
    """``vector`` scaled to unit length; ``fallback`` where it is zero or not finite."""
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    # A comparison with NaN is false.
    usable = (length > 0) & (length < float("inf"))
    return torch.where(usable, vector / length.clamp_min(eps), fallback)


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, num_iterations: int = 1, *, eps: float = 1e-12, stays: bool = True
) -> SingularTriplet:
    """Power iteration (Miyato et al. 2018, Algorithm 1), in the order of torch's parametrization: u first.

    The vectors stay finite and of unit length whatever the matrix holds: where a product is zero or not finite, the old
    vector stays.

    Args:
        matrix: (..., out, in); leading dimensions are a batch.
        u: (..., out), unit length: what stays if nothing can be computed.
        v: (..., in), unit length: the start.
        num_iterations: how often both vectors are renewed; 0 only evaluates sigma.
        eps: smallest length to divide by.
        stays: False: where the old vector would stay, the new one is zero, and depends on no old one.

    Returns:
        The new vectors and sigma = u^H matrix v.

    >>> matrix = torch.diag(torch.tensor([3.0, 1.0]))
    >>> start = torch.full((2,), 0.5**0.5)
    >>> power_iteration(matrix, start, start, num_iterations=20).sigma
    tensor(3.)
    """
    u, v = power_vectors(matrix, u, v, num_iterations, eps=eps, stays=stays)
    return SingularTriplet(u, v, _rayleigh(u, _apply(matrix, v)))


def power_vectors(
    matrix: Tensor, u: Tensor, v: Tensor, num_iterations: int = 1, *, eps: float = 1e-12, stays: bool = True
) -> tuple[Tensor, Tensor]:
    """The vectors of `power_iteration` without sigma, which is one more product."""
    for _ in range(num_iterations):
        u = _unit(_apply(matrix, v), u if stays else torch.zeros_like(u), eps)
        v = _unit(_apply(matrix.mH, u), v if stays else torch.zeros_like(v), eps)
    return u, v


def power_iteration_of_operator(
    matvec: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    u: Tensor,
    v: Tensor,
    num_iterations: int = 1,
    *,
    eps: float = 1e-12,
) -> SingularTriplet:
    """As `power_iteration`, of a linear map that is given by what it does.

    Args:
        matvec: v -> A v; vectors of any shape.
        adjoint: u -> A^H u.
        u: shape of the map's outputs, unit length over all entries.
        v: shape of the map's inputs, unit length: the start.
        num_iterations: how often both vectors are renewed.
        eps: smallest length to divide by.
    """

    def unit(vector: Tensor, fallback: Tensor) -> Tensor:
        return _unit(vector.flatten(), fallback.flatten(), eps).view(fallback.shape)

    for _ in range(num_iterations):
        u = unit(matvec(v), u)
        v = unit(adjoint(u), v)
    return SingularTriplet(u, v, _rayleigh(u.flatten(), matvec(v).flatten()))


def _rayleigh(u: Tensor, image: Tensor) -> Tensor:
    if u.ndim == 1:
        return torch.vdot(u, image).real if u.is_complex() else torch.dot(u, image)
    product = (u.conj() * image).sum(-1)
    return product.real if product.is_complex() else product
