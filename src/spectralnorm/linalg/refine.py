"""The largest singular triplet to a given accuracy, from nothing but the matrix.

After a change of unknown size the old vectors prove nothing, and power iteration that stops when its value moves little
stops at any plateau. So the vectors are computed anew: exactly, by the eigenvectors of the smaller Gram matrix, where a
side is short; otherwise by Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization from a random start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet, complete_frame

__all__ = ["refine"]

_EXACT_UP_TO = 128  # shorter side of a matrix that is solved exactly: there it costs less than the Lanczos steps
_MAX_STEPS = 400
_CHECK_EVERY = 5

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # u, v, sigma, and leading left vectors as rows


def refine(matrix: Tensor, start: Tensor, *, rtol: float = 1e-4, eps: float = 1e-12) -> TrackedTriplet:
    """The largest singular value to ``rtol`` relative, its vectors, and the leading left vectors.

    Deterministic in its arguments. It waits for the device (it decides by values); for use after rare events.

    Args:
        matrix: (..., out, in), real or complex; leading dimensions are a batch.
        start: (in,), a random direction. Not the old right vector: starting there is what the trap is made of.
        rtol: relative accuracy of sigma.
        eps: what sigma is at least, for a zero matrix.

    Returns:
        The triplet. For a zero matrix sigma is ``eps``, for one that is not finite NaN; the vectors are then some
        finite unit vectors.
    """
    if matrix.ndim > 3:
        u, v, sigma, frame = refine(matrix.flatten(0, -3), start, rtol=rtol, eps=eps)
        u, v, sigma, rows = (part.unflatten(0, matrix.shape[:-2]) for part in (u, v, sigma, frame.rows))
        return TrackedTriplet(u, v, sigma, Frame(rows, frame.is_left))
    if matrix.ndim == 3 and min(matrix.shape[-2:]) > _EXACT_UP_TO:
        blocks = [refine(block, start, rtol=rtol, eps=eps) for block in matrix]
        u, v, sigma = (torch.stack(parts) for parts in list(zip(*blocks, strict=True))[:3])
        return TrackedTriplet(u, v, sigma, Frame(torch.stack([block.frame.rows for block in blocks]), is_left=True))
    # To about one, so that no square over- or underflows.
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    usable = (scale > 0) & (scale < float("inf"))
    divisor = torch.where(usable, scale, 1)
    scaled = torch.where(usable, matrix / divisor, 0)
    if min(matrix.shape[-2:]) <= _EXACT_UP_TO:
        u, v, sigma, rows = _by_gram(scaled)
    elif bool(usable):
        u, v, sigma, rows = _by_lanczos(scaled, start, rtol)
    else:
        u, v, sigma, rows = _of_zero(scaled)
    sigma = (sigma * divisor[..., 0, 0]).clamp_min(eps)
    finite = scale[..., 0, 0] < float("inf")
    # A frame has all its rows, also where the matrix has fewer directions: the rest is zero.
    leading = Frame(F.pad(rows, (0, 0, 0, NUM_TRACKED - rows.shape[-2])), is_left=True)
    return TrackedTriplet(u, v, torch.where(finite, sigma, float("nan")), complete_frame(matrix) or leading)


def _of_zero(matrix: Tensor) -> _Parts:
    """Unit vectors for a matrix that prefers none."""
    rows, columns = matrix.shape
    frame = torch.eye(min(NUM_TRACKED, rows, columns), rows, dtype=matrix.dtype, device=matrix.device)
    v = torch.zeros_like(matrix[0])
    v[0] = 1
    return frame[0], v, matrix.real.new_zeros(()), frame


def _by_gram(matrix: Tensor) -> _Parts:
    """By the eigenvectors of the smaller Gram matrix, in float64 where the device has it."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    double = matrix if matrix.device.type == "mps" else matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    tall = double.mH if wide else double
    _, vectors = torch.linalg.eigh(tall.mH @ tall)
    top = vectors[..., -NUM_TRACKED:].flip(-1)
    image = tall @ top
    sigma = torch.linalg.vector_norm(image[..., 0], dim=-1)
    left, right = (top, image) if wide else (image, top)
    frame = _unit_rows(left.mT)
    u, v = frame[..., 0, :], _unit_rows(right.mT)[..., 0, :]
    return u.to(matrix.dtype), v.to(matrix.dtype), sigma.to(matrix.real.dtype), frame.to(matrix.dtype)


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of unit length; where there is no direction, the first unit vector."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    first = torch.zeros_like(rows)
    first[..., 0] = 1
    return torch.where(length > 1e-30, rows / length.clamp_min(1e-30), first)


def _by_lanczos(matrix: Tensor, start: Tensor, rtol: float) -> _Parts:
    """Golub & Kahan 1965: A V = U B, B upper bidiagonal, whose largest singular value grows to A's.

    From a random start the chance to miss the largest one after k steps falls as exp(-2 k sqrt(gap)) (Kuczynski &
    Wozniakowski 1992). It stops when the triplet's residual |A^H u - sigma v| is below a tenth of ``rtol``: sigma then
    is that near to a singular value, and its error is about the residual's square over the gap below.
    """
    rows, columns = matrix.shape
    steps = min(rows, columns, _MAX_STEPS)
    lefts, rights = matrix.new_zeros(steps, rows), matrix.new_zeros(steps, columns)
    bidiagonal = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    start = start.to(matrix)
    rights[0] = start / torch.linalg.vector_norm(start)
    # Below this a new direction is rounding: the Krylov space is complete, and what it holds is exact.
    negligible = 10 * torch.finfo(matrix.dtype).eps
    residual_goal = max(0.1 * rtol, negligible)
    size = beta = 0.0
    for step in range(steps):
        new = matrix @ rights[step]
        new = _orthogonal_to(lefts[:step], new)
        alpha = float(torch.linalg.vector_norm(new))
        size = max(size, alpha)
        last = step
        if alpha > negligible * size:
            lefts[step] = new / alpha
        bidiagonal[step, step] = alpha
        new = matrix.mH @ lefts[step]
        new = _orthogonal_to(rights[: step + 1], new)
        beta = float(torch.linalg.vector_norm(new))
        complete = alpha <= negligible * size or beta <= negligible * size or step + 1 == steps
        if complete or (step + 1) % _CHECK_EVERY == 0:
            inner_left, values, _ = torch.linalg.svd(bidiagonal[: step + 1, : step + 1])
            residual = beta * float(inner_left[-1, 0].abs())
            if complete or residual <= residual_goal * float(values[0]):
                break
        bidiagonal[step, step + 1] = beta
        rights[step + 1] = new / beta
    leading = inner_left[:, : min(NUM_TRACKED, last + 1)].T.to(matrix)
    frame = _unit_rows(leading @ lefts[: last + 1])
    v = matrix.mH @ frame[0]
    sigma = torch.linalg.vector_norm(v)
    return frame[0], v / sigma, sigma, frame


def _orthogonal_to(basis: Tensor, vector: Tensor) -> Tensor:
    """``vector`` without its components along the orthonormal rows of ``basis``."""
    # Twice is enough (Kahan, in Parlett 1980): once leaves rounding of the size of what was taken away, which for a
    # matrix near to orthogonal is almost everything.
    for _ in range(2):
        vector = vector - basis.T @ (basis.conj() @ vector)
    return vector
