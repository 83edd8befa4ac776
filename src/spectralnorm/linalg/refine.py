"""The largest singular triplet to a given accuracy, from nothing but the matrix.

After a change of unknown size the old vectors prove nothing, and power iteration that stops when its value moves little
stops at any plateau. So the vectors are computed anew: exactly, by the eigenvectors of the smaller Gram matrix, where a
side is short; otherwise by Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization from a random start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.linalg.power_iteration import TrackedTriplet

__all__ = ["refine"]

_EXACT_UP_TO = 128  # shorter side of a matrix that is solved exactly: there it costs less than the Lanczos steps
_MAX_STEPS = 400
_CHECK_EVERY = 5


def refine(matrix: Tensor, start: Tensor, *, rtol: float = 1e-4, eps: float = 1e-12) -> TrackedTriplet:
    """The largest singular value to ``rtol`` relative, its vectors, and the runner-up.

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
        found = refine(matrix.flatten(0, -3), start, rtol=rtol, eps=eps)
        return TrackedTriplet(*(part.unflatten(0, matrix.shape[:-2]) for part in found))
    if matrix.ndim == 3 and min(matrix.shape[-2:]) > _EXACT_UP_TO:
        blocks = [refine(block, start, rtol=rtol, eps=eps) for block in matrix]
        return TrackedTriplet(*(torch.stack(parts) for parts in zip(*blocks, strict=True)))
    # To about one, so that no square over- or underflows.
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    usable = (scale > 0) & (scale < float("inf"))
    divisor = torch.where(usable, scale, 1)
    scaled = torch.where(usable, matrix / divisor, 0)
    if min(matrix.shape[-2:]) <= _EXACT_UP_TO:
        u, frame, sigma = _by_gram(scaled)
    elif not bool(usable):
        u, frame, sigma = _some_vectors(scaled, start)
    else:
        u, frame, sigma = _by_lanczos(scaled, start, rtol)
    sigma = (sigma * divisor[..., 0, 0]).clamp_min(eps)
    finite = scale[..., 0, 0] < float("inf")
    return TrackedTriplet(u, frame, torch.where(finite, sigma, float("nan")))


def _some_vectors(matrix: Tensor, start: Tensor) -> TrackedTriplet:
    """Unit vectors for a matrix that prefers none."""
    rows, columns = matrix.shape
    u = torch.ones(rows, dtype=matrix.dtype, device=matrix.device) / rows**0.5
    start = start.to(matrix)
    basis, _ = torch.linalg.qr(torch.stack((start, start.roll(1)), dim=1))
    return TrackedTriplet(u, basis[:, : min(2, columns)], u.real.new_zeros(()))


def _by_gram(matrix: Tensor) -> TrackedTriplet:
    """Exact, in float64 where the device has it: batch x short side must be small."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    double = matrix if matrix.device.type == "mps" else matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    tall = double.mH if wide else double
    _, vectors = torch.linalg.eigh(tall.mH @ tall)
    # The two largest, largest first; a single column has no runner-up.
    top = vectors[..., -2:].flip(-1)
    if top.shape[-1] == 1:
        top = torch.cat((top, torch.zeros_like(top)), dim=-1)
    other = tall @ top
    sigma = torch.linalg.vector_norm(other[..., 0], dim=-1)
    other = torch.stack((_unit(other[..., 0]), _unit(_without(other[..., 1], other[..., 0]))), dim=-1)
    left, right = (top, other) if wide else (other, top)
    return TrackedTriplet(left[..., 0].to(matrix.dtype), right.to(matrix.dtype), sigma.to(matrix.real.dtype))


def _unit(vector: Tensor) -> Tensor:
    """Unit length; the first unit vector where there is no direction."""
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    first = torch.zeros_like(vector)
    first[..., 0] = 1
    return torch.where(length > 1e-30, vector / length.clamp_min(1e-30), first)


def _without(vector: Tensor, direction: Tensor) -> Tensor:
    unit = _unit(direction)
    return vector - unit * (unit.conj() * vector).sum(-1, keepdim=True)


def _by_lanczos(matrix: Tensor, start: Tensor, rtol: float) -> TrackedTriplet:
    """Golub & Kahan 1965: A V = U B, B upper bidiagonal, whose largest singular value grows to A's.

    From a random start the chance to miss the largest one after k steps falls as exp(-2 k sqrt(gap)) (Kuczynski &
    Wozniakowski 1992). It stops when the triplet's residual |A^H u - sigma v| is below a tenth of ``rtol``: sigma then
    is that near to a singular value, and its error is about the residual's square over the gap below.
    """
    rows, columns = matrix.shape
    steps = min(rows, columns, _MAX_STEPS)
    lefts, rights = matrix.new_zeros(steps, rows), matrix.new_zeros(steps, columns)
    bidiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    start = start.to(matrix)
    rights[0] = start / torch.linalg.vector_norm(start)
    # Below this a new direction is rounding: the Krylov space is complete, and what it holds is exact.
    negligible = 10 * torch.finfo(matrix.dtype).eps
    residual_goal = max(0.1 * rtol, negligible)
    size = beta = 0.0
    for step in range(steps):
        new = matrix @ rights[step]
        new = new - lefts[:step].T @ (lefts[:step].conj() @ new)
        alpha = float(torch.linalg.vector_norm(new))
        size = max(size, alpha)
        last = step
        if alpha > negligible * size:
            lefts[step] = new / alpha
        bidiagonal[step, step] = alpha
        new = matrix.mH @ lefts[step]
        new = new - rights[: step + 1].T @ (rights[: step + 1].conj() @ new)
        beta = float(torch.linalg.vector_norm(new))
        complete = alpha <= negligible * size or beta <= negligible * size or step + 1 == steps
        if complete or (step + 1) % _CHECK_EVERY == 0:
            inner_left, values, inner_right = torch.linalg.svd(bidiagonal[: step + 1, : step + 1])
            residual = beta * float(inner_left[-1, 0].abs())
            if complete or residual <= residual_goal * float(values[0]):
                break
        bidiagonal[step, step + 1] = beta
        rights[step + 1] = new / beta
    inner_left, inner_right = inner_left.to(matrix), inner_right.to(matrix)
    u = _unit(inner_left[:, 0] @ lefts[: last + 1])
    v = matrix.mH @ u
    runner_up = inner_right[1 if last else 0] @ rights[: last + 1]
    frame = torch.stack((_unit(v), _unit(_without(runner_up, v))), dim=-1)
    return TrackedTriplet(u, frame, torch.linalg.vector_norm(v))
