"""Linear maps between two places of a network, kept explicit so that neighbours are bounded as one."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel
from spectralnorm.linalg.lower import convolution_lower_bound, matrix_lower_bound
from spectralnorm.linalg.rounding import gamma, product_gamma
from spectralnorm.lipschitz.bounds import convolution_bound, frobenius, largest_frobenius, matrix_bound, underflow
from spectralnorm.lipschitz.composition import compose_convolutions
from spectralnorm.lipschitz.upward import add_up, mul_up, root_up

__all__ = ["ConvolutionMap", "DenseMap", "ScaleMap"]

# Multiplications that a merged matrix may cost; above, the two norms are multiplied instead.
_MAX_PRODUCT = 2e10
_MAX_ENTRIES = 2**26
_MAX_IMAGE = 2**17  # entries of an image that a lower bound is searched on


@dataclass(frozen=True, eq=False)
class ScaleMap:
    """Multiplies every channel (dimension 1) by a number.

    Attributes:
        scale: (channels,), or (batch, channels) where samples differ by a constant of their own; float64.
        relative: what an entry may be off by, in units of itself.
    """

    scale: Tensor
    relative: float = 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether all channels are multiplied by the same number, but for its sign."""
        size = self.scale.abs()
        return size.numel() > 0 and bool((size == size.flatten()[0]).all())

    def bound(self) -> float:
        """Of its norm."""
        return mul_up(float(self.scale.abs().max()) if self.scale.numel() else 0.0, 1 + 2 * self.relative)

    def lower_bound(self) -> float:
        """Of its norm, from below."""
        largest = float(self.scale.abs().max()) if self.scale.numel() else 0.0
        return largest * (1 - 2 * self.relative - 2.0**-52) if self.relative else largest

    def after(self, first: Any) -> Any:
        """This after ``first``, as one map; None where that has no explicit form."""
        relative = self.relative + gamma(2)
        if isinstance(first, ScaleMap):
            product = self.scale * first.scale
            # What underflows is off by more than a share of itself.
            small = (product.abs() < sys.float_info.min) & (self.scale != 0) & (first.scale != 0)
            return None if bool(small.any()) else ScaleMap(product, relative + 1.01 * first.relative)
        if isinstance(first, DenseMap) and first.matrix.shape[-2] == self.scale.shape[-1]:
            scaled = self.scale[..., :, None] * first.matrix
            rounding = add_up(mul_up(1.01 * relative, largest_frobenius(scaled)), underflow(scaled.numel()))
            return DenseMap(scaled, add_up(mul_up(self.bound(), first.error), rounding))
        if isinstance(first, ConvolutionMap) and self.scale.ndim == 1:
            shape = self.scale.reshape(-1, *[1] * (first.weight.ndim - 1))
            if first.geometry.transposed:
                out_channels = first.weight.shape[1]
                shape = self.scale.reshape(first.geometry.groups, 1, out_channels, *[1] * first.geometry.num_axes)
                grouped = first.weight.unflatten(0, (first.geometry.groups, -1))
                scaled = (grouped * shape).flatten(0, 1)
            else:
                scaled = first.weight * shape
            together = first.scaled(scaled, relative, self.bound())
            if self.is_uniform:
                return replace(together, known_bound=mul_up(self.bound(), first.bound()))
            return together
        return None


@dataclass(frozen=True, eq=False)
class DenseMap:
    """A matrix on the flattened sample.

    Attributes:
        matrix: (out, in), or (batch, out, in) where samples differ by a constant of their own; float64.
        error: the 2-norm of what the matrix is off by at most.
    """

    matrix: Tensor
    error: float = 0.0

    def bound(self) -> float:
        """Of its norm; for several matrices of the largest."""
        return add_up(self._norm, self.error)

    def lower_bound(self) -> float:
        """Of its norm, from below; of the first matrix, where there are several."""
        return max(0.0, matrix_lower_bound(self.matrix if self.matrix.ndim == 2 else self.matrix[0]) - self.error)

    @cached_property
    def _norm(self) -> float:
        if self.matrix.ndim == 2:
            return matrix_bound(self.matrix)
        if 1 in self.matrix.shape[-2:]:
            return largest_frobenius(self.matrix)
        return max(matrix_bound(each) for each in torch.unique(self.matrix, dim=0))

    def after(self, first: Any) -> Any:
        """This after ``first``, as one map; None where that has no explicit form or costs too much."""
        if isinstance(first, ScaleMap) and self.matrix.shape[-1] == first.scale.shape[-1]:
            scaled = self.matrix * first.scale[..., None, :]
            relative = 1.01 * (first.relative + gamma(1))
            rounding = add_up(mul_up(relative, largest_frobenius(scaled)), underflow(scaled.numel()))
            return DenseMap(scaled, add_up(mul_up(self.error, first.bound()), rounding))
        if isinstance(first, DenseMap) and self.matrix.shape[-1] == first.matrix.shape[-2]:
            inner = self.matrix.shape[-1]
            batch = max(
                self.matrix.shape[0] if self.matrix.ndim == 3 else 1,
                first.matrix.shape[0] if first.matrix.ndim == 3 else 1,
            )
            entries = batch * self.matrix.shape[-2] * first.matrix.shape[-1]
            if entries * inner > _MAX_PRODUCT or entries > _MAX_ENTRIES:
                return None
            second_size, first_size = largest_frobenius(self.matrix), largest_frobenius(first.matrix)
            rounding = mul_up(product_gamma(inner, torch.float64), second_size, first_size)
            crossed = add_up(mul_up(second_size, first.error), mul_up(self.error, add_up(first_size, first.error)))
            return DenseMap(self.matrix @ first.matrix, add_up(rounding, crossed, underflow(entries * inner)))
        return None

    def plus(self, other: DenseMap, *, sign: float = 1.0) -> DenseMap:
        """The sum (or difference) of two maps of the same input."""
        total = self.matrix + sign * other.matrix
        return DenseMap(total, add_up(self.error, other.error, mul_up(gamma(2), largest_frobenius(total))))


