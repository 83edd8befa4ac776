"""The largest singular value of a map of images that is given by what it does, followed while it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LeadingImages", "follow_map", "refine_map"]

_NUM_IMAGES = 4
_MAX_ITERATIONS = 100

Map = Callable[[Tensor], Tensor]


class LeadingImages(NamedTuple):
    """Leading right singular vectors of a map, and its norm.

    Attributes:
        images: (k, *input), orthonormal, the leading one first.
        before: (k, *input), those of the iteration before.
        output: (*output), unit length: the leading left vector.
        sigma: the length of the leading image's image, a scalar: an estimate, never above the norm but for rounding.
    """

    images: Tensor
    before: Tensor
    output: Tensor
    sigma: Tensor


def follow_map(matvec: Map, adjoint: Map, leading: LeadingImages, num_iterations: int = 1) -> LeadingImages:
    """Go on from vectors of a map that was nearly this one.

    Locally optimal block iteration (LOBPCG, Knyazev 2001) without a preconditioner: the best vectors in the span of the
    last ones, their images under A^H A, and the ones before. It needs about the root of the iterations that power
    iteration does, which matters because the singular values of a convolution lie close together.

    Args:
        matvec: (batch, *input) -> (batch, *output).
        adjoint: its adjoint, (batch, *output) -> (batch, *input).
        leading: to start from.
        num_iterations: at least 1.
    """
    images, before = leading.images, leading.before
    sigma, output = leading.sigma, leading.output
    count = len(images)
    for _ in range(num_iterations):
        basis = _orthonormal(torch.cat((images, adjoint(matvec(images)), before)))
        moved = matvec(basis)
        rows = moved.flatten(1).double()
        gram = torch.nan_to_num(rows @ rows.mT, nan=0.0, posinf=0.0, neginf=0.0)
        turn = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :count].mT.to(basis.dtype)
        images, before = (turn @ basis.flatten(1)).view_as(images), images
        image = (turn[0] @ moved.flatten(1)).view(moved.shape[1:])
        sigma = torch.linalg.vector_norm(image)
        output = image / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    return LeadingImages(images, before, output, sigma)


def refine_map(matvec: Map, adjoint: Map, start: Tensor, *, rtol: float = 1e-5) -> LeadingImages:
    """From nothing but the map: until three iterations raise sigma by less than ``rtol``. Waits for the device.

    Args:
        matvec: as in `follow_map`.
        adjoint: as in `follow_map`.
        start: (*input), a random image.
        rtol: relative.
    """
    # Other directions without random numbers.
    count = min(_NUM_IMAGES, start.numel())
    spacing = start.numel() // count + (start.numel() > count)
    shifts = [start.flatten().roll(number * spacing).view_as(start) for number in range(count)]
    images = torch.stack(shifts)
    leading = LeadingImages(images, images.flip(0).roll(1, -1), matvec(images[:1])[0], start.new_zeros(()))
    last = 0.0
    for _ in range(_MAX_ITERATIONS // 3):
        leading = follow_map(matvec, adjoint, leading, 3)
        sigma = float(leading.sigma)
        if not sigma > last * (1 + rtol):
            break
        last = sigma
    return leading


def _orthonormal(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    q, r = torch.linalg.qr(torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0).mT)
    # What was in the span of the others already is rounding: it must not come in as a vector.
    is_new = r.diagonal().abs() > 30 * torch.finfo(rows.dtype).eps
    return (q.mT * is_new[:, None]).view(-1, *images.shape[1:])
