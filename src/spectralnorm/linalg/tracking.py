"""Following the largest singular values of many matrices while they move, a little work at every step.

Alone, power iteration has a trap: once v has converged, a direction orthogonal to it that overtakes is invisible,
because the products never leave v's line. So a frame of directions goes along, and at every step the best unit vector
in its span is taken (Rayleigh-Ritz). A direction that overtakes is seen as soon as the frame has a share in it; a small
share of another direction each time, the probe, makes sure that it gets one. A weight that moves far in a step moves in
few directions, often in those of the steps before, which the frame still holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.rounding import power_below

__all__ = [
    "NUM_TRACKED",
    "PROBE_LENGTH",
    "Frame",
    "TrackedTriplet",
    "complete_frame",
    "probe_rows",
    "track",
    "track_together",
]

# Rows in a frame. They go through the product together, so that the matrix is read no more often than for one vector.
# What they buy, and what they cost: docs/decisions/0007.
NUM_TRACKED = 8

# Of what is added to a frame's last row, whose length is about one.
PROBE_LENGTH = 0.1

# Twelve squarings are 4096 power iterations: two values that those do not tell apart are equal to 1e-4.
_SQUARINGS = 12


class Frame(NamedTuple):
    """Directions around the leading singular vectors of one side.

    Attributes:
        rows: (..., k, out) on the left side, (..., k, in) on the right; of about unit length, the leading one first.
        is_left: whose vectors they are.
    """

    rows: Tensor
    is_left: bool


class TrackedTriplet(NamedTuple):
    """A singular triplet, and the frame to go on from.

    Attributes:
        u: left vector, unit length: (..., out).
        v: right vector, unit length: (..., in).
        sigma: u^H matrix v, real: (...). An estimate, never above the norm but for rounding.
        frame: of either side.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    frame: Frame


def track(
    matrix: Tensor, frame: Frame, probe: Tensor | None = None, num_iterations: int = 1, *, eps: float = 1e-12
) -> TrackedTriplet:
    """`track_together` for one matrix, or for one batch of equal shapes.

    Args:
        matrix: (..., out, in), real.
        frame: to start from.
        probe: added to the frame first, of its rows' last two dimensions (`probe_rows`).
        num_iterations: at least 1.
        eps: smallest length to divide by.
    """
    leading = matrix.shape[:-2]
    matrices = matrix.reshape(-1, *matrix.shape[-2:])
    rows = frame.rows.reshape(-1, *frame.rows.shape[-2:])
    found = track_together([matrices], [Frame(rows, frame.is_left)], [probe], num_iterations, eps=eps)[0]
    u, v, sigma = (part.reshape(leading + part.shape[1:]) for part in found[:3])
    rows = found.frame.rows
    return TrackedTriplet(u, v, sigma, Frame(rows.reshape(leading + rows.shape[1:]), found.frame.is_left))


def track_together(
    matrices: Sequence[Tensor],
    frames: Sequence[Frame],
    probes: Sequence[Tensor | None],
    num_iterations: int = 1,
    *,
    eps: float = 1e-12,
) -> list[TrackedTriplet]:
    """One step of power iteration for many matrices, with a frame beside each.

    An iteration reads each matrix twice: once for all rows of the frame, once for the best vector. Say the frame F is
    on the left side of A. The rows of Y = F A span about A's leading right directions; the unit combination of the
    frame with the longest image (Rayleigh-Ritz in the span of F) gives v, and A v gives u and sigma. Rotated and scaled
    to unit length, the rows of Y are the next frame, on the right side; the next iteration does the same with A^T. A
    frame on a side that has no more dimensions than the frame has rows spans all of it, so that the triplet is exact;
    it stays as it is (`complete_frame`).

    Only what depends on a matrix's shape is done matrix by matrix; the algebra on (k, k) matrices is done for all at
    once. There is no branch on values, and on an accelerator no wait for it.

    Args:
        matrices: each (batch, out, in), real; batch and sizes may differ from one to the next.
        frames: for each its rows, (batch, k, out or in), all with the same k.
        probes: for each what is added to the frame first, (k, out or in), or None. After the first iteration nothing
            is added.
        num_iterations: at least 1.
        eps: smallest length to divide by.

    Returns:
        The triplets. For a matrix that is zero or not finite sigma is so too, and the vectors are meaningless.
    """
    found = []
    for iteration in range(num_iterations):
        found = _iterated(matrices, frames, probes if iteration == 0 else [None] * len(matrices), eps)
        frames = [each.frame for each in found]
    return found


