"""SAGAN (Zhang et al. 2019): residual networks with one layer of self-attention each, as in the authors' code.

At 128 px the attention stands where maps have 32x32 pixels: after the third block of the generator and the second of
the discriminator. Other sizes, which the paper does not have, keep the pattern: at most 32x32, at most half of the
image in the generator and a quarter in the discriminator (at 32 px: 16x16 and 8x8). The paper normalizes the weights of
both networks: `spectralnorm.add_spectral_norm` takes the 1x1 convolutions of the attention along.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralnorm.errors import UserError
from spectralnorm.gan.models.bounded import UnitGlobalPool, UnitPool2d
from spectralnorm.gan.models.resnet import DownBlock, GlobalSumPool, ProjectionHead, UpBlock, check_labels, glorot
from spectralnorm.layers import L2Attention

__all__ = ["LipschitzSelfAttention2d", "SAGANDiscriminator", "SAGANGenerator", "SelfAttention2d"]

_LARGEST_ATTENTION = 32
"""Pixels a side; attention at N x N takes memory for N^4 / 4 numbers an image."""


class SAGANGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].

    Args:
        image_size: a power of two, at least 32.
        channels: of the images.
        width: channels of the last feature map; 64 in the paper (1024-1024-512-256-128-64 at 128 px). At 32 px all maps
            have four times as many, as in the residual network for that size.
        latent_dim: dimensions of the latent; 128 in the paper.
        num_classes: None for a network without labels.

    Raises:
        UserError: the image size is no such power; when called, labels are missing or not expected.
    """

    def __init__(
        self,
        *,
        image_size: int = 128,
        channels: int = 3,
        width: int = 64,
        latent_dim: int = 128,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_size(image_size)
        num_blocks = _num_halvings(image_size)
        multiples = [4] * (num_blocks + 1) if image_size == 32 else [min(2**k, 16) for k in range(num_blocks, -1, -1)]
        widths = [width * k for k in multiples]
        self.num_classes = num_classes
        self.first_map = (widths[0], 4, 4)
        self.dense = glorot(nn.Linear(latent_dim, widths[0] * 16))
        self.blocks = nn.ModuleList(UpBlock(a, b, num_classes=num_classes) for a, b in pairwise(widths))
        self.attention_size = min(image_size // 2, _LARGEST_ATTENTION)
        self.attention = SelfAttention2d(widths[_num_halvings(self.attention_size)])
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = glorot(nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """``labels``: ``(batch,)``, int64, for a network with classes; else None."""
        check_labels(self, labels)
        maps = self.dense(latents).unflatten(1, self.first_map)
        for block in self.blocks:
            maps = block(maps, labels)
            if maps.shape[-1] == self.attention_size:
                maps = self.attention(maps)
        return torch.tanh(self.to_image(functional.relu(self.norm(maps))))


class SAGANDiscriminator(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``.

    The published one has no certificate, whatever its weights: dot-product attention is not Lipschitz (Kim et al. 2021,
    Theorem 3.1; its slope grows with the features, and no norm of a weight bounds that). With ``lipschitz`` it attends
    by distance (`LipschitzSelfAttention2d`), and all else is as in the residual network of that form.

    Args:
        image_size: a power of two, at least 32.
        channels: of the images.
        width: channels of the first feature map; 64 in the paper (64-128-256-512-1024-1024 at 128 px). At 32 px all
            maps have twice as many, as in the residual network for that size.
        num_classes: None for a network without labels.
        lipschitz: None for the published network; a number for the one whose Lipschitz constant is at most that if the
            norm of every weight (for a convolution, of the convolution) is at most 1.

    Raises:
        UserError: the image size is no such power, or ``lipschitz`` is not a positive number; when called, labels are
            missing or not expected.
    """

    def __init__(
        self,
        *,
        image_size: int = 128,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        _check_size(image_size)
        bounded = lipschitz is not None
        num_halvings = 2 if image_size == 32 else _num_halvings(image_size)
        multiples = [2, 2, 2, 2] if image_size == 32 else [min(2**k, 16) for k in range(num_halvings)]
        if image_size != 32:
            multiples.append(multiples[-1])
        widths = [channels, *(width * k for k in multiples)]
        self.num_classes = num_classes
        # The authors' code widens in the first convolution of a block, Miyato et al. in the second.
        blocks: list[nn.Module] = [
            DownBlock(a, b, hidden_channels=b, is_first=index == 0, downsample=index < num_halvings, bounded=bounded)
            for index, (a, b) in enumerate(pairwise(widths))
        ]
        self.attention_size = min(image_size // 4, _LARGEST_ATTENTION)
        place = _num_halvings(image_size) - _num_halvings(self.attention_size)
        blocks.insert(place, (LipschitzSelfAttention2d if bounded else SelfAttention2d)(widths[place]))
        self.blocks = nn.Sequential(*blocks)
        self.pool = UnitGlobalPool() if bounded else GlobalSumPool()
        self.head = ProjectionHead(widths[-1], num_classes=num_classes, lipschitz=lipschitz)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """``labels``: ``(batch,)``, int64, for a network with classes; else None."""
        check_labels(self, labels)
        return self.head(self.pool(functional.relu(self.blocks(images))), labels)


class SelfAttention2d(nn.Module):
    """Maps ``x`` of shape ``(batch, channels, h, w)`` to ``x + scale * attention(x)`` (Zhang et al. 2019, Eq. 3).

    Each pixel asks (``channels / 8`` features) all 2x2 neighbourhoods, which answer with ``channels / 2`` features; as
    in the authors' code, keys and values are the maxima over the neighbourhoods, and no convolution has a bias.

    Args:
        num_channels: of the maps, at least 1; height and width must be even.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        narrow, half = max(1, num_channels // 8), max(1, num_channels // 2)
        self.query = glorot(nn.Conv2d(num_channels, narrow, 1, bias=False))
        self.key = glorot(nn.Conv2d(num_channels, narrow, 1, bias=False))
        self.value = glorot(nn.Conv2d(num_channels, half, 1, bias=False))
        self.output = glorot(nn.Conv2d(half, num_channels, 1, bias=False))
        self.scale = nn.Parameter(torch.zeros(1))
        """Begins at zero, so that the network first learns from neighbouring pixels."""

    def forward(self, maps: Tensor) -> Tensor:
        queries = self.query(maps).flatten(2)
        keys = functional.max_pool2d(self.key(maps), 2).flatten(2)
        values = functional.max_pool2d(self.value(maps), 2).flatten(2)
        # Written out: torch's fused attention has no second derivative, which gradient penalties need.
        shares = torch.softmax(queries.transpose(1, 2) @ keys, dim=2)
        answers = (values @ shares.transpose(1, 2)).unflatten(2, maps.shape[2:])
        return maps + self.scale * self.output(answers)


class LipschitzSelfAttention2d(nn.Module):
    """Maps ``x`` of shape ``(batch, channels, h, w)`` to ``(x + attention(x)) / 2``, attention by distance.

    Neighbourhoods of 2x2 pixels (scaled to norm 1, and back) ask one another, with ``channels / 8`` features that are
    query, key and value in one: `spectralnorm.layers.L2Attention`, divided by its Lipschitz constant. So the layer is
    1-Lipschitz if its two convolutions are. The constant is that of the worst features there could be, 30 for 8x8
    neighbourhoods and 68 for 16x16, so what attention adds is small.

    Args:
        num_channels: of the maps, at least 1; height and width must be even.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        narrow = max(1, num_channels // 8)
        self.pool = UnitPool2d(2)
        self.query = glorot(nn.Conv2d(num_channels, narrow, 1, bias=False))
        self.attention = L2Attention(bounded=True)
        self.output = glorot(nn.Conv2d(narrow, num_channels, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        queries = self.query(self.pool(maps))
        answers = self.attention(queries.flatten(2).mT).mT.unflatten(2, queries.shape[2:])
        # The adjoint of the pool: half of each answer to each of its four pixels.
        return 0.5 * (maps + functional.interpolate(0.5 * self.output(answers), scale_factor=2, mode="nearest"))


def _check_size(image_size: int) -> None:
    if image_size < 32 or image_size & (image_size - 1):
        raise UserError(f"image_size must be a power of two, at least 32, for SAGAN, got {image_size}.")


def _num_halvings(size: int) -> int:
    """Halvings from ``size``, a power of two, to 4 pixels."""
    return size.bit_length() - 3
