"""Two convolutions, one after the other, as one: exactly, where no pixel between them is cut off and then read.

Seen on the infinite lattice, a convolution is A = R Â E: its input among zeros, filtered, and cut to the size of the
output. For B after A, B A = R B̂ P Â E, where P keeps the pixels between them. Without P this is one convolution, with
the kernels' convolution as its kernel; with P it is not, and the norm of B̂ Â does not bound it. Two cases need no P:
B reads no padding, and so nothing that P would cut; or A writes out all that it makes, and P cuts nothing.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rounding import gamma, norm_above
from spectralnorm.lipschitz.bounds import frobenius, underflow
from spectralnorm.lipschitz.upward import add_up, mul_up

__all__ = ["Composed", "compose_convolutions"]

_MAX_PRODUCT = 2e11  # multiplications for the kernel of the composition


class Composed(NamedTuple):
    """One convolution in place of two.

    Attributes:
        weight: as torch stores it, float64.
        geometry: of the composition.
        error: the Frobenius norm of what the weight is off by at most.
    """

    weight: Tensor
    geometry: ConvolutionGeometry
    error: float


class _Kernel(NamedTuple):
    """The taps of a convolution that is not transposed, with what lies between two of them along each axis."""

    weight: Tensor  # (out, in / groups, *taps)
    groups: int
    spread: tuple[int, ...]


def compose_convolutions(
    second: Tensor, second_geometry: ConvolutionGeometry, first: Tensor, first_geometry: ConvolutionGeometry
) -> Composed | None:
    """``second`` after ``first``, for inputs of every size; None where that is no convolution, or costs too much.

    Args:
        second: weight of the one that comes last, float64, real.
        second_geometry: of it.
        first: weight of the one that comes first, float64, real.
        first_geometry: of it.
    """
    if second_geometry.transposed:
        if not first_geometry.transposed:
            return None
        return _both_transposed(second, second_geometry, first, first_geometry)
    if first_geometry.transposed:
        return _down_after_up(second, second_geometry, first, first_geometry)
    return _both_plain(second, second_geometry, first, first_geometry)


def _both_plain(
    second: Tensor, second_geometry: ConvolutionGeometry, first: Tensor, first_geometry: ConvolutionGeometry
) -> Composed | None:
    """Output m of the second reads pixel s1 (s2 m + d2 b - p2) + d1 a - p1."""
    padding = []
    axes = zip(
        second_geometry.padding, first_geometry.padding, first_geometry.stride, first_geometry.extent, strict=True
    )
    for outer, inner, stride, extent in axes:
        writes_all = stride == 1 and min(inner) >= extent - 1
        zeros = first_geometry.padding_mode == second_geometry.padding_mode == "zeros"
        if any(outer) and not (writes_all and zeros):
            return None
        padding.append((inner[0] + stride * outer[0], inner[1] + stride * outer[1]))
    spread = tuple(s * d for s, d in zip(first_geometry.stride, second_geometry.dilation, strict=True))
    kernel = _composed(
        _Kernel(second, second_geometry.groups, spread),
        _Kernel(first, first_geometry.groups, first_geometry.dilation),
    )
    if kernel is None:
        return None
    found, error = kernel
    geometry = ConvolutionGeometry(
        kernel_size=tuple(found.weight.shape[2:]),
        stride=tuple(a * b for a, b in zip(first_geometry.stride, second_geometry.stride, strict=True)),
        dilation=found.spread,
        padding=tuple(padding),
        padding_mode=first_geometry.padding_mode,
        groups=found.groups,
    )
    return Composed(found.weight, geometry, error)


def _both_transposed(
    second: Tensor, second_geometry: ConvolutionGeometry, first: Tensor, first_geometry: ConvolutionGeometry
) -> Composed | None:
    """The adjoint of the one's convolution after the other's; pixel i goes to s2 (s1 i + d1 a) + d2 b - p2."""
    if any(map(any, first_geometry.padding)):
        return None
    spread = tuple(s * d for s, d in zip(second_geometry.stride, first_geometry.dilation, strict=True))
    kernel = _composed(
        _Kernel(first, first_geometry.groups, spread),
        _Kernel(second, second_geometry.groups, second_geometry.dilation),
    )
    if kernel is None:
        return None
    found, error = kernel
    more = zip(second_geometry.stride, first_geometry.output_padding, second_geometry.output_padding, strict=True)
    return _transposed(
        found,
        error,
        stride=tuple(a * b for a, b in zip(first_geometry.stride, second_geometry.stride, strict=True)),
        padding=second_geometry.padding,
        output_padding=tuple(stride * inner + outer for stride, inner, outer in more),
    )


def _down_after_up(
    second: Tensor, second_geometry: ConvolutionGeometry, first: Tensor, first_geometry: ConvolutionGeometry
) -> Composed | None:
    """A transposed convolution, then one of stride 1: pixel i goes to s1 i + d1 a + d2 (k2 - 1 - b) - crop.

    Its adjoint is the convolution of ``first`` after that with the second kernel turned around.
    """
    if any(stride != 1 for stride in second_geometry.stride) or second_geometry.padding_mode != "zeros":
        return None
    padding = []
    for outer, inner, extent in zip(
        second_geometry.padding, first_geometry.padding, second_geometry.extent, strict=True
    ):
        if any(outer) and any(inner):
            return None
        padding.append((inner[0] + extent - 1 - outer[0], inner[1] + extent - 1 - outer[1]))
    if any(before != after or before < 0 for before, after in padding):
        return None
    grouped = second.unflatten(0, (second_geometry.groups, -1)).transpose(1, 2).flatten(0, 1)
    turned = grouped.flip(tuple(range(2, second.ndim)))
    kernel = _composed(
        _Kernel(first, first_geometry.groups, first_geometry.dilation),
        _Kernel(turned, second_geometry.groups, second_geometry.dilation),
    )
    if kernel is None:
        return None
    found, error = kernel
    return _transposed(
        found,
        error,
        stride=first_geometry.stride,
        padding=tuple(padding),
        output_padding=first_geometry.output_padding,
    )


def _transposed(
    kernel: _Kernel,
    error: float,
    *,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    output_padding: tuple[int, ...],
) -> Composed | None:
    # What torch asks of a transposed convolution.
    if any(more >= max(s, d) for more, s, d in zip(output_padding, stride, kernel.spread, strict=True)):
        return None
    geometry = ConvolutionGeometry(
        kernel_size=tuple(kernel.weight.shape[2:]),
        stride=stride,
        dilation=kernel.spread,
        padding=padding,
        groups=kernel.groups,
        transposed=True,
        output_padding=output_padding,
    )
    return Composed(kernel.weight, geometry, error)


def _composed(second: _Kernel, first: _Kernel) -> tuple[_Kernel, float] | None:
    """The kernel of ``second`` after ``first``, and the Frobenius norm of what rounding has moved it by at most."""
    outer, inner = tuple(second.weight.shape[2:]), tuple(first.weight.shape[2:])
    spread, sizes, steps = [], [], []
    for k2, d2, k1, d1 in zip(outer, second.spread, inner, first.spread, strict=True):
        between = [d for k, d in ((k2, d2), (k1, d1)) if k > 1]
        common = math.gcd(*between) if between else 1
        spread.append(common)
        sizes.append((d2 * (k2 - 1) + d1 * (k1 - 1)) // common + 1)
        steps.append((d2 // common if k2 > 1 else 1, d1 // common if k1 > 1 else 1))
    groups = math.gcd(second.groups, first.groups)
    one_by_one = _one_by_one(second), _one_by_one(first)
    if one_by_one[1]:
        groups = second.groups
    elif one_by_one[0]:
        groups = first.groups
    out, into = second.weight.shape[0], first.weight.shape[1] * first.groups
    hidden = 1 if any(one_by_one) else first.weight.shape[0] // groups
    products = out * (into // groups) * hidden * math.prod(outer) * math.prod(inner)
    if products > _MAX_PRODUCT:
        return None
    weight = second.weight.new_zeros(out, into // groups, *sizes)
    for taps in itertools.product(*map(range, outer)):
        part = _pointwise(second.weight[(..., *taps)], second.groups, first, groups, one_by_one)
        place = tuple(
            slice(b * outer_step, b * outer_step + inner_step * (k - 1) + 1, inner_step)
            for b, (outer_step, inner_step), k in zip(taps, steps, inner, strict=True)
        )
        weight[(..., *place)] += part
    # | |K2_b| |K1| |_F <= |K2_b|_F |K1|_F for every tap b of the second.
    power = _power(second.weight)  # exact, and keeps squares in range
    tap_sum = mul_up(float(norm_above((second.weight / power).flatten(2), (0, 1)).sum()), power, 1 + 2.0**-40)
    rounding = mul_up(gamma(hidden * math.prod(outer) + 4), tap_sum, frobenius(first.weight))
    return _Kernel(weight, groups, tuple(spread)), add_up(rounding, underflow(products))


def _one_by_one(kernel: _Kernel) -> bool:
    """Whether it filters each channel by itself, and makes none of them two."""
    return kernel.weight.shape[1] == 1 and kernel.weight.shape[0] == kernel.groups


def _pointwise(
    matrix: Tensor, matrix_groups: int, first: _Kernel, groups: int, one_by_one: tuple[bool, bool]
) -> Tensor:
    """One tap of the second, (out, in / its groups), after all of the first: (out, in / groups, *taps)."""
    axes = [1] * (first.weight.ndim - 2)
    if one_by_one[1]:
        filters = first.weight.reshape(matrix_groups, 1, matrix.shape[1], *first.weight.shape[2:])
        return (matrix.reshape(matrix_groups, -1, matrix.shape[1], *axes) * filters).flatten(0, 1)
    if one_by_one[0]:
        return matrix.reshape(-1, 1, *axes) * first.weight
    left = _blocks(matrix, matrix_groups, groups)
    right = _blocks(first.weight.flatten(2), first.groups, groups).flatten(2)
    product = (left @ right).flatten(0, 1)
    return product.reshape(len(product), -1, *first.weight.shape[2:])


def _blocks(weight: Tensor, own: int, groups: int) -> Tensor:
    """(out, in / own, ...) as the matrices of fewer groups: (groups, out / groups, in / groups, ...)."""
    if own == groups:
        return weight.unflatten(0, (groups, -1))
    each = own // groups
    parts = weight.unflatten(0, (groups, each, -1))
    out, into = parts.shape[2:4]
    full = weight.new_zeros(groups, each, out, each, into, *weight.shape[2:])
    index = torch.arange(each, device=weight.device)
    full[:, index, :, index] = parts.transpose(0, 1)
    return full.flatten(3, 4).flatten(1, 2)


def _power(weight: Tensor) -> float:
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest > 0 else 1.0
