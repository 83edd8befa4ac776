"""How weights begin, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear

__all__ = ["INITIALIZATIONS"]


def orthogonal(network: nn.Module) -> None:
    """Weights of convolutions and dense layers as (semi-)orthogonal matrices, biases zero (Saxe et al. 2014).

    All singular values are equal at the start, as they also are in a well-trained normalized discriminator (Miyato et
    al. 2018, Fig. 3), and signals keep their size through both networks; N(0, 0.02) lets them fade at first.
    """
    for module in network.modules():
        if isinstance(module, EqualizedLinear | EqualizedConv2d):
            # It computes with its weight times a gain; its bias may be more than an offset (that of a style is 1).
            module.set_effective_weight(nn.init.orthogonal_(torch.empty_like(module.weight)))
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def published(network: nn.Module) -> None:
    """Leave the weights as the architecture's own publication begins them."""


INITIALIZATIONS: dict[str, Callable[[nn.Module], None]] = {"published": published, "orthogonal": orthogonal}
"""Initializations by name; applied to both networks before normalization."""
