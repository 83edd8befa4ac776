"""Layers made 1-Lipschitz by a number for each channel, from sums of the Gram matrix's rows: no iteration.

Almost-orthogonal layers (AOL, Prach and Lampert 2022): a symmetric matrix G is nowhere above the diagonal of the sums
of |G|'s rows, because the difference is diagonally dominant. With G = J^H J that gives ||J D|| <= 1 for
D = diag(sums)^(-1/2). The rounding of the sums, and of the result, is bounded and paid for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.patches import copies_by_padding
from spectralnorm.linalg.power_iteration import compute_dtype
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rounding import binary_exponent, gamma, power_of_two

__all__ = ["almost_orthogonal", "gram_row_sums"]

# Beside the largest entry, which is near to one: far above what underflow can take from a sum of products.
_UNDERFLOW = 2.0**-80
_MAX_EXPONENT = 120


def gram_row_sums(
    weight: Tensor, *, step: Sequence[int] | None = None, shares: Tensor | None = None, groups: int = 1
) -> Tensor:
    """A number t for each input channel such that |J x|^2 <= sum of t[c] |x[c]|^2 for the convolution J and all x.

    The sums of the rows of |J^H J| on an image without an end, which depend on the channel alone (Prach and Lampert
    2022, theorems 1 and 2), with ``shares`` q weighted as q_j / q_i (Araujo et al. 2023, theorem 2). Zero padding only
    takes inputs and outputs away, and so does a smaller image. Differentiable. Rounding included.

    Args:
        weight: (out, in / groups, *kernel), real; no spatial axes for a matrix.
        step: along each spatial axis how far apart taps are that read the same pixel: stride / gcd(stride, dilation).
            With a step, pixels differ in the taps that read them, and the largest sum counts.
        shares: (in,), positive; None: all are one.
        groups: blocks of outputs and inputs.

    Returns:
        (in,) in the weight's dtype, of half types in float32. Never zero: a channel of zeros has a sum that is tiny
        beside the others.

    Raises:
        UserError: ``weight`` is complex, not floating, or has fewer than two dimensions.
    """
    _require_real(weight)
    wide = weight.to(compute_dtype(weight.dtype))
    scaled, exponent = _scaled(wide)
    sums = torch.cat(_sums(scaled, step, shares, groups)[0])
    scale = power_of_two(exponent).to(wide.dtype)
    return (sums * scale * scale).clamp_min(torch.finfo(wide.dtype).smallest_normal)


def almost_orthogonal(
    weight: Tensor, geometry: ConvolutionGeometry | None = None, *, coefficient: float = 1.0
) -> Tensor:
    """The weight with each channel rescaled such that the layer's norm is at most a limit, rounding included (AOL).

    Of a convolution the input channels are rescaled, of a transposed one the output channels. Channels that are
    orthogonal, also to their own shifts, come out with the norm that is allowed; the more they overlap, the shorter
    they become. Differentiable.

    Args:
        weight: (out, in) of a dense layer, or as in `ConvolutionGeometry.apply`. Real.
        geometry: of the convolution; None: a dense layer.
        coefficient: the limit, positive.

    Returns:
        As ``weight``. The norm of the stored numbers is at most ``coefficient`` for an input of any size.

    Raises:
        UserError: ``weight`` is complex, not floating, or has fewer than two dimensions.
    """
    _require_real(weight)
    if not weight.numel():
        return weight
    if geometry is None:
        step, groups, copies = None, 1, 1
    else:
        axes = zip(geometry.stride, geometry.dilation, strict=True)
        step, groups, copies = [s // math.gcd(s, d) for s, d in axes], geometry.groups, copies_by_padding(geometry)
    wide = weight.to(compute_dtype(weight.dtype))
    scaled, _ = _scaled(wide)
    sums, absolute = (torch.cat(each) for each in _sums(scaled, step, None, groups))
    is_zero = absolute == 0
    factors = torch.where(is_zero, 1.0, sums).rsqrt()
    # Rounding changes an entry by u times its size, so the layer by u times the norm of that with |entries|.
    stretch = torch.where(is_zero, 0.0, absolute.detach() * factors.detach().square()).amax().sqrt()
    units = torch.finfo(weight.dtype).eps * (stretch + 8)
    smallest = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    denormals = smallest * math.sqrt(weight.numel() * math.prod(weight.shape[2:]))
    factors = factors * (coefficient / math.sqrt(copies)) / (1 + units + denormals / coefficient)
    blocks = scaled.unflatten(0, (groups, -1))
    blocks = blocks * factors.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))
    return blocks.flatten(0, 1).to(weight.dtype)


def _require_real(weight: Tensor) -> None:
    if not weight.is_floating_point() or weight.ndim < 2:
        raise UserError(
            "Channels are rescaled in real floating weights (out, in, *kernel), "
            f"got {weight.dtype} {tuple(weight.shape)}."
        )


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """By a power of two, such that the largest entry lies in [1, 2): exact, and no square over- or underflows."""
    largest = weight.detach().abs().amax().double() if weight.numel() else weight.new_zeros((), dtype=torch.float64)
    exponent = binary_exponent(largest).clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    return weight * power_of_two(-exponent).to(weight.dtype), exponent


def _sums(
    weight: Tensor, step: Sequence[int] | None, shares: Tensor | None, groups: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For each group the sums of the rows of |J^H J|, rounded up, and those of |J|^H |J|."""
    if weight.ndim == 2:  # a kernel of one tap
        weight = weight.unsqueeze(-1)
    blocks = weight.unflatten(0, (groups, -1))
    parts = [None] * groups if shares is None else list(shares.to(weight.dtype).unflatten(0, (groups, -1)))
    with full_precision(weight.device):
        found = [_sums_of_group(block, step, part) for block, part in zip(blocks, parts, strict=True)]
    return [sums for sums, _ in found], [absolute for _, absolute in found]


