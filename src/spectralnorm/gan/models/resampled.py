"""Convolutions beside a change of resolution, as one convolution: the same numbers for less than half of the products.

Doubling an image (nearest neighbour) and then filtering it reads every pixel in four copies; averaging 2x2 pixels of a
filtered image throws three quarters of them away. Both are linear, and so is what they are one with: a convolution of
stride 2 whose kernel is the layer's own, summed over every 2x2 window of it. 3x3 becomes 4x4, and 36 products for four
pixels become 16. The large map between is never made.

What a layer is, its weight and its place in a network's state are those of the plain convolution, so that it is
normalized, counted and loaded like one; results differ from the two steps by rounding. Under autocast their weight
is not handed out rounded, as a plain convolution's is: the sums are rounded once, and rounding what is summed as well
would make their error 1.4 times as large.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DoubledConv2d", "HalvedConv2d"]


class _Conv3x3(nn.Conv2d):
    """A plain 3x3 convolution that keeps the size of its input.

    Args:
        in_channels: of the images that come in.
        out_channels: of those that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)


class DoubledConv2d(_Conv3x3):
    """Doubles images by nearest neighbour, then filters them: ``(batch, in, h, w)`` to ``(batch, out, 2h, 2w)``.

    Output pixel j reads the doubled image at ``j + k - 1`` with tap k. Image pixel m stands there twice, at 2m and
    2m + 1, so it reaches j with the taps ``2m - j + 1`` and ``2m - j + 2``: a transposed convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Sums are 4 times averages, to the bit; the pool's own divisor_override is lost on the way to ONNX.
        kernel = 4 * functional.avg_pool2d(self.weight, 2, stride=1, padding=1)
        turned = kernel.flip(2, 3).transpose(0, 1)
        return functional.conv_transpose2d(input, turned, self.bias, stride=2, padding=1)


class HalvedConv2d(_Conv3x3):
    """Filters images, then averages 2x2 pixels: ``(batch, in, h, w)`` to ``(batch, out, h/2, w/2)``; h and w are even.

    In eval mode it takes the two steps one by one: a certificate then finds the layer's own convolution, whose norm
    normalization has set, and the average with its norm of 1/2.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return functional.avg_pool2d(super().forward(input), 2)
        kernel = functional.avg_pool2d(self.weight, 2, stride=1, padding=1)
        return functional.conv2d(input, kernel, self.bias, stride=2, padding=1)
