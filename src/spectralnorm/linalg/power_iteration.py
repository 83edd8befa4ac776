"""Power iteration: the largest singular value of a matrix, and its two vectors.

Every function returns fresh tensors and leaves what it was given alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NUM_TRACKED",
    "SingularTriplet",
    "TrackedTriplet",
    "compute_dtype",
    "power_iteration",
    "power_iteration_of_operator",
    "probe_rows",
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
    """A singular triplet, and a frame of directions around it that is followed along.

    Attributes:
        u: left vector, unit length: (..., out).
        v: right vector, unit length: (..., in).
        sigma: u^H matrix v, real: (...).
        frame: (..., k, out), rows of unit length that span about the k leading left vectors, u first.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    frame: Tensor


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

    The vectors stay finite and of unit length whatever the matrix holds: where a product is zero or not finite, the old
    vector stays.

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


# Rows in the frame. They go through each product together, so the matrix is read no more often than for one vector; of
# a 512 x 4608 matrix on a CPU eight rows take about four times as long as one. What they buy: Linear(128, 128), Adam
# with lr 1e-2 (each step moves the weight by its own norm): largest true norm 1.42 with one vector, 1.31 with two,
# 1.15 with four, 1.04 with eight.
NUM_TRACKED = 8


def tracked_power_iteration(
    matrix: Tensor, frame: Tensor, probe: Tensor, num_iterations: int = 1, *, eps: float = 1e-12
) -> TrackedTriplet:
    """Power iteration that cannot be trapped: a frame of directions follows, and the best vector in it is taken.

    Alone, power iteration has a trap: once v has converged, a direction orthogonal to it that overtakes is invisible,
    because the products never leave v's line. Here k vectors go through the same products (subspace iteration: the
    matrix is read twice per iteration, as in the plain method), and the best unit vector in their span is chosen at the
    end (Rayleigh-Ritz). A direction that overtakes is seen as soon as the frame has a share in it; `probe` makes sure
    that it gets one. A weight that moves far in a step moves in few directions, often in those of the steps before,
    which the frame still holds.

    There is no branch on values, and on an accelerator no wait for it.

    Args:
        matrix: (..., out, in), real.
        frame: (..., k, out), the rows to start from.
        probe: what is added to the frame first, of its last two dimensions; best a small share of a direction that is
            another one each time (`probe_rows`).
        num_iterations: at least 1.
        eps: smallest length to divide by.

    Returns:
        The triplet. For a matrix that is zero or not finite sigma is so too, and the vectors are meaningless.
    """
    rotate = _ritz_rotation if matrix.device.type == "cpu" else _ritz_reflection
    frame = frame + probe
    for _ in range(num_iterations):
        basis = _orthonormal_rows(frame @ matrix, eps)
        image = basis @ matrix.mT
        rotation = rotate(image @ image.mT)
        image = rotation.mT @ image
        lengths = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        frame = image / lengths.clamp_min(eps)
    v = (rotation[..., :, :1].mT @ basis)[..., 0, :]
    # The basis is orthonormal up to rounding; sigma is exactly u^T A v for the vectors that are returned.
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return TrackedTriplet(frame[..., 0, :], v / length, lengths[..., 0, 0] / length[..., 0], frame)


def probe_rows(direction: Tensor, num_rows: int) -> Tensor:
    """A tenth of a unit ``direction`` in the last of ``num_rows`` rows: what `tracked_power_iteration` looks for.

    Without any the frame could lock on to an invariant subspace and never see what grows outside of it.
    """
    rows = direction.new_zeros(num_rows, direction.shape[0])
    rows[-1] = 0.1 * direction
    return rows


def _orthonormal_rows(rows: Tensor, eps: float) -> Tensor:
    """Orthonormal rows of the same span, the first one's direction kept: (..., k, n) by Cholesky of the Gram matrix.

    A row without a direction of its own comes out short, not as noise of unit length.
    """
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(eps)
    gram = rows @ rows.mT
    # More than the rounding of the products, so that the factor exists.
    gram.diagonal(dim1=-2, dim2=-1).add_(64 * torch.finfo(rows.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _ritz_rotation(gram: Tensor) -> Tensor:
    """Orthogonal (..., k, k): the eigenvectors of a Gram matrix in its columns, largest first."""
    # LAPACK refuses to look at what is not finite; that case is sorted out by the caller.
    return torch.linalg.eigh(torch.nan_to_num(gram, nan=0.0, posinf=0.0, neginf=0.0)).eigenvectors.flip(-1)


def _ritz_reflection(gram: Tensor) -> Tensor:
    """Orthogonal (..., k, k), the top eigenvector of a Gram matrix in its first column; in products only.

    For accelerators, where an eigensolver makes the host wait to check for errors. Twelve squarings are 4096 power
    iterations: two values that those do not tell apart are equal to 1e-4.
    """
    power = gram
    for _ in range(12):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(
            torch.finfo(gram.dtype).tiny
        )
        power = power @ power
    # What is left is q q^T; the column with the largest diagonal entry is the one that cannot have vanished.
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    column = torch.take_along_dim(power, largest, dim=-1)
    first = torch.zeros_like(column)
    first[..., 0, :] = 1
    column = column / torch.linalg.vector_norm(column, dim=-2, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    # The Householder reflection that takes the first unit vector to the column, signed so that nothing cancels.
    normal = torch.where(column[..., :1, :] > 0, -column, column) - first
    normal = normal / torch.linalg.vector_norm(normal, dim=-2, keepdim=True)
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 2 * normal @ normal.mT
