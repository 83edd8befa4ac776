"""Convolutions whose inputs are scaled by a style, image by image (Karras et al. 2020), as layers with a weight each.

They are convolutions to whatever normalizes weights. Where the outputs are demodulated, every scale of the weight is
divided out again, a normalization's too: it changes how the weight is trained, and leaves what the layer computes.
Without demodulation the scale counts, and as in `spectralnorm.gan.models.equalized` the gain is dropped for it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.gan.models.equalized import EqualizedConv2d

__all__ = ["MODULATED", "ModulatedConv2d", "ModulatedConvTranspose2d", "modulated_convolution"]


class ModulatedConv2d(EqualizedConv2d):
    """``(batch, in_channels, height, width)`` and styles ``(batch, in_channels)`` to ``(batch, out_channels, ...)``.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: taps along each axis, odd; the image keeps its size.
        demodulate: bring every output to unit norm again. The weight then needs no gain.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, demodulate: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.demodulate = demodulate
        if demodulate:
            self.gain = 1.0

    def forward(self, inputs: Tensor, style: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return modulated_convolution(inputs, self._effective_weight(), style, demodulate=self.demodulate)


class ModulatedConvTranspose2d(nn.ConvTranspose2d):
    """A demodulated 3x3 one that puts zeros between the pixels first: maps grow to ``2 * size + 1``.

    Args:
        in_channels: of the input.
        out_channels: of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor, style: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return modulated_convolution(input, self.weight.transpose(0, 1), style, up=True)


MODULATED = (ModulatedConv2d, ModulatedConvTranspose2d)


def modulated_convolution(
    features: Tensor, weight: Tensor, style: Tensor, *, up: bool = False, demodulate: bool = True
) -> Tensor:
    """Convolution whose weight is scaled by the style along its inputs, then to unit norm for each output.

    Karras et al. 2020, eqs. 1 to 3: ``w'_oik = s_i w_oik``, divided by ``sqrt(sum_ik w'_oik^2 + 1e-8)``. Inputs and
    outputs are scaled in the place of the weights, so that all images share one convolution.

    Args:
        features: (batch, in, height, width).
        weight: (out, in, kernel, kernel), kernel odd.
        style: (batch, in).
        up: put zeros between the pixels first, ``(batch, out, 2 * height + 1, 2 * width + 1)`` for a 3x3 kernel, which
            a blur with ``padding=1`` brings to twice the size.
        demodulate: divide by the norm.

    Returns:
        (batch, out, height, width) if not ``up``.
    """
    features = features * style[:, :, None, None]
    if up:
        features = F.conv_transpose2d(features, weight.transpose(0, 1), stride=2)
    else:
        features = F.conv2d(features, weight, padding=weight.shape[-1] // 2)
    if not demodulate:
        return features
    square_norms = style.square() @ weight.square().sum((2, 3)).T
    return features * (square_norms + 1e-8).rsqrt()[:, :, None, None]
