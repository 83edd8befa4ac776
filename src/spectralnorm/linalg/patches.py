"""A convolution as its reshaped kernel after the map that copies patches out: exact where these do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel

__all__ = [
    "AsPatches",
    "as_patches",
    "copies_by_padding",
    "copies_on_axis",
    "patches_of_any_size",
    "reads_per_pixel",
]


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
    count = max_patches_per_pixel(geometry, input_size)
    if not count < math.prod(reads_per_pixel(geometry)):
        return None
    factor = 1.0 if count == 1 else math.sqrt(count) * (1 + 2.0**-50)
    return AsPatches(weight.unflatten(0, (geometry.groups, -1)).flatten(2), factor)


def reads_per_pixel(geometry: ConvolutionGeometry) -> tuple[int, ...]:
    """How many taps read one pixel of a padded input at most, along each axis, whatever the size.

    With g = gcd(stride, dilation), tap ``a`` of output ``m`` reads pixel ``stride m + dilation a``, so the taps that
    read the same pixel differ by multiples of stride / g.
    """
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    return tuple(math.ceil(k * math.gcd(s, d) / s) for k, s, d in axes)


def copies_by_padding(geometry: ConvolutionGeometry) -> int:
    """How many copies of one pixel the padding makes at most, itself included, over all axes and for any size.

    The norm of the padding is the root of it. Where a convolution with circular padding is a part of one on a torus,
    the padding costs nothing, and this is 1.
    """
    return math.prod(copies_on_axis(geometry, axis) for axis in range(geometry.num_axes))


def copies_on_axis(geometry: ConvolutionGeometry, axis: int) -> int:
    """As `copies_by_padding`, along one axis."""
    before, after = geometry.padding[axis]
    if geometry.padding_mode == "zeros" or not before + after:
        return 1
    if geometry.padding_mode == "replicate":
        return 1 + before + after  # of the only pixel there may be
    if geometry.padding_mode == "circular" and geometry.stride[axis] == 1 and before + after < geometry.extent[axis]:
        return 1
    # Neither reflects nor wraps around more than once at an end.
    return 1 + (before > 0) + (after > 0)


def patches_of_any_size(geometry: ConvolutionGeometry) -> int:
    """How many patches read one pixel of an input at most, over all axes and for any size.

    `max_patches_per_pixel` is never above it.
    """
    return math.prod(reads_per_pixel(geometry)) * copies_by_padding(geometry)
