"""The residual networks of Miyato et al. 2018 (Tables 4 to 6), conditional as in Miyato and Koyama 2018.

Generator: dense to a small map, residual blocks that double its size, batch normalization, 3x3 to the image; with
classes, batch normalization in the blocks has a scale and a shift for each. Discriminator: residual blocks that halve
the map, a sum over its pixels, a dense logit; with classes, the projection ``<embedding of y, features>`` is added.

Steps are taken in the cheapest order that changes nothing in exact arithmetic: the 1x1 shortcut comes before nearest
upsampling and after average pooling, and a 3x3 convolution is one with the change of resolution beside it
(`spectralnorm.gan.models.resampled`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralnorm.errors import UserError
from spectralnorm.gan.models.bounded import UnitGlobalPool, UnitPool2d, output_gain
from spectralnorm.gan.models.resampled import DoubledConv2d, HalvedConv2d

__all__ = [
    "ClassBatchNorm2d",
    "DownBlock",
    "GlobalSumPool",
    "ProjectionHead",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "UpBlock",
    "check_labels",
    "glorot",
]


L = TypeVar("L", nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class _Plan:
    """The networks for one image size; channels are in units of the width."""

    start: int
    """Pixels of the generator's first map, height and width."""
    up: tuple[int, ...]
    """Channels of the first map, then of each up-block."""
    down: tuple[int, ...]
    """Channels of each block of the discriminator."""
    num_halvings: int
    """So many of the discriminator's blocks, from the first, halve the map."""


_PLANS = {
    32: _Plan(start=4, up=(4, 4, 4, 4), down=(2, 2, 2, 2), num_halvings=2),
    48: _Plan(start=6, up=(8, 4, 2, 1), down=(1, 2, 4, 8, 16), num_halvings=4),
    64: _Plan(start=4, up=(16, 8, 4, 2, 1), down=(1, 2, 4, 8, 16), num_halvings=5),
    128: _Plan(start=4, up=(16, 16, 8, 4, 2, 1), down=(1, 2, 4, 8, 16, 16), num_halvings=5),
}


class ResNetGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1].

    Args:
        image_size: 32, 48, 64 or 128.
        channels: of the images.
        width: 64 gives the published channels, which are 256 everywhere at 32 px, and at the other sizes halve down to
            64 in the last feature map.
        latent_dim: dimensions of the latent; 128 in the paper.
        num_classes: None for a network without labels.

    Raises:
        UserError: there is no such network for the image size; when called, labels are missing or not expected.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        width: int = 64,
        latent_dim: int = 128,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        plan = _plan(image_size)
        widths = [width * k for k in plan.up]
        self.num_classes = num_classes
        self.first_map = (widths[0], plan.start, plan.start)
        self.dense = glorot(nn.Linear(latent_dim, widths[0] * plan.start**2))
        self.blocks = nn.ModuleList(UpBlock(a, b, num_classes=num_classes) for a, b in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = glorot(nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """``labels``: ``(batch,)``, int64, for a network with classes; else None."""
        check_labels(self, labels)
        maps = self.dense(latents).unflatten(1, self.first_map)
        for block in self.blocks:
            maps = block(maps, labels)
        return torch.tanh(self.to_image(functional.relu(self.norm(maps))))


class ResNetDiscriminator(nn.Module):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``.

    Every part is Lipschitz, so both forms certify; they differ in what is left once every weight is divided by its
    norm. As published, a block adds its two branches (norm up to 2, halved again where it averages 2x2 pixels), and the
    sum over the last ``H x W`` map has norm ``sqrt(H W)``: together 32 at 32 px, 6 at 48, 2 at 64, 8 at 128; the
    projection doubles that. With ``lipschitz`` the branches are averaged, the pools scaled to norm 1
    (`spectralnorm.gan.models.bounded`), the dense logit and the projection averaged: the constant is ``lipschitz``.

    Args:
        image_size: 32, 48, 64 or 128.
        channels: of the images.
        width: 64 gives the published channels, which are 128 everywhere at 32 px, and at the other sizes double from 64
            up to 1024.
        num_classes: None for a network without labels.
        lipschitz: None for the published network; a number for the one whose Lipschitz constant is at most that if the
            norm of every weight (for a convolution, of the convolution) is at most 1.

    Raises:
        UserError: there is no such network for the image size, or ``lipschitz`` is not a positive number; when called,
            labels are missing or not expected.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        plan = _plan(image_size)
        widths = [channels, *(width * k for k in plan.down)]
        self.num_classes = num_classes
        bounded = lipschitz is not None
        self.blocks = nn.Sequential(
            *(
                DownBlock(a, b, is_first=index == 0, downsample=index < plan.num_halvings, bounded=bounded)
                for index, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.pool = UnitGlobalPool() if bounded else GlobalSumPool()
        self.head = ProjectionHead(widths[-1], num_classes=num_classes, lipschitz=lipschitz)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """``labels``: ``(batch,)``, int64, for a network with classes; else None."""
        check_labels(self, labels)
        return self.head(self.pool(functional.relu(self.blocks(images))), labels)


class UpBlock(nn.Module):
    """Maps ``(batch, in_channels, h, w)`` to ``(batch, out_channels, 2h, 2w)``.

    Norm, ReLU, doubling, 3x3, norm, ReLU, 3x3; plus the doubled map through a 1x1 convolution.

    Args:
        in_channels: of the map that comes in.
        out_channels: of the one that goes out, and of the one between.
        num_classes: for batch normalization by class; None: plain.
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_classes: int | None = None) -> None:
        super().__init__()
        self.norm1 = _batch_norm(in_channels, num_classes)
        self.conv1 = _residual_init(DoubledConv2d(in_channels, out_channels))
        self.norm2 = _batch_norm(out_channels, num_classes)
        self.conv2 = _residual_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = glorot(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, maps: Tensor, labels: Tensor | None = None) -> Tensor:
        residual = self.conv1(functional.relu(_normalize(self.norm1, maps, labels)))
        residual = self.conv2(functional.relu(_normalize(self.norm2, residual, labels)))
        return functional.interpolate(self.shortcut(maps), scale_factor=2, mode="nearest") + residual


class DownBlock(nn.Module):
    """Maps ``(batch, in_channels, h, w)`` to ``(batch, out_channels, h, w)``, or half of h and w.

    ReLU, 3x3, ReLU, 3x3, plus a shortcut; both are averaged over 2x2 pixels where the block halves the map.

    Args:
        in_channels: of the map that comes in.
        out_channels: of the one that goes out. The shortcut is a 1x1 convolution where channels or size change.
        hidden_channels: of the map between; None: ``out_channels`` in the first block, ``in_channels`` in the others.
        is_first: without the ReLU before the first convolution, which would cut the image's negative values off.
        downsample: whether the block halves the map.
        bounded: average the two branches and scale the pools to norm 1, so that the block has norm at most 1 if its
            convolutions have. Otherwise the branches are added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int | None = None,
        is_first: bool = False,
        downsample: bool = True,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        if hidden_channels is None:
            hidden_channels = out_channels if is_first else in_channels
        self.before = nn.Identity() if is_first else nn.ReLU()
        self.conv1 = _residual_init(nn.Conv2d(in_channels, hidden_channels, 3, padding=1))
        # A bounded block keeps the two steps: its convolution has the norm that it is normalized to, to the last bit.
        self.is_fused = downsample and not bounded
        self.conv2 = _residual_init(
            HalvedConv2d(hidden_channels, out_channels)
            if self.is_fused
            else nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        )
        needs_weights = downsample or in_channels != out_channels
        self.shortcut = glorot(nn.Conv2d(in_channels, out_channels, 1)) if needs_weights else nn.Identity()
        pool = UnitPool2d(2) if bounded else nn.AvgPool2d(2)
        self.pool = pool if downsample else nn.Identity()
        self.share = 0.5 if bounded else None

    def forward(self, maps: Tensor) -> Tensor:
        residual = self.conv2(functional.relu(self.conv1(self.before(maps))))
        if not self.is_fused:
            residual = self.pool(residual)
        total = self.shortcut(self.pool(maps)) + residual
        return total if self.share is None else self.share * total


class GlobalSumPool(nn.Module):
    """Sums over all pixels: ``(batch, channels, H, W)`` to ``(batch, channels)``, norm ``sqrt(H W)``."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.sum((2, 3))


class ProjectionHead(nn.Module):
    """Features ``(batch, num_features)`` to logits ``(batch,)``; with classes as in Miyato and Koyama 2018, Eq. 3.

    Args:
        num_features: of the features.
        num_classes: None: a dense logit alone.
        lipschitz: None: dense logit plus projection. A number: their mean, times that number, which is a bound of the
            norm if the weights of both have norm at most 1 (a row of a matrix is no longer than its norm).
    """

    def __init__(self, num_features: int, *, num_classes: int | None = None, lipschitz: float | None = None) -> None:
        super().__init__()
        self.dense = glorot(nn.Linear(num_features, 1))
        self.embedding = None if num_classes is None else glorot(nn.Embedding(num_classes, num_features))
        is_mean = num_classes is not None and lipschitz is not None
        self.gain = output_gain(lipschitz) * (0.5 if is_mean else 1.0)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.dense(features).squeeze(1)
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * features).sum(1)
        return logits if self.gain == 1.0 else self.gain * logits


class ClassBatchNorm2d(nn.Module):
    """Batch normalization with a scale and a shift for each class (de Vries et al. 2017).

    They are plain parameters and no embedding, so that `spectralnorm.add_spectral_norm` leaves them alone: they set the
    size of the features, and divided by their norm they would let it fade.

    Args:
        num_channels: of the maps.
        num_classes: of the labels.
    """

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(num_channels, affine=False)
        self.scales = nn.Parameter(torch.ones(num_classes, num_channels))
        self.shifts = nn.Parameter(torch.zeros(num_classes, num_channels))

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        scales, shifts = self.scales[labels], self.shifts[labels]
        return self.normalize(maps) * scales[:, :, None, None] + shifts[:, :, None, None]


def check_labels(network: nn.Module, labels: Tensor | None) -> None:
    """See that a network with classes gets labels, and one without gets none.

    Raises:
        UserError: it is the other way round.
    """
    name, num_classes = type(network).__name__, network.num_classes
    if num_classes is not None and labels is None:
        raise UserError(f"{name} was built with num_classes={num_classes}; call it with labels of shape (batch,).")
    if num_classes is None and labels is not None:
        raise UserError(f"{name} got labels but was built without classes; build it with num_classes=.")


def glorot(layer: L, *, gain: float = 1.0) -> L:
    """Begin a layer as the public code does: Glorot-uniform weights times ``gain``, biases zero. Returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if not isinstance(layer, nn.Embedding) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _residual_init(layer: nn.Conv2d) -> nn.Conv2d:
    return glorot(layer, gain=2**0.5)


def _batch_norm(num_channels: int, num_classes: int | None) -> nn.Module:
    return nn.BatchNorm2d(num_channels) if num_classes is None else ClassBatchNorm2d(num_channels, num_classes)


def _normalize(norm: nn.Module, maps: Tensor, labels: Tensor | None) -> Tensor:
    return norm(maps) if labels is None else norm(maps, labels)


def _plan(image_size: int) -> _Plan:
    if image_size not in _PLANS:
        sizes = ", ".join(map(str, _PLANS))
        raise UserError(f"image_size must be one of {sizes} for the residual networks, got {image_size}.")
    return _PLANS[image_size]
