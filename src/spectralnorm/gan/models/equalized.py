"""Layers with an equalized learning rate (Karras et al. 2018, section 4.1), and how they meet spectral normalization.

Weights begin N(0, 1) and are used times a gain of 1 / sqrt(fan-in), so that Adam, whose steps do not depend on the
scale of a gradient, moves all layers at the same relative speed.

Normalized spectrally, such a layer must use W / sigma(W) and nothing else. That *is* its effective weight normalized,
because ``(g W) / sigma(g W) = W / sigma(W)`` for every gain g; the gain once more on top of it would give the layer
the norm g, about 0.015 for 512 channels and a 3x3 kernel, and the network next to no slope. So a layer drops its gain,
for good, at the first forward that finds its weight normalized; ``add_spectral_norm(model)`` is all there is to do.
After ``remove_spectral_norm(model)``, which bakes W / sigma(W), it stays dropped (a normalization that is removed
before any forward leaves the gain on). The equalized learning rate survives: a normalized layer sees only the direction
of its weight, and the raw weight is still N(0, 1) at the start in every layer. What is not invariant to scale,
``mode="cap"``, caps the raw weight then, not the one times the gain.

The gain is part of the state dict (``_extra_state``), so that baked weights are loaded with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.parametrizations import is_normalized

__all__ = ["EqualizedConv2d", "EqualizedLinear", "ScaledLeakyReLU"]


class _Equalized(nn.Module):
    """What the two layers share; ``gain`` multiplies the weight, 1 once that has been normalized."""

    weight: nn.Parameter
    gain: float

    def _effective_weight(self) -> Tensor:
        if self.gain == 1:
            return self.weight
        if is_normalized(self):
            self.gain = 1.0
            return self.weight
        return self.weight * self.gain

    @torch.no_grad()
    def set_effective_weight(self, weight: Tensor) -> None:
        """Write a weight such that the layer computes with exactly this one, its gain included."""
        self.weight.copy_(weight / self.gain)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.gain, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        self.gain = float(state)


class EqualizedLinear(_Equalized, nn.Linear):
    """``(..., in_features) -> (..., out_features)``.

    Args:
        in_features: of the input.
        out_features: of the output.
        learning_rate: relative to the other layers'; 0.01 in StyleGAN's mapping network.
        bias: that the layer begins with.
    """

    def __init__(self, in_features: int, out_features: int, *, learning_rate: float = 1.0, bias: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.gain = learning_rate / math.sqrt(in_features)
        self.bias_gain = learning_rate
        nn.init.normal_(self.weight, std=1 / learning_rate)
        nn.init.constant_(self.bias, bias)

    def forward(self, inputs: Tensor) -> Tensor:
        bias = self.bias if self.bias_gain == 1 else self.bias * self.bias_gain
        return F.linear(inputs, self._effective_weight(), bias)


class EqualizedConv2d(_Equalized, nn.Conv2d):
    """``(batch, in_channels, height, width) -> (batch, out_channels, ...)``, zero-padded.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: taps along each axis.
        stride: along each axis.
        padding: zeros around the input.
        bias: whether there is one; it begins at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._conv_forward(inputs, self._effective_weight(), self.bias)


class ScaledLeakyReLU(nn.LeakyReLU):
    """Leaky ReLU of slope 0.2, times sqrt(2), which keeps the mean square of a normal input (nearly: 1.04)."""

    def __init__(self) -> None:
        super().__init__(0.2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(2)
