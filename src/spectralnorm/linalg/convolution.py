"""A convolution as a linear map between images: what decides it beside its weight, what it does, and its adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PADDING_MODES", "ConvolutionGeometry", "max_patches_per_pixel"]

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

_PAD_MODE = {"zeros": "constant"}
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, slots=True)
class ConvolutionGeometry:
    """All that decides a convolution's linear map, but for its weight and the size of its input.

    Attributes:
        kernel_size: taps along each axis.
        stride: along each axis.
        dilation: along each axis.
        padding: before and after the input along each axis. For a transposed convolution what is cropped from its
            output instead, as in torch.
        padding_mode: one of `PADDING_MODES`; a transposed convolution has zeros only.
        groups: number of independent parts that inputs and outputs fall into.
        transposed: whether this is the adjoint of the convolution with the same weight.
        output_padding: of a transposed convolution: entries that its output has more, along each axis.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "zeros"
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Any) -> ConvolutionGeometry:
        """That of a ``Conv1d`` to ``ConvTranspose3d``, with ``padding="same"`` and ``"valid"`` resolved."""
        if layer.padding == "valid":
            padding = tuple((0, 0) for _ in layer.kernel_size)
        elif layer.padding == "same":
            extra = [dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in extra)
        else:
            padding = tuple((each, each) for each in layer.padding)
        return cls(
            kernel_size=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            padding=padding,
            padding_mode=layer.padding_mode,
            groups=layer.groups,
            transposed=layer.transposed,
            output_padding=tuple(layer.output_padding) if layer.transposed else (),
        )

    @property
    def num_axes(self) -> int:
        """Spatial axes: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def extent(self) -> tuple[int, ...]:
        """Pixels from the first tap of the dilated kernel to its last, both counted, along each axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """Input and output channels of the convolution with ``weight``."""
        first, second = weight.shape[0], weight.shape[1] * self.groups
        return (first, second) if self.transposed else (second, first)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Size of the output along each axis for an input of ``input_size``; not positive where nothing comes out."""
        ends = [before + after for before, after in self.padding]
        if self.transposed:
            sizes = zip(input_size, self.stride, ends, self.extent, self.output_padding, strict=True)
            return tuple((n - 1) * s - p + e + o for n, s, p, e, o in sizes)
        sizes = zip(input_size, self.stride, ends, self.extent, strict=True)
        return tuple((n + p - e) // s + 1 for n, s, p, e in sizes)

    def apply(self, images: Tensor, weight: Tensor) -> Tensor:
        """The linear map.

        Args:
            images: (batch, in_channels, *input_size).
            weight: (out_channels, in_channels / groups, *kernel_size); if ``transposed``
                (in_channels, out_channels / groups, *kernel_size).

        Returns:
            (batch, out_channels, *output_size).
        """
        symmetric = self._symmetric_padding()
        options = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        if self.transposed:
            options |= {"padding": symmetric, "output_padding": self.output_padding}
            return _TRANSPOSED[self.num_axes - 1](images, weight, **options)
        if symmetric is None:
            images, symmetric = self._padded(images), (0,) * self.num_axes
        return _CONVOLUTIONS[self.num_axes - 1](images, weight, padding=symmetric, **options)

    def adjoint(self, outputs: Tensor, weight: Tensor, input_size: Sequence[int]) -> Tensor:
        """The adjoint of the map: the inner products of its outputs with ``outputs``, as a function of the input.

        Args:
            outputs: (batch, out_channels, *output_size).
            weight: as in `apply`.
            input_size: size of the input along each axis, which the size of the output does not tell.

        Returns:
            (batch, in_channels, *input_size).
        """
        if weight.is_complex():
            weight = weight.conj()
        options = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        symmetric = self._symmetric_padding()
        if self.transposed:
            images = _CONVOLUTIONS[self.num_axes - 1](outputs, weight, padding=symmetric or 0, **options)
            return images[(..., *(slice(n) for n in input_size))]
        if symmetric is None:
            padded_size = [n + sum(ends) for n, ends in zip(input_size, self.padding, strict=True)]
            symmetric = (0,) * self.num_axes
        else:
            padded_size = input_size
        images = self._transposed_to(padded_size, symmetric, outputs, weight, options)
        return images if padded_size is input_size else self._unpadded(images, tuple(input_size))

    def derivative(self, images: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
        """The derivative of ``<apply(images, weight), outputs>`` in the weight, in which that is linear.

        Without autograd, which on an accelerator computes in a thread of its own: that may be waiting for a lock that
        the caller holds.

        Args:
            images: as in `apply`.
            outputs: as `apply` returns them.
            weight: as in `apply`; its numbers do not matter.

        Returns:
            Of the weight's shape.
        """
        padding = self._symmetric_padding()
        if padding is None:
            images, padding = self._padded(images), (0,) * self.num_axes
        ends = self.output_padding if self.transposed else (0,) * self.num_axes
        geometry = self.stride, padding, self.dilation, self.transposed, ends, self.groups
        wanted = False, True, False
        return torch.ops.aten.convolution_backward(outputs, images, weight, None, *geometry, wanted)[1]

    def _transposed_to(
        self, size: Sequence[int], padding: tuple[int, ...], outputs: Tensor, weight: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """The transposed convolution with an output of ``size``, whose end the last output may not have reached."""
        reached = zip(outputs.shape[2:], self.stride, padding, self.extent, strict=True)
        missing = [n - ((m - 1) * s - 2 * p + e) for n, (m, s, p, e) in zip(size, reached, strict=True)]
        transposed = _TRANSPOSED[self.num_axes - 1]
        return transposed(outputs, weight, padding=padding, output_padding=missing, **options)

    def _symmetric_padding(self) -> tuple[int, ...] | None:
        """The padding that torch's own convolution does; None: it has to be done before."""
        if self.padding_mode != "zeros" or any(before != after for before, after in self.padding):
            return None
        return tuple(before for before, _ in self.padding)

    def _padded(self, images: Tensor) -> Tensor:
        mode = _PAD_MODE.get(self.padding_mode, self.padding_mode)
        return F.pad(images, [end for ends in reversed(self.padding) for end in ends], mode=mode)

    def _unpadded(self, images: Tensor, input_size: tuple[int, ...]) -> Tensor:
        """The adjoint of `_padded`: every pixel gets the sum of its copies."""
        for axis, (n, ends) in enumerate(zip(input_size, self.padding, strict=True), start=2):
            sources = self.sources(n, ends).to(images.device)
            summed = images.new_zeros((*images.shape[:axis], n + 1, *images.shape[axis + 1 :]))
            images = summed.index_add_(axis, sources, images).narrow(axis, 0, n)
        return images

    def sources(self, size: int, ends: tuple[int, int]) -> Tensor:
        """For each pixel of a padded axis the pixel it is a copy of; ``size`` where it is zero.

        Args:
            size: of the axis before it is padded.
            ends: padding before and after.
        """
        return _sources(self.padding_mode, size, ends)