@dataclass(frozen=True, eq=False)
class ConvolutionMap:
    """A convolution of images of a known size.

    Attributes:
        weight: as torch stores it, float64.
        geometry: of the convolution.
        input_size: along each spatial axis; None stands for every size.
        error: the norm of the convolution with what the weight is off by, at most.
        read_size: the size that the error was computed for.
        known_bound: of its norm, where there is no need to look for one.
    """

    weight: Tensor
    geometry: ConvolutionGeometry
    input_size: tuple[int, ...] | None
    read_size: tuple[int, ...]
    error: float = 0.0
    known_bound: float | None = None

    def bound(self) -> float:
        """Of its norm."""
        return self._bound

    @cached_property
    def _bound(self) -> float:
        if self.known_bound is not None:
            return self.known_bound
        return add_up(convolution_bound(*self._different_groups(), self.input_size), self.error)

    def lower_bound(self) -> float:
        """Of its norm at the size it was met with, from below."""
        weight, geometry = self._different_groups()
        size = list(self.read_size)
        # A smaller image, at the start of a larger one that is zero elsewhere, gives a part of its outputs: a smaller
        # norm, and by less than a percent.
        while geometry.padding_mode == "zeros" and geometry.channels(weight)[0] * math.prod(size) > _MAX_IMAGE:
            smaller = [-(-n // 2) for n in size]
            if min(n / s for n, s in zip(smaller, geometry.extent, strict=True)) < 8:
                break
            size = smaller
        return max(0.0, convolution_lower_bound(weight, geometry, size) - self.error)

    def _different_groups(self) -> tuple[Tensor, ConvolutionGeometry]:
        """The norm is the largest of the groups', so groups that are alike (a blur of every channel) count once."""
        groups = self.weight.unflatten(0, (self.geometry.groups, -1))
        different = torch.unique(groups, dim=0) if len(groups) > 1 else groups
        return different.flatten(0, 1), replace(self.geometry, groups=len(different))

    def after(self, first: Any) -> Any:
        """This after ``first``, as one map; None where that has no explicit form."""
        if isinstance(first, ConvolutionMap):
            return self._after_convolution(first)
        if not isinstance(first, ScaleMap) or first.scale.ndim != 1:
            return None
        groups = self.geometry.groups
        if self.geometry.transposed:
            scaled = self.weight * first.scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        else:
            grouped = self.weight.unflatten(0, (groups, -1))
            scale = first.scale.reshape(groups, 1, self.weight.shape[1], *[1] * self.geometry.num_axes)
            scaled = (grouped * scale).flatten(0, 1)
        together = self.scaled(scaled, first.relative + gamma(1), first.bound())
        if first.is_uniform:
            return replace(together, known_bound=mul_up(self.bound(), first.bound()))
        return together

    def _after_convolution(self, first: ConvolutionMap) -> ConvolutionMap | None:
        if self.geometry.num_axes != first.geometry.num_axes:
            return None
        found = compose_convolutions(self.weight, self.geometry, first.weight, first.geometry)
        if found is None:
            return None
        patches = max_patches_per_pixel(found.geometry, first.read_size)
        own = mul_up(root_up(float(patches)), found.error)
        # (B + F)(A + E) - B A = F (A + E) + B E
        crossed = add_up(mul_up(self.error, first.bound()), mul_up(self.bound(), first.error))
        together = ConvolutionMap(found.weight, found.geometry, first.input_size, first.read_size, add_up(own, crossed))
        # One filter for all channels and a matrix for all pixels do not meet: the norm is their norms' product.
        if (self._is_pointwise and first._is_one_filter) or (self._is_one_filter and first._is_pointwise):
            return replace(together, known_bound=mul_up(self.bound(), first.bound()))
        return together

    @property
    def _is_pointwise(self) -> bool:
        return math.prod(self.geometry.kernel_size) == 1

    @property
    def _is_one_filter(self) -> bool:
        return self.weight.shape[1] == 1 and len(self.weight) == self.geometry.groups and self._num_different == 1

    @cached_property
    def _num_different(self) -> int:
        return self._different_groups()[1].groups

    def scaled(self, weight: Tensor, relative: float, growth: float) -> ConvolutionMap:
        """With another weight, this one's multiplied by ``growth`` at most; entries may be off by ``relative``."""
        # |conv| <= sqrt(patches per pixel) ||weight||_F, also of the difference.
        patches = max_patches_per_pixel(self.geometry, self.read_size)
        own = add_up(mul_up(1.01 * relative, frobenius(weight)), underflow(weight.numel()))
        error = add_up(mul_up(root_up(float(patches)), own), mul_up(self.error, growth))
        return replace(self, weight=weight, error=error, known_bound=None)
