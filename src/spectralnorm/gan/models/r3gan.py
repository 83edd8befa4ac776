"""R3GAN (Huang et al. 2024): a modern baseline that normalizes nothing.

Both networks are the same simple residual network, one upside down: 1x1, grouped 3x3, 1x1 convolutions (ResNeXt),
leaky ReLU, no normalization, Fix-up initialization (Zhang et al. 2019), bilinear resampling. What keeps the training
stable is not in the networks but in the game: the relativistic loss with R1 and R2 penalties at every step,
``make_config(architecture="r3gan", normalization="none", loss="relativistic", penalty="r1-r2")``.

Where the public code is not followed: channels double towards the latent from ``width``, as in the other networks here;
the generator ends with tanh.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from spectralnorm.gan.models.bounded import output_gain
from spectralnorm.gan.models.filters import Downsample, Upsample
from spectralnorm.gan.models.stylegan2_discriminator import channels_by_size

__all__ = ["R3GANDiscriminator", "R3GANGenerator"]

_EXPANSION = 2
_GROUP_WIDTH = 16
_ACTIVATION_GAIN = math.sqrt(2 / (1 + 0.2**2))  # keeps the mean square of a normal input behind a leaky ReLU of 0.2


class R3GANGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].

    Args:
        image_size: halves evenly down to 4-7 px, such as 32, 48, 64, 128, 256.
        channels: of the images.
        width: channels of the last feature map; they double towards the first, up to 8 x.
        latent_dim: dimensions of the latent; 64 in the paper.
        blocks_per_size: residual blocks at each size; 2 in the paper.

    Raises:
        UserError: the size does not halve evenly.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        width: int = 64,
        latent_dim: int = 64,
        blocks_per_size: int = 2,
    ) -> None:
        super().__init__()
        sizes = sorted(channels_by_size(image_size, width=width, max_width=None).items())
        first_size, first = sizes[0]
        num_blocks = blocks_per_size * len(sizes)
        self.basis = nn.Parameter(torch.randn(first, first_size, first_size))
        self.dense = _scaled(nn.Linear(latent_dim, first, bias=False))
        layers: list[nn.Module] = [_Residual(first, num_blocks) for _ in range(blocks_per_size)]
        for (_, wide), (_, narrow) in pairwise(sizes):
            layers += [*_changed(wide, narrow), Upsample()]
            layers += [_Residual(narrow, num_blocks) for _ in range(blocks_per_size)]
        self.layers = nn.Sequential(*layers)
        self.to_image = _scaled(nn.Conv2d(sizes[-1][1], channels, 1, bias=False))

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.to_image(self.layers(self.basis * self.dense(latents)[:, :, None, None])))


class R3GANDiscriminator(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``.

    With ``lipschitz`` a block averages its branches instead of adding them, and downsampling keeps the 2-norm of a
    smooth image instead of its mean, so that every part has norm at most 1 if every weight has. The last weight of a
    block then begins as the others, because a weight that is zero has no norm to be divided by.

    Args:
        image_size: halves evenly down to 4-7 px, such as 32, 48, 64, 128, 256.
        channels: of the images.
        width: channels of the first feature map; they double downwards, up to 8 x.
        blocks_per_size: residual blocks at each size; 2 in the paper.
        lipschitz: None for the published network; a number for the one whose Lipschitz constant is at most that if the
            norm of every weight (for a convolution, of the convolution) is at most 1.

    Raises:
        UserError: the size does not halve evenly, or ``lipschitz`` is not a positive number.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: int = 3,
        width: int = 64,
        blocks_per_size: int = 2,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        self.gain = output_gain(lipschitz)
        bounded = lipschitz is not None
        sizes = list(channels_by_size(image_size, width=width, max_width=None).items())
        last_size, last = sizes[-1]
        num_blocks = blocks_per_size * len(sizes)
        layers: list[nn.Module] = [_scaled(nn.Conv2d(channels, sizes[0][1], 1, bias=False))]
        for (_, narrow), (_, wide) in pairwise(sizes):
            layers += [_Residual(narrow, num_blocks, bounded=bounded) for _ in range(blocks_per_size)]
            layers += [Downsample(gain=2.0 if bounded else 1.0), *_changed(narrow, wide)]
        layers += [_Residual(last, num_blocks, bounded=bounded) for _ in range(blocks_per_size)]
        # A basis over the last map, one filter for each channel, mirrors the generator's.
        layers += [_scaled(nn.Conv2d(last, last, last_size, groups=last, bias=False)), nn.Flatten()]
        self.layers = nn.Sequential(*layers)
        self.dense = _scaled(nn.Linear(last, 1, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.dense(self.layers(images)).squeeze(1)
        return logits if self.gain == 1.0 else self.gain * logits


class _Residual(nn.Module):
    """``x + f(x)``, f: 1x1 to twice the width, 3x3 in groups of 16 channels, 1x1 back, each but the last with a bias.

    The last weight begins at zero, so that the network begins without the blocks, and the others with
    ``num_blocks^(-1/4)`` of the usual deviation: with m = 3 layers in a block the exponent is -1/(2m - 2) (Zhang et al.
    2019, section 3). ``bounded``: half of that sum, and the last weight begins as the second.
    """

    def __init__(self, width: int, num_blocks: int, *, bounded: bool = False) -> None:
        super().__init__()
        inner = _EXPANSION * width
        groups = inner // math.gcd(inner, _GROUP_WIDTH)
        gain = _ACTIVATION_GAIN * num_blocks**-0.25
        self.layers = nn.Sequential(
            _scaled(nn.Conv2d(width, inner, 1), gain),
            nn.LeakyReLU(0.2),
            _scaled(nn.Conv2d(inner, inner, 3, padding=1, groups=groups), gain),
            nn.LeakyReLU(0.2),
            _scaled(nn.Conv2d(inner, width, 1, bias=False), gain if bounded else 0.0),
        )
        self.share = 0.5 if bounded else None

    def forward(self, features: Tensor) -> Tensor:
        total = features + self.layers(features)
        return total if self.share is None else self.share * total


def _changed(width: int, new_width: int) -> list[nn.Module]:
    """A 1x1 convolution where the width changes."""
    return [] if width == new_width else [_scaled(nn.Conv2d(width, new_width, 1, bias=False))]


def _scaled(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Module:
    """Weights N(0, gain^2 / fan-in), bias zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