@lru_cache(maxsize=1024)
def _sources(padding_mode: str, size: int, ends: tuple[int, int]) -> Tensor:
    if padding_mode == "zeros":
        return F.pad(torch.arange(size, device="cpu"), ends, value=size)
    # torch pads floating point; every size that fits in memory is exact in float64.
    return F.pad(torch.arange(size, dtype=torch.float64, device="cpu")[None], ends, mode=padding_mode)[0].long()


def max_patches_per_pixel(geometry: ConvolutionGeometry, input_size: Sequence[int]) -> int:
    """The largest number of patches that read one input pixel, over all axes: (prod of ``c`` along each axis).

    A convolution is its reshaped kernel after the map that copies the patches out, and that map's norm is the root of
    this number, so sqrt(max_patches_per_pixel) * ||reshaped kernel|| bounds the norm of the convolution.
    """
    return _max_patches_per_pixel(geometry, tuple(input_size))


@lru_cache(maxsize=1024)
def _max_patches_per_pixel(geometry: ConvolutionGeometry, input_size: tuple[int, ...]) -> int:
    # The adjoint of a transposed convolution reads the output, and as many patches of it as there are inputs.
    output_size = geometry.output_size(input_size)
    read_size, num_patches = (output_size, input_size) if geometry.transposed else (input_size, output_size)
    counts = []
    axes = zip(
        read_size, num_patches, geometry.padding, geometry.kernel_size, geometry.stride, geometry.dilation, strict=True
    )
    for n, m, ends, k, s, d in axes:
        sources = geometry.sources(n, ends)
        patches, places = torch.arange(m, device="cpu"), torch.arange(k, device="cpu")
        read = sources[(patches[:, None] * s + places * d).flatten()]
        counts.append(int(torch.bincount(read, minlength=n + 1)[:n].max()))
    return math.prod(counts)
