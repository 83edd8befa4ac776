"""What a computed number may differ from the exact one: constants of rounding, exact powers of two, rounding upward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "binary_exponent",
    "binary_scale",
    "gamma",
    "largest_component",
    "next_up",
    "norm_above",
    "norm_below",
    "power_below",
    "power_of_two",
    "product_gamma",
    "round_up",
]

_UNIT_ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.complex64: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.complex128: 2.0**-53,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {4: 0x7F800000, 8: 0x7FF0000000000000}  # all bits of the exponent, no other
_FRACTION_BITS, _BIAS = 52, 1023  # of float64
# Above what underflow takes from the root of a sum of squares of numbers near to one, however many of them.
_UNDERFLOW = 2.0**-480


def gamma(terms: float, dtype: torch.dtype = torch.float64) -> float:
    """The constant gamma_n = n u / (1 - n u) of Higham 2002, section 3.1; infinite where n u is one or more."""
    share = terms * _UNIT_ROUNDOFF[dtype]
    return share / (1 - share) if share < 1 else math.inf


def product_gamma(terms: int, dtype: torch.dtype) -> float:
    """Bounds the rounding of a product of matrices: ||fl(A B) - A B||_F <= this ||A||_F ||B||_F.

    Whatever the order of summation, with or without fused multiply-add (Higham 2002, section 3.5), but not for
    products with fewer multiplications (Strassen; three for a complex one). An entry of a complex product has two
    real sums of ``2 terms``, each bounded by gamma_{2 terms} times the sum of the moduli, so together sqrt 2 times
    that. The two terms more pay for underflow where an entry of either factor is near to one or larger, and for the
    rounding of this number itself.

    Args:
        terms: of the inner products.
        dtype: what is multiplied and added: ``float32``, ``float64`` or their complex counterparts.
    """
    return math.sqrt(2) * gamma(2 * terms + 2, dtype) if dtype.is_complex else gamma(terms + 2, dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to an integer power in float64, exactly; from -1022 to 1023."""
    # torch.ldexp and torch.exp2 go through functions that need not be exact.
    return ((exponent.long() + _BIAS) << _FRACTION_BITS).view(torch.float64)


def power_below(number: Tensor) -> Tensor:
    """The power of two p with p <= number < 2 p, exactly, in the type of a positive float32 or float64.

    Zero for zero and denormals, infinity for infinity and NaN.
    """
    size = number.element_size()
    return (number.view(_BITS[size]) & _INFINITY[size]).view(number.dtype)


def binary_exponent(number: Tensor) -> Tensor:
    """The e with 2^e <= number < 2^(e+1), for a float64 that is positive.

    -1023 for zero and denormals, 1024 for infinity and NaN.
    """
    return (number.view(torch.int64) >> _FRACTION_BITS) - _BIAS


def binary_scale(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponent of the power of two to divide by so that float64 numbers of ``size`` come near to one.

    Clipped so that neither this power nor its inverse is denormal in ``dtype``.
    """
    limit = 126 if _UNIT_ROUNDOFF[dtype] > 2.0**-53 else 1022
    return binary_exponent(size).clamp(-limit, limit)


def largest_component(matrix: Tensor) -> Tensor:
    """The largest modulus of a real or imaginary part of each matrix, (..., m, n) -> (...), in float64."""
    components = torch.view_as_real(matrix.resolve_conj()).flatten(-2) if matrix.is_complex() else matrix
    return components.abs().amax((-2, -1)).double()


def next_up(number: Tensor) -> Tensor:
    """The least float64 above ``number``: so that a correctly rounded result becomes an upper bound."""
    return torch.nextafter(number, torch.full_like(number, math.inf))


def round_up(number: Tensor, dtype: torch.dtype) -> Tensor:
    """``number`` in another floating dtype, never less than it was; NaN stays NaN.

    Args:
        number: real floating, for instance the float64 bound of a float32 weight.
        dtype: real floating of at least 16 bits.
    """
    rounded = number.to(dtype)
    # Neighbours in a floating format are neighbours as integers; not every device has nextafter for the half types.
    bits = rounded.view(_BITS[rounded.element_size()])
    above = torch.where(rounded > 0, bits + 1, torch.where(rounded < 0, bits - 1, 1)).view(dtype)
    return torch.where(rounded.to(number.dtype) < number, above, rounded)


def norm_above(numbers: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """An upper bound of the exact Euclidean norm over ``dim``, for float64 or complex128 near to one."""
    # The sum of squares is off by gamma_n at most, its root by half of that.
    return torch.linalg.vector_norm(numbers, dim=dim) * (1 + gamma(_num_squares(numbers, dim) + 4)) + _UNDERFLOW


def norm_below(numbers: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """A lower bound of it, not negative."""
    norm = torch.linalg.vector_norm(numbers, dim=dim) * (1 - gamma(_num_squares(numbers, dim) + 4))
    return (norm - _UNDERFLOW).clamp_min(0)


def _num_squares(numbers: Tensor, dim: int | tuple[int, ...]) -> int:
    count = 2 if numbers.dtype.is_complex else 1
    for each in (dim,) if isinstance(dim, int) else dim:
        count *= numbers.shape[each]
    return count
