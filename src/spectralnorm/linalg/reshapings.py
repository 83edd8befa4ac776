"""Bounds of a convolution's norm from its kernel reshaped to matrices, for inputs of any size.

Cheap, and tight only where patches do not overlap; `spectralnorm.linalg.symbol` is tighter.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.gram import gram_upper_bound
from spectralnorm.linalg.patches import copies_by_padding, patches_of_any_size, reads_per_pixel

__all__ = ["patches_bound", "reshapings_bound"]

# A guaranteed bound times a root: sqrt and product round, each by 2^-53 at most.
_UP = 1 + 4 * 2.0**-53


def patches_bound(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """sqrt(number of patches that read one pixel) times the norm of the reshaped kernel, that torch divides by.

    The convolution is the reshaped kernel applied to every patch; copying the patches out stretches by the root.

    Args:
        weight: as in `ConvolutionGeometry.apply`.
        geometry: of the layer.

    Returns:
        Scalar, float64: not below the norm of the convolution for an input of any size.
    """
    blocks = _blocks(weight, geometry).flatten(2)
    return gram_upper_bound(blocks).amax() * (math.sqrt(patches_of_any_size(geometry)) * _UP)


def reshapings_bound(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """The least over all reshapings of the kernel, times the root of how often a pixel is used.

    Singla and Feizi 2021, theorem 2 (in two dimensions, with stride 1: sqrt(h w) times the least norm of four
    reshapings). Each spatial axis of the kernel goes to the rows or to the columns. To the columns, the matrix is
    applied to patches along that axis, and with a stride fewer of these read one pixel than there are taps. To the
    rows, each output is a sum over taps, as many as there are.

    Args:
        weight: as in `ConvolutionGeometry.apply`.
        geometry: of the layer.

    Returns:
        Scalar, float64: not below the norm of the convolution for an input of any size, because the norms of the
        reshapings are bounded from above too.
    """
    blocks = _blocks(weight, geometry)
    reads = reads_per_pixel(geometry)
    axes = range(geometry.num_axes)
    bounds = []
    for to_rows in itertools.product((False, True), repeat=geometry.num_axes):
        rows = [1, *(3 + axis for axis in axes if to_rows[axis])]
        columns = [2, *(3 + axis for axis in axes if not to_rows[axis])]
        matrices = blocks.permute(0, *rows, *columns).flatten(len(rows) + 1).flatten(1, len(rows))
        factor = math.prod(geometry.kernel_size[axis] if to_rows[axis] else reads[axis] for axis in axes)
        bounds.append(gram_upper_bound(matrices).amax() * (math.sqrt(factor) * _UP))
    return torch.stack(bounds).amin() * (math.sqrt(copies_by_padding(geometry)) * _UP)


def _blocks(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """The kernel of the convolution, or of that whose adjoint it is: (groups, out, in, *kernel) within a group."""
    return weight.unflatten(0, (geometry.groups, -1))
