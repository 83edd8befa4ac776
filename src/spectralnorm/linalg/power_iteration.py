"""Power iteration: the largest singular value of a matrix, and its two vectors.

Every function returns fresh tensors and leaves what it was given alone. Vectors stay finite and of unit length whatever
the matrix holds: where a product is zero or not finite the old vector stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SingularTriplet",
    "TrackedTriplet",
    "compute_dtype",
    "power_iteration",
    "power_iteration_of_operator",
    "tracked_power_iteration",
]


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


class TrackedTriplet(NamedTuple):
    """A singular triplet and the direction that comes next.

    Attributes:
        u: left vector, unit length: (..., out).
        frame: (..., in, 2), orthonormal columns: the right vector, and the runner-up.
        sigma: u^H matrix v, real: (...).
    """

    u: Tensor
    frame: Tensor
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
    matrix: Tensor, u: Tensor, v: Tensor, num_iterations: int = 1, *, eps: float = 1e-12
) -> SingularTriplet:
    """Power iteration (Miyato et al. 2018, Algorithm 1), in the order of torch's parametrization: u first.

    Args:
        matrix: (..., out, in); leading dimensions are a batch.
        u: (..., out), unit length: what stays if nothing can be computed.
        v: (..., in), unit length: the start.
        num_iterations: how often both vectors are renewed; 0 only evaluates sigma.
        eps: smallest length to divide by.

    Returns:
        The new vectors and sigma = u^H matrix v.

    >>> matrix = torch.diag(torch.tensor([3.0, 1.0]))
    >>> start = torch.full((2,), 0.5**0.5)
    >>> power_iteration(matrix, start, start, num_iterations=20).sigma
    tensor(3.)
    """
    for _ in range(num_iterations):
        u = _unit(_apply(matrix, v), u, eps)
        v = _unit(_apply(matrix.mH, u), v, eps)
    return SingularTriplet(u, v, _rayleigh(u, _apply(matrix, v)))


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


# The share of an unrelated direction in the runner-up. Without it the pair of vectors could lock on to an invariant
# plane and never see what grows outside; with more of it the runner-up would follow its own direction less closely.
_PROBE_SHARE = 0.1


def tracked_power_iteration(
    matrix: Tensor, u: Tensor, frame: Tensor, probe: Tensor, num_iterations: int = 1, *, eps: float = 1e-12
) -> TrackedTriplet:
    """Power iteration that cannot be trapped: a second vector follows the runner-up.

    Alone, power iteration has a trap: once v has converged, a direction orthogonal to it that overtakes is invisible,
    because the products never leave v's line. Here the two vectors go through the same products (the matrix is read
    twice per iteration, as in the plain method: memory is what it costs), and each iteration starts by choosing the
    best unit vector in their plane (Rayleigh-Ritz: the top eigenvector of a 2 x 2 Gram matrix, in closed form). An
    overtaking direction is seen as soon as the runner-up has a share in it, which `probe` makes sure of. When the two
    largest singular values lie close together this also converges much faster than one vector does.

    There is no branch on values and no copy to the host.

    Args:
        matrix: (..., out, in), real.
        u: (..., out), unit length: what stays if the matrix is zero or not finite.
        frame: (..., in, 2), orthonormal: the right vector, the runner-up.
        probe: (..., in), any direction, best another one each time.
        num_iterations: at least 1.
        eps: smallest length to divide by.
    """
    old_u, old_frame = u, frame
    image = matrix @ frame
    for iteration in range(num_iterations):
        if iteration:
            image = matrix @ frame
        image = image @ _ritz_rotation(image)
        left = image / _lengths(image).clamp_min(eps)
        back = matrix.mH @ left
        lengths = _lengths(back)
        back = back / lengths.clamp_min(eps)
        right, runner_up = back[..., 0], torch.add(back[..., 1], probe, alpha=_PROBE_SHARE)
        runner_up = runner_up - right * (right.unsqueeze(-2) @ runner_up.unsqueeze(-1)).squeeze(-1)
        runner_up = runner_up / torch.linalg.vector_norm(runner_up, dim=-1, keepdim=True).clamp_min(eps)
        frame = torch.stack((right, runner_up), dim=-1)
    u, sigma = left[..., 0], lengths[..., 0, 0]  # sigma = |A^H u| = u^H A v for v = A^H u / |A^H u|
    usable = ((sigma > eps) & (sigma < float("inf"))).unsqueeze(-1)
    return TrackedTriplet(torch.where(usable, u, old_u), torch.where(usable.unsqueeze(-1), frame, old_frame), sigma)


def _lengths(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=-2, keepdim=True)


def _ritz_rotation(image: Tensor) -> Tensor:
    """The rotation (..., 2, 2) of two orthonormal columns that makes the first one's image the longest possible."""
    gram = image.mT @ image
    angle = 0.5 * torch.atan2(2 * gram[..., 0, 1], gram[..., 0, 0] - gram[..., 1, 1])
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
