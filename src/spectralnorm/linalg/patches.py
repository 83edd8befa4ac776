"""A convolution as its reshaped kernel after the map that copies patches out: exact where these do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel

__all__ = ["AsPatches", "as_patches"]


class AsPatches(NamedTuple):
    """||convolution|| <= factor * max over groups of ||matrix||.

    Attributes:
        matrices: (groups, rows, columns), the reshaped kernel.
        factor: the root of how many patches read one pixel, rounded upward.
    """

    matrices: Tensor
    factor: float


def as_patches(weight: Tensor, geometry: ConvolutionGeometry, input_size: Sequence[int] | None) -> AsPatches | None:
    """The kernel as a matrix, or None where its bound is not below that of the symbol.

    On a large image c patches read each pixel, and the symbol, too, is at most root c times the matrix. A small image
    has fewer: one, where the kernel covers all of it, as in the last layer of a DCGAN's discriminator.

    Args:
        weight: as in `ConvolutionGeometry.apply`.
        geometry: of the convolution.
        input_size: along each axis, one that fits; None: all sizes at once.
    """
    if input_size is None:
        return None
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    of_large_image = math.prod(-(-k * math.gcd(s, d) // s) for k, s, d in axes)
    count = max_patches_per_pixel(geometry, input_size)
    if not count < of_large_image:
        return None
    factor = 1.0 if count == 1 else math.sqrt(count) * (1 + 2.0**-50)
    return AsPatches(weight.unflatten(0, (geometry.groups, -1)).flatten(2), factor)