def _sums_of_group(weight: Tensor, step: Sequence[int] | None, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    kernel = weight.shape[2:]
    step = step or (1,) * len(kernel)
    num_inputs = weight.shape[1]
    shares = weight.new_ones(num_inputs) if shares is None else shares
    # (out,): what each output gives at most to the others' rows.
    reach = weight.abs().flatten(2).sum(-1) @ shares
    sums, absolute = [], []
    for first in itertools.product(*(range(min(s, k)) for s, k in zip(step, kernel, strict=True))):
        read = weight[(..., *(slice(f, None, s) for f, s in zip(first, step, strict=True)))]
        absolute.append(torch.einsum("oik,o->i", read.abs().flatten(2), reach))
        total = weight.new_zeros(num_inputs)
        for shift in itertools.product(*(range(1 - k, k) for k in kernel)):
            is_mirrored = all(s == 1 for s in step)
            if is_mirrored and shift < (0,) * len(kernel):
                continue
            overlap = _overlap(weight, read, first, step, shift).abs()
            total = total + overlap @ shares
            if is_mirrored and any(shift):  # the overlap with the opposite shift is the transposed one
                total = total + shares @ overlap
        sums.append(total)
    # Sums of numbers that are not negative are off by gamma of the length of the longest chain of additions.
    chain = num_inputs * (math.prod(kernel) + 1) + weight.shape[0] * math.prod(kernel) + 16
    exact = torch.stack(absolute) * (1 + 2 * gamma(chain, weight.dtype))
    # An entry of J^H J is off by gamma_n times that of |J|^H |J| at most.
    products = 1.01 * gamma(weight.numel() // num_inputs + 2, weight.dtype) * exact
    chain = num_inputs + 2 * math.prod(2 * k - 1 for k in kernel) + 16
    rounded = (torch.stack(sums) + products) * (1 + 2 * gamma(chain, weight.dtype))
    return (rounded / shares + _UNDERFLOW).amax(0), (exact / shares).amax(0)


def _overlap(weight: Tensor, read: Tensor, first: Sequence[int], step: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(in, in): the inner products of the taps in ``read`` with those that lie ``shift`` further."""
    theirs, ours = [], []
    for size, begin, stride, move in zip(weight.shape[2:], first, step, shift, strict=True):
        taps = [tap for tap in range(begin, size, stride) if 0 <= tap + move < size]
        if not taps:
            return weight.new_zeros(weight.shape[1], weight.shape[1])
        ours.append(slice((taps[0] - begin) // stride, (taps[-1] - begin) // stride + 1))
        theirs.append(slice(taps[0] + move, taps[-1] + move + 1, stride))
    left, right = read[(..., *ours)].transpose(0, 1), weight[(..., *theirs)].transpose(0, 1)
    return left.flatten(1) @ right.flatten(1).mT
