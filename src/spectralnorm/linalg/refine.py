"""The largest singular triplet to a given accuracy, from nothing but the matrix.

After a change of unknown size the old vectors prove nothing, and power iteration that stops when its value moves little
stops at any plateau. So the vectors are computed anew: exactly, by the eigenvectors of the smaller Gram matrix, where a
side is short; otherwise by the Lanczos iteration for it, with full reorthogonalization, from a random start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralnorm.linalg.directions import seeded_direction
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame, TrackedTriplet, complete_frame

__all__ = ["refine"]

_EXACT_UP_TO = 128  # shorter side of a matrix that is solved exactly: there it costs less than the Lanczos steps
# Up to so many rows the Gram matrix is worth its product, because each of some fifty steps reads it once, and would
# read the matrix itself twice. The product grows with the square of the rows: at 4096 it takes as long as all that.
_GRAM_UP_TO = 1024
_MAX_STEPS = 400
# Largest entries of a matrix that is taken as it is. Others are scaled, so that nothing over- or underflows in float32:
# not the fourth powers of the norm that lengths are found from, nor those of what is a millionth of it.
_SMALLEST, _LARGEST = 2.0**-12, 2.0**12
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
    scale = torch.linalg.vector_norm(matrix, float("inf"), dim=(-2, -1), keepdim=True)
    usable = (scale > 0) & (scale < float("inf"))
    scaled, divisor = matrix, scale.new_ones(())
    if not bool(((scale > _SMALLEST) & (scale < _LARGEST)).all()):
        divisor = torch.where(usable, scale, 1)
        scaled = torch.where(usable, matrix / divisor, 0)
        divisor = divisor[..., 0, 0]
    if min(matrix.shape[-2:]) <= _EXACT_UP_TO:
        u, v, sigma, rows = _by_gram(scaled)
    elif bool(usable):
        u, v, sigma, rows = _by_lanczos(scaled, start, rtol)
    else:
        u, v, sigma, rows = _of_zero(scaled)
    sigma = (sigma * divisor).clamp_min(eps)
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
    """Lanczos 1950, for the smaller Gram matrix G: G V = V T, T tridiagonal, whose largest eigenvalue grows to G's.

    From a random start the chance to miss the largest one after k steps falls as exp(-2 k sqrt(gap)) (Kuczynski &
    Wozniakowski 1992). It stops when the residual |G x - lambda x| is below a tenth of ``rtol``, relative: lambda then
    is that near to an eigenvalue, and its error is about the residual's square over the gap below. That G squares
    the singular values costs the small ones their digits, and the largest one none.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.mH
    size = short.shape[0]
    gram = short @ short.mH if size <= _GRAM_UP_TO else None
    steps = min(size, _MAX_STEPS)
    basis = matrix.new_zeros(steps, size)
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    start = start.to(matrix)
    first = short @ start if is_wide else start
    basis[0] = first / torch.linalg.vector_norm(first)
    # Below this a new direction is rounding: the Krylov space is complete, and what it holds is exact.
    negligible = 10 * torch.finfo(matrix.dtype).eps
    residual_goal = max(0.1 * rtol, negligible)
    largest = 0.0
    for step in range(steps):
        row = basis[step]
        new = short @ (short.mH @ row) if gram is None else gram @ row
        alpha = float(torch.vdot(row, new).real)
        new = _orthogonal_to(basis[: step + 1], new)
        beta = float(torch.linalg.vector_norm(new))
        tridiagonal[step, step] = alpha
        largest = max(largest, alpha)
        complete = beta <= negligible * largest or step + 1 == steps
        if complete or (step + 1 >= NUM_TRACKED and (step + 1) % _CHECK_EVERY == 0):
            values, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
            if complete or beta * float(vectors[-1, -1].abs()) <= residual_goal * float(values[-1]):
                break
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = beta
        basis[step + 1] = new / beta
    leading = vectors[:, -NUM_TRACKED:].flip(-1).mT.to(matrix) @ basis[: len(vectors)]
    leading = _with_others_sharpened(leading, short if gram is None else gram, is_gram=gram is not None)
    if is_wide:
        frame = _unit_rows(leading)
        v = matrix.mH @ frame[0]
        sigma = torch.linalg.vector_norm(v)
        return frame[0], v / sigma, sigma, frame
    v = _unit_rows(leading[:1])[0]
    images = leading @ matrix.mT
    return _unit_rows(images[:1])[0], v, torch.linalg.vector_norm(matrix @ v), _unit_rows(images)


def _with_others_sharpened(leading: Tensor, matrix: Tensor, *, is_gram: bool) -> Tensor:
    """Eigenvectors of G, as rows, of which only the first has converged, by two steps of subspace iteration.

    Lanczos sees one vector of each eigenvalue, so as many random ones go along: where the largest has several they show
    that others are as long.

    Args:
        leading: orthonormal but for rounding, the largest eigenvalue's first.
        matrix: G, or A where G = A A^H.
        is_gram: which.
    """

    def image(rows: Tensor) -> Tensor:
        return rows @ matrix.mT if is_gram else (rows @ matrix.conj()) @ matrix.mT

    first, size = leading[:1], leading.shape[1]
    others = [seeded_direction(f"refine.{number}", size, leading) for number in range(NUM_TRACKED)]
    rows = torch.cat([leading[1:], torch.stack(others)])
    for _ in range(2):
        rows = torch.linalg.qr(torch.cat([first, image(rows)]).mT)[0].mT[1:]
    _, vectors = torch.linalg.eigh(image(rows) @ rows.mH)
    rows = vectors.flip(-1).mH @ rows
    return torch.cat([first, rows[: NUM_TRACKED - 1]])


def _orthogonal_to(basis: Tensor, vector: Tensor) -> Tensor:
    """``vector`` without its components along the orthonormal rows of ``basis``."""
    # Twice is enough (Kahan, in Parlett 1980): once leaves rounding of the size of what was taken away, which for a
    # matrix near to orthogonal is almost everything.
    for _ in range(2):
        vector = vector - basis.T @ (basis.conj() @ vector)
    return vector
