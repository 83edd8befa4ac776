"""Any convolution as one of stride 1 on a torus, whose norm is the largest over the frequencies of its symbol.

On a torus a convolution is block diagonal in the Fourier basis (Sedghi et al. 2019). Padding, strides and transposition
are brought there by steps that never lower the norm; docs/library/convolution-bounds.md derives each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import PADDING_MODES, ConvolutionGeometry
from spectralnorm.linalg.patches import copies_on_axis

__all__ = ["OnTorus", "half_of_frequencies", "on_torus"]

_UP = 1 + 2.0**-48  # pays for the roundings of a short float64 expression


class OnTorus(NamedTuple):
    """||convolution|| <= factor * (moved + max over groups and frequencies 2 pi j / sizes of ||symbol of kernel||).

    Attributes:
        parts: (groups, rows, *columns, *taps), no fewer columns than rows, real; in float64 if taps were added up, else
            in the weight's type. Columns are channels, and after them the phases of the axes with a stride.
        sizes: of the torus, or of the grid of frequencies, along each axis.
        factor: 1, or what padding by copies and a grid in place of all frequencies may add.
        moved: how far rounding has moved the symbol where taps were added up. It has the size of what was added, and
            what is left of that may be less.
    """

    parts: Tensor
    sizes: tuple[int, ...]
    factor: float
    moved: float

    @property
    def taps(self) -> tuple[int, ...]:
        """Along each axis."""
        return tuple(self.parts.shape[-len(self.sizes) :])

    @property
    def kernel(self) -> Tensor:
        """The parts as (groups, rows, columns, *taps); a copy if there are phases."""
        return self.parts.flatten(2, self.parts.ndim - 1 - len(self.sizes))


def on_torus(
    weight: Tensor, geometry: ConvolutionGeometry, input_size: Sequence[int] | None, *, max_excess: float
) -> OnTorus:
    """Bring a convolution onto a torus.

    Args:
        weight: as in `ConvolutionGeometry.apply`, real or complex.
        geometry: of the convolution.
        input_size: along each axis; None: all sizes at once.
        max_excess: what a grid in place of all frequencies may add, relative; a quarter of it for a given size, where
            such a grid stands in for a torus with more points.

    Raises:
        UserError: ``input_size`` does not fit, or ``max_excess`` is not positive.
    """
    if not 0 < max_excess < math.inf:
        raise UserError(f"max_excess must be a positive number, got {max_excess}.")
    if geometry.padding_mode not in PADDING_MODES:
        raise UserError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {geometry.padding_mode!r}.")
    size = None if input_size is None else _checked(geometry, tuple(input_size))
    if geometry.transposed:
        # The adjoint of the convolution with the same tensor, which reads what this one writes.
        size = None if size is None else geometry.output_size(size)
    blocks = weight.unflatten(0, (geometry.groups, -1))  # (groups, out / groups, in / groups, *kernel_size)
    if blocks.is_complex():
        blocks = _embedded(blocks)
    sizes, factor, moved = [], 1.0, 0.0
    excesses = _excess_per_axis(geometry, max_excess if size is None else max_excess / 4)
    for axis in range(geometry.num_axes):
        stride, dilation = geometry.stride[axis], geometry.dilation[axis]
        n = None if size is None else size[axis]
        if n is None:
            # All sizes: a common divisor only splits the pixels into parts that do not meet.
            common = math.gcd(stride, dilation)
            stride, dilation = stride // common, dilation // common
        blocks = _polyphase(
            blocks, blocks.ndim - geometry.num_axes, axis, stride, dilation if n is not None or stride > 1 else 1
        )
        copies, torus = _padding_rule(geometry, axis, n)
        dim = blocks.ndim - geometry.num_axes + axis
        num_taps = blocks.shape[dim]
        grid, cosine = _grid(num_taps, excesses)
        if torus is None or torus > grid:
            torus, factor = grid, factor * cosine
        factor = factor * math.sqrt(copies) * _UP
        if num_taps > torus:
            moved += _folding_error(blocks, num_taps)
            blocks = _folded(blocks.double(), dim, torus)
        sizes.append(torus)
    if blocks.shape[1] > math.prod(blocks.shape[2 : blocks.ndim - geometry.num_axes]):
        blocks = blocks.flatten(2, blocks.ndim - geometry.num_axes - 1).transpose(1, 2)
    return OnTorus(blocks, tuple(sizes), 1.0 if factor <= _UP**geometry.num_axes else factor, moved)


def _checked(geometry: ConvolutionGeometry, input_size: tuple[int, ...]) -> tuple[int, ...]:
    fits = len(input_size) == geometry.num_axes and all(n >= 1 for n in input_size)
    if not fits or any(n < 1 for n in geometry.output_size(input_size)):
        raise UserError(
            f"input_size must be {geometry.num_axes} positive whole numbers that leave an output, got {input_size}."
        )
    return input_size


def _excess_per_axis(geometry: ConvolutionGeometry, max_excess: float) -> float:
    num_sampled = sum(taps > 1 for taps in geometry.extent)
    # No grid is fine enough for one.
    return max((1 + max_excess) ** (1 / max(1, num_sampled)), 1 + 2.0**-52)


def _grid(num_taps: int, excess: float) -> tuple[int, float]:
    """The smallest grid on which the largest value of a symbol with ``num_taps`` is missed by ``excess`` at most.

    A trigonometric polynomial of degree k - 1 is at most 1 / cos(pi (k - 1) / (2 N)) above its largest value on N
    equidistant points, N > k - 1.
    """
    if num_taps == 1:
        return 1, 1.0
    size = max(num_taps, math.ceil(math.pi * (num_taps - 1) / (2 * math.acos(1 / excess))))
    return size, _UP / math.cos(math.pi * (num_taps - 1) / (2 * size))


def _polyphase(blocks: Tensor, first: int, axis: int, stride: int, dilation: int) -> Tensor:
    """Zeros between dilated taps; then the taps of each phase of the stride as input channels of their own.

    ``blocks`` is (groups, out, in, *phases of the axes before, *taps), with taps from the dimension ``first`` on.
    """
    dim = first + axis
    taps = blocks.shape[dim]
    if dilation > 1 and taps > 1:
        spread = blocks.new_zeros((*blocks.shape[:dim], dilation * (taps - 1) + 1, *blocks.shape[dim + 1 :]))
        spread.narrow(dim, 0, spread.shape[dim])[(slice(None),) * dim + (slice(None, None, dilation),)] = blocks
        blocks = spread
    if stride == 1:
        return blocks
    missing = -blocks.shape[dim] % stride
    if missing:
        blocks = F.pad(blocks, [0, 0] * (blocks.ndim - 1 - dim) + [0, missing])
    # Tap s q + r reads phase r of the input, q pixels further.
    return blocks.unflatten(dim, (-1, stride)).movedim(dim + 1, first)


def _padding_rule(geometry: ConvolutionGeometry, axis: int, n: int | None) -> tuple[int, int | None]:
    """How many copies padding makes of a pixel at most, and the size of the torus after it; None: any size.

    ``n`` is the number of pixels of the convolution's input along the axis; None: any number.
    """
    stride, extent, ends = geometry.stride[axis], geometry.extent[axis], geometry.padding[axis]
    if geometry.padding_mode == "zeros":
        # The convolution is a part of the one on a torus on which no output wraps around to read both ends.
        wrapped = min(max(ends), extent - 1)
        return 1, None if n is None else max(1, math.ceil((n + wrapped) / stride))
    if geometry.padding_mode == "circular" and sum(ends) <= extent - 1 and (stride == 1 or (n and n % stride == 0)):
        return 1, None if n is None else n // stride
    # A convolution without padding, after the map that pads, whose norm is the root of the number of copies.
    if n is not None:
        copies = torch.bincount(geometry.sources(n, ends), minlength=n).max()
        return int(copies), math.ceil((n + sum(ends)) / stride)
    return copies_on_axis(geometry, axis), None


def _embedded(blocks: Tensor) -> Tensor:
    """The real map on pairs of real and imaginary parts, which has the norm of the complex one.

    Its symbol is unitarily equivalent to the complex one at w beside the conjugate of that at -w.
    """
    real, imaginary = blocks.real, blocks.imag
    return torch.cat((torch.cat((real, -imaginary), 2), torch.cat((imaginary, real), 2)), 1)


def _folding_error(kernel: Tensor, num_taps: int) -> float:
    """By how much `_folded` may be wrong in the sum over taps of Frobenius norms: twice the bound for any order."""
    size = float(kernel.abs().double().flatten(1).sum(1).amax())
    return size * (num_taps * 2.0**-52) if math.isfinite(size) else math.inf


def _folded(kernel: Tensor, dim: int, size: int) -> Tensor:
    """Taps that fall onto the same pixel of a torus, added up."""
    index = torch.arange(kernel.shape[dim], device=kernel.device) % size
    shape = (*kernel.shape[:dim], size, *kernel.shape[dim + 1 :])
    return kernel.new_zeros(shape).index_add_(dim, index, kernel)


def half_of_frequencies(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers j of the frequencies 2 pi j / sizes, one of each pair j and -j, which a real kernel makes alike.

    Returns:
        (num_frequencies, axes), int64.
    """
    axes = [torch.arange(size, device=device) for size in sizes]
    grid = torch.cartesian_prod(*axes).view(-1, len(sizes))
    mirrored = torch.stack([-column % size for column, size in zip(grid.unbind(1), sizes, strict=True)], 1)
    weights = torch.tensor([math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))], device=device)
    return grid[(grid * weights).sum(1) <= (mirrored * weights).sum(1)]
