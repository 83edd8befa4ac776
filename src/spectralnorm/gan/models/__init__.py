"""Generators and discriminators by name. Each file reads alone; image size and width are data.

A generator maps latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]; a discriminator
maps images to logits ``(batch,)``; those of conditional architectures take labels ``(batch,)`` as a second argument if
they were built with ``num_classes``. Neither is normalized here (`spectralnorm.gan.normalizations`). ``width=64`` gives
the published number of channels, but for ``stylegan2``, where ``16384 / image_size`` does, and ``r3gan``, which doubles
them where its public code does not. A part that makes a logit depend on the other images of the batch has the attribute
``mixes_images = True``.

Every discriminator takes ``lipschitz=``: a number asks for the form whose parts without weights have norm at most 1, so
that dividing every weight by a guaranteed bound of its norm makes that number a Lipschitz constant of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectralnorm.gan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from spectralnorm.gan.models.mlp import ImageMLPDiscriminator, ImageMLPGenerator, PointDiscriminator, PointGenerator
from spectralnorm.gan.models.r3gan import R3GANDiscriminator, R3GANGenerator
from spectralnorm.gan.models.resnet import ResNetDiscriminator, ResNetGenerator
from spectralnorm.gan.models.sagan import SAGANDiscriminator, SAGANGenerator
from spectralnorm.gan.models.sncnn import SNCNNDiscriminator, SNCNNGenerator, SNDCGANDiscriminator
from spectralnorm.gan.models.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A pair of networks, each built from its sizes."""

    generator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=, latent_dim=) -> nn.Module``"""
    discriminator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=, lipschitz=None) -> nn.Module``"""
    image_sizes: tuple[int, ...] = (32, 48, 64, 128)
    """The sizes that it is offered for."""
    conditional: bool = False
    """Whether both networks take ``num_classes=``, and then labels."""
    channels: tuple[int, ...] = (1, 3)
    """Of the images that it is offered for."""
    makes_points: bool = False
    """Whether its images are points: of one pixel, and of any real numbers instead of [-1, 1]."""


_MOST_CHANNELS = 512
"""Of StyleGAN2's public code, whatever the width."""


def _stylegan2_generator(*, width: int, **sizes: Any) -> nn.Module:
    return StyleGAN2Generator(width=width, max_width=min(8 * width, _MOST_CHANNELS), **sizes)


def _stylegan2_discriminator(*, width: int, lipschitz: float | None = None, **sizes: int) -> nn.Module:
    # Minibatch standard deviation makes a logit depend on all images of the batch: no function of one image.
    groups = {} if lipschitz is None else {"stddev_group": 0}
    max_width = min(8 * width, _MOST_CHANNELS)
    return StyleGAN2Discriminator(width=width, max_width=max_width, lipschitz=lipschitz, **groups, **sizes)


ARCHITECTURES: dict[str, Architecture] = {
    "dcgan": Architecture(DCGANGenerator, DCGANDiscriminator),
    "sncnn": Architecture(SNCNNGenerator, SNCNNDiscriminator),
    "sndcgan": Architecture(SNCNNGenerator, SNDCGANDiscriminator),
    "resnet": Architecture(ResNetGenerator, ResNetDiscriminator, conditional=True),
    "sagan": Architecture(SAGANGenerator, SAGANDiscriminator, image_sizes=(32, 64, 128), conditional=True),
    "mlp": Architecture(ImageMLPGenerator, ImageMLPDiscriminator),
    "stylegan2": Architecture(_stylegan2_generator, _stylegan2_discriminator, image_sizes=(32, 64, 128, 256)),
    "r3gan": Architecture(R3GANGenerator, R3GANDiscriminator, image_sizes=(32, 64, 128)),
    "points": Architecture(PointGenerator, PointDiscriminator, image_sizes=(1,), channels=(2,), makes_points=True),
}
"""Architectures by name."""