def complete_frame(matrix: Tensor) -> Frame | None:
    """The frame that spans all of the shorter side of ``matrix``, (..., out, in), if `NUM_TRACKED` rows are enough."""
    size = min(matrix.shape[-2:])
    if size > NUM_TRACKED:
        return None
    rows = torch.eye(NUM_TRACKED, size, dtype=matrix.dtype, device=matrix.device)
    return Frame(rows.repeat(*matrix.shape[:-2], 1, 1), is_left=matrix.shape[-2] == size)


def probe_rows(direction: Tensor, num_rows: int) -> Tensor:
    """A tenth of a unit ``direction`` in the last of ``num_rows`` rows: what `track` looks for.

    Without any the frame could lock on to an invariant subspace and never see what grows outside of it.
    """
    rows = direction.new_zeros(num_rows, direction.shape[0])
    rows[-1] = PROBE_LENGTH * direction
    return rows


def _iterated(
    matrices: Sequence[Tensor], frames: Sequence[Frame], probes: Sequence[Tensor | None], eps: float
) -> list[TrackedTriplet]:
    # The frame on the left, in the words of the docstring: a frame on the right sees the transposed matrix.
    maps = [matrix if frame.is_left else matrix.mT for matrix, frame in zip(matrices, frames, strict=True)]
    starts = [frame.rows if probe is None else frame.rows + probe for frame, probe in zip(frames, probes, strict=True)]
    images = [_images(start, each) for start, each in zip(starts, maps, strict=True)]
    batches = [matrix.shape[0] for matrix in matrices]
    scales = _split(_scales_of(images), batches)
    images = [image / scale for image, scale in zip(images, scales, strict=True)]
    turns = _ritz_turns(
        _together([torch.bmm(start, start.mT) for start in starts]),
        _together([torch.bmm(image, image.mT) for image in images]),
        frames[0].rows.device.type == "cpu",
    )
    found = []
    for frame, each, image, scale, turn in zip(frames, maps, images, scales, _split(turns, batches), strict=True):
        rows = torch.bmm(turn, image)
        leading = rows[:, :1]
        # The turned rows have unit length up to rounding; sigma is exactly |A v| for the vector that is returned.
        leading = leading / torch.linalg.vector_norm(leading, dim=-1, keepdim=True).clamp_min(eps)
        other = torch.bmm(leading, each.mT)
        sigma = torch.linalg.vector_norm(other / scale, dim=-1, keepdim=True) * scale
        other = other / sigma.clamp_min(eps)
        u, v = (other, leading) if frame.is_left else (leading, other)
        is_complete = frame.rows.shape[-1] <= frame.rows.shape[-2]
        following = frame if is_complete else Frame(rows, not frame.is_left)
        found.append(TrackedTriplet(u[:, 0], v[:, 0], sigma[:, 0, 0], following))
    return found


_NEAR_ONE = 2.0**-21, 2.0**39

# Of a matrix that is worth more than one thread.
_LARGE = 2**17
_NARROWEST = 32


def _images(rows: Tensor, matrices: Tensor) -> Tensor:
    """``rows @ matrices``: (batch, k, m) with (batch, m, n)."""
    batch, length, width = matrices.shape
    if batch == 1 and length * width >= _LARGE and matrices.device.type == "cpu":
        # MKL gives a product with so few rows to one thread. As a batch of strips it is shared among all.
        for strips in (16, 8, 4, 2):
            if width % strips == 0 and width // strips >= _NARROWEST:
                strip = matrices[0].unflatten(1, (strips, -1)).transpose(0, 1)
                images = torch.bmm(rows.expand(strips, -1, -1), strip)
                return images.transpose(0, 1).reshape(1, -1, width)
    return torch.bmm(rows, matrices)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(whole: Tensor, batches: list[int]) -> Sequence[Tensor]:
    return whole.split(batches) if len(batches) > 1 else (whole,)


