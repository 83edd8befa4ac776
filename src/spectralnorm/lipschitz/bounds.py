"""Bounds of the linear layers, from `spectralnorm.linalg`: one place says which are used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rigorous import rigorous_matrix_bound
from spectralnorm.linalg.rigorous_convolution import rigorous_convolution_bound
from spectralnorm.linalg.rounding import gamma, norm_above
from spectralnorm.lipschitz.upward import add_up, mul_up

__all__ = ["convolution_bound", "frobenius", "matrix_bound"]

_MAX_EXPLICIT = 1e9  # multiplications for the square of the explicit matrix


def matrix_bound(matrix: Tensor) -> float:
    """Of the 2-norm of a matrix (out, in), guaranteed."""
    return rigorous_matrix_bound(matrix)


def convolution_bound(weight: Tensor, geometry: ConvolutionGeometry, input_size: Sequence[int] | None) -> float:
    """Of the norm of a convolution, guaranteed.

    Args:
        weight: as torch stores it.
        geometry: of the convolution.
        input_size: along each axis; None: for every size.
    """
    weight = weight.double()
    bound = rigorous_convolution_bound(weight, geometry, input_size)
    if input_size is None:
        return bound
    in_channels, out_channels = geometry.channels(weight)
    inputs = in_channels * math.prod(input_size)
    outputs = out_channels * math.prod(geometry.output_size(input_size))
    if min(inputs, outputs) * inputs * outputs > _MAX_EXPLICIT:
        return bound
    # Where the image is hardly larger than the kernel, the torus is far too large for it.
    basis = torch.eye(inputs, dtype=torch.float64, device=weight.device).reshape(inputs, in_channels, *input_size)
    matrix = geometry.apply(basis, weight).flatten(1).T
    # An entry is a weight, or with padding that copies the sum of some.
    copies = 0 if geometry.padding_mode == "zeros" else math.prod(geometry.kernel_size)
    error = mul_up(gamma(copies), frobenius(geometry.apply(basis, weight.abs()))) if copies else 0.0
    return min(bound, add_up(matrix_bound(matrix), error))


def frobenius(matrix: Tensor) -> float:
    """An upper bound of the Frobenius norm; of the largest, for a batch."""
    if matrix.numel() == 0:
        return 0.0
    scale = float(matrix.abs().max())
    if scale == 0:
        return 0.0
    dims = (-2, -1) if matrix.ndim == 3 else tuple(range(matrix.ndim))
    # Division by a power of two keeps squares in range and rounds nothing.
    power = 2.0 ** (math.frexp(scale)[1] - 1)
    return mul_up(float(norm_above(matrix / power, dims).max()), power)
