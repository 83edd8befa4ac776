"""Bounds of the linear layers, from `spectralnorm.linalg`: one place says which are used."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rigorous import rigorous_matrix_bound
from spectralnorm.linalg.rigorous_convolution import rigorous_convolution_bound
from spectralnorm.linalg.rounding import gamma, norm_above
from spectralnorm.lipschitz.upward import add_up, mul_up

__all__ = ["convolution_bound", "frobenius", "largest_frobenius", "largest_norm", "matrix_bound", "underflow"]

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


def frobenius(tensor: Tensor) -> float:
    """An upper bound of the length of all its entries together."""
    return largest_norm(tensor, tuple(range(tensor.ndim)))


def largest_frobenius(matrices: Tensor) -> float:
    """An upper bound of the Frobenius norm of a matrix (out, in), or of all in a batch (batch, out, in)."""
    return largest_norm(matrices, (-2, -1))


def largest_norm(tensor: Tensor, dims: tuple[int, ...]) -> float:
    """An upper bound of the length of the entries along ``dims``, the largest there is along the others."""
    if tensor.numel() == 0:
        return 0.0
    scale = float(tensor.abs().max())
    if scale == 0:
        return 0.0
    # Division by a power of two keeps squares in range and rounds nothing.
    power = 2.0 ** (math.frexp(scale)[1] - 1)
    return mul_up(float(norm_above(tensor / power, dims).max()), power)


def underflow(products: int) -> float:
    """Above the length of what underflow takes from so many products, also where denormal numbers become zero."""
    return mul_up(float(products), sys.float_info.min)
