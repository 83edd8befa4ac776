"""The norm of a convolution as a map of images, estimated and followed, and its derivative in the weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype, seeded_direction
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.leading_of_map import LeadingImages, follow_map, refine_map

__all__ = ["MapNorm", "found_map", "map_norm"]


class MapNorm(NamedTuple):
    """What is known of a convolution's norm for one size of its input.

    Attributes:
        sigma: an estimate, a scalar.
        direction: of the weight's shape: its derivative. sigma = <direction, weight>.
    """

    sigma: Tensor
    direction: Tensor


def found_map(
    weight: Tensor,
    geometry: ConvolutionGeometry,
    size: tuple[int, ...],
    leading: LeadingImages | None,
    num_iterations: int = 1,
) -> LeadingImages:
    """Leading images of the convolution with ``weight``: from those before, or from nothing.

    Args:
        weight: detached.
        geometry: of the convolution.
        size: of the images.
        leading: of nearly this weight; None: find them anew.
        num_iterations: to go on by.
    """
    weight = weight.to(compute_dtype(weight.dtype))

    def matvec(images: Tensor) -> Tensor:
        return geometry.apply(images, weight)

    def adjoint(images: Tensor) -> Tensor:
        return geometry.adjoint(images, weight, size)

    if leading is not None:
        return follow_map(matvec, adjoint, leading, num_iterations)
    channels = geometry.channels(weight)[0]
    entries = channels * torch.Size(size).numel()
    start = seeded_direction("image", entries, weight).view(channels, *size)
    if not bool(weight.isfinite().all()):
        weight = torch.zeros_like(weight)
    return refine_map(matvec, adjoint, start)


def map_norm(weight: Tensor, geometry: ConvolutionGeometry, leading: LeadingImages) -> MapNorm:
    """The norm that leading images show, u^T A(W) v, and its derivative in W with u and v constant."""
    weight = weight.detach().to(compute_dtype(weight.dtype))
    with torch.no_grad():
        sigma = (geometry.apply(leading.images[:1], weight)[0] * leading.output).sum()
        return MapNorm(sigma, geometry.derivative(leading.images[:1], leading.output[None], weight))