def _scales_of(images: list[Tensor]) -> Tensor:
    """Powers of two that bring entries near to one, (batch, 1, 1), so that squares stay in range; one if they are."""
    largest = _together([torch.linalg.vector_norm(image, torch.inf, (-2, -1), keepdim=True) for image in images])
    power = power_below(largest)
    tiny = torch.finfo(power.dtype).tiny
    is_near = (power >= _NEAR_ONE[0]) & (power <= _NEAR_ONE[1])
    return torch.where(is_near, 1.0, power.clamp(tiny, 1 / tiny))


def _ritz_turns(start_gram: Tensor, image_gram: Tensor, is_cpu: bool) -> Tensor:
    """What turns images of frames into frames: (..., k, k) matrices T such that the rows of T Y have unit length.

    The first row of T is the combination c with the largest |c Y| / |c F|, the second the largest orthogonal to it, ...

    Args:
        start_gram: F F^T.
        image_gram: Y Y^T with Y = F A.
        is_cpu: where an eigensolver costs nothing to wait for.
    """
    white = _whitening(start_gram)
    gram = white @ image_gram @ white.mT
    turn = (_ritz_rotation if is_cpu else _ritz_reflection)(gram) @ white
    lengths = ((turn @ image_gram) * turn).sum(-1, keepdim=True)
    # A row shorter than the rounding of the longest one has no direction of its own: it comes out short.
    shortest = torch.finfo(gram.dtype).eps * lengths[..., :1, :] + torch.finfo(gram.dtype).tiny
    return turn * torch.maximum(lengths, shortest).rsqrt()


def _whitening(gram: Tensor) -> Tensor:
    """T with T G T^T = I for a Gram matrix G, lower triangular: the inverse of its Cholesky factor.

    A row of the frame without a direction of its own comes out short, not as noise of unit length.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(lengths > torch.finfo(gram.dtype).tiny, lengths.rsqrt(), 0)
    scaled = gram * scale[..., :, None] * scale[..., None, :]
    # More than the rounding of the products, so that the factor exists.
    scaled.diagonal(dim1=-2, dim2=-1).add_(64 * torch.finfo(gram.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(scaled)
    return torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False)


def _ritz_rotation(gram: Tensor) -> Tensor:
    """Orthogonal (..., k, k): the eigenvectors of a Gram matrix in its rows, largest first."""
    # LAPACK refuses to look at what is not finite; that case is sorted out by the caller.
    return torch.linalg.eigh(torch.nan_to_num(gram, nan=0.0, posinf=0.0, neginf=0.0)).eigenvectors.flip(-1).mT


def _ritz_reflection(gram: Tensor) -> Tensor:
    """Orthogonal (..., k, k), the top eigenvector of a Gram matrix in its first row; in products only.

    For accelerators, where an eigensolver makes the host wait to check for errors.
    """
    tiny = torch.finfo(gram.dtype).tiny
    power = gram
    for _ in range(_SQUARINGS):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(tiny)
        power = power @ power
    # What is left is q q^T; the column with the largest diagonal entry is the one that cannot have vanished.
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    column = torch.take_along_dim(power, largest, dim=-1)
    first = torch.zeros_like(column)
    first[..., 0, :] = 1
    column = column / torch.linalg.vector_norm(column, dim=-2, keepdim=True).clamp_min(tiny)
    # The Householder reflection that takes the first unit vector to the column, signed so that nothing cancels.
    normal = torch.where(column[..., :1, :] > 0, -column, column) - first
    normal = normal / torch.linalg.vector_norm(normal, dim=-2, keepdim=True)
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 2 * normal @ normal.mT
