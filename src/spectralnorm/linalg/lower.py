"""Lower bounds of norms: what one vector is stretched by, with all rounding accounted for.

Whatever vector is found, ||A v|| / ||v|| is not above the norm, so how it was found needs no proof. Only the last
product does: its rounding is bounded and taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel
from spectralnorm.linalg.directions import seeded_direction
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.refine import refine
from spectralnorm.linalg.rounding import (
    binary_scale,
    largest_component,
    norm_above,
    norm_below,
    power_of_two,
    product_gamma,
)

__all__ = ["convolution_lower_bound", "matrix_lower_bound"]

_RTOL = 1e-7  # of the singular vector's residual (matrix), of the eigenvalue (convolution)
_CHECK_EVERY = 5
_LEAST_STEPS = 20
_MOST_STEPS = 300
_MOST_CYCLES = 8
_BASIS_BYTES = 2**28


@torch.no_grad()
def matrix_lower_bound(matrix: Tensor) -> float:
    """A number that the 2-norm of ``matrix`` is not below, within about 1e-9 of it. It waits for the device.

    Args:
        matrix: (m, n), real or complex floating of any precision, read exactly.

    Returns:
        Zero for a zero or empty matrix, and for one that is not finite, of which nothing is known.

    Raises:
        UserError: ``matrix`` is not a floating matrix.
    """
    if matrix.ndim != 2 or not (matrix.is_floating_point() or matrix.is_complex()):
        raise UserError(
            f"matrix_lower_bound takes one floating matrix (m, n), got {matrix.dtype} {tuple(matrix.shape)}."
        )
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float64))
    scaled = _scaled(matrix)
    if scaled is None:
        return 0.0
    matrix, exponent = scaled
    v = refine(matrix, seeded_direction("lower bound", matrix.shape[-1], matrix), rtol=_RTOL).v
    error = product_gamma(matrix.shape[-1], matrix.dtype) * norm_above(matrix, (-2, -1)).item()
    return _quotient(matrix @ v, v, error, exponent)


@torch.no_grad()
def convolution_lower_bound(weight: Tensor, geometry: ConvolutionGeometry, input_size: Sequence[int]) -> float:
    """A number that the norm of a convolution on inputs of one size is not below, within about 1e-7 of it.

    Args:
        weight: as `ConvolutionGeometry.apply` takes it, real or complex floating of any precision, read exactly.
        geometry: of the convolution.
        input_size: of its input along each axis.

    Returns:
        As `matrix_lower_bound`.

    Raises:
        UserError: for inputs of ``input_size`` nothing comes out.
    """
    if min(geometry.output_size(input_size)) < 1:
        raise UserError(f"The convolution has no output for inputs of size {tuple(input_size)}; give a larger one.")
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float64))
    scaled = _scaled(weight.flatten(1))
    if scaled is None:
        return 0.0
    weight, exponent = scaled[0].reshape(weight.shape), scaled[1]
    shape = (1, geometry.channels(weight)[0], *input_size)

    # What is missed of a vector is missed squared of the quotient, so float32 will do.
    coarse = weight.to(torch.complex64 if weight.is_complex() else torch.float32)

    def normal_map(vector: Tensor) -> Tensor:
        outputs = geometry.apply(vector.reshape(shape), coarse)
        return geometry.adjoint(outputs, coarse, input_size).flatten()

    with full_precision(weight.device):
        v = _leading_eigenvector(normal_map, seeded_direction("lower bound", math.prod(shape), coarse)).to(weight)
    # Not on a GPU, where a library may choose an algorithm (Winograd's, FFT) whose rounding is another.
    v, weight = v.cpu(), weight.cpu()
    images = v.reshape(shape)
    if weight.is_complex():
        # In real convolutions, because torch makes a complex one of three.
        real, imaginary = (geometry.apply(torch.cat((images.real, images.imag)), part) for part in _parts(weight))
        outputs = torch.complex(real[0] - imaginary[1], real[1] + imaginary[0])
    else:
        outputs = geometry.apply(images, weight)
    # |fl(y) - y| <= gamma (|W| * |x|) for each entry, and the convolution with |W| has at most the norm ||W||_F times
    # the root of the patches that read a pixel.
    terms = max(weight.shape[:2]) * math.prod(geometry.kernel_size)
    patches = math.sqrt(max_patches_per_pixel(geometry, input_size))
    error = product_gamma(terms + 2, weight.dtype) * norm_above(weight.flatten(), 0).item() * patches
    return _quotient(outputs.flatten(), v, error, exponent)


def _parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.real.contiguous(), weight.imag.contiguous()


def _scaled(matrix: Tensor) -> tuple[Tensor, float] | None:
    """The matrix near to one and the power of two it was divided by; None if it is empty, zero or not finite."""
    if matrix.numel() == 0:
        return None
    largest = largest_component(matrix)
    if not 0 < largest.item() < math.inf:
        return None
    exponent = binary_scale(largest, matrix.dtype)
    return matrix * power_of_two(-exponent), power_of_two(exponent).item()


def _quotient(image: Tensor, vector: Tensor, error: float, scale: float) -> float:
    """||A v|| / ||v|| times ``scale``, rounded down, where ``image`` is A v as computed.

    Args:
        image: (m,)
        vector: (n,), not zero.
        error: what ||image - A v|| / ||v|| is at most.
        scale: a power of two.
    """
    above = norm_above(vector, 0).item()
    quotient = _down(_down(norm_below(image, 0).item() / above) - error * (1 + 2.0**-40))
    return max(0.0, _down(quotient * scale))


def _down(number: float) -> float:
    return math.nextafter(number, -math.inf)


def _leading_eigenvector(normal_map: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Of a positive semidefinite map, by Lanczos' method with full reorthogonalization, begun anew where memory ends.

    It stops where the eigenvalue is right to `_RTOL`: its error is at most the residual, and the residual's square over
    the gap to the next eigenvalue (Parlett 1980, theorem 11.7.1).

    Args:
        normal_map: (n,) -> (n,)
        start: (n,)
    """
    affordable = _BASIS_BYTES // (start.numel() * start.element_size())
    steps = min(start.numel(), max(_LEAST_STEPS, min(_MOST_STEPS, affordable)))
    for _ in range(_MOST_CYCLES):
        start, is_done = _lanczos(normal_map, start, steps)
        if is_done:
            break
    return start


def _lanczos(normal_map: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, bool]:
    """The leading Ritz vector after at most ``steps``, and whether its value is right to `_RTOL`."""
    basis = start.new_empty(steps, start.numel())
    basis[0] = start / torch.linalg.vector_norm(start)
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    for step in range(steps):
        new = normal_map(basis[step])
        tridiagonal[step, step] = torch.linalg.vecdot(basis[step], new).real.item()
        for _ in range(2):
            new = new - basis[: step + 1].T @ (basis[: step + 1].conj() @ new)
        beta = torch.linalg.vector_norm(new).item()
        is_complete = step + 1 == steps or beta <= 1e-14 * tridiagonal.abs().max().item()
        if is_complete or (step + 1) % _CHECK_EVERY == 0:
            values, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
            top = values[-1].item()
            residual = beta * abs(vectors[-1, -1].item())
            gap = top - values[-2].item() if step else 0.0
            error = min(residual, residual**2 / gap) if gap > 0 else residual
            is_done = error <= _RTOL * top and step + 1 >= min(_LEAST_STEPS, steps)
            if is_complete or is_done:
                ritz = vectors[:, -1].to(basis) @ basis[: step + 1]
                return ritz, is_done or beta <= 1e-14 * top
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = beta
        basis[step + 1] = new / beta
    raise AssertionError("the last step returns")
