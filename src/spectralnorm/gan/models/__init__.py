"""Generators and discriminators by name. Each file reads alone; image size and width are data.

A generator maps latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]; a discriminator
maps images to logits ``(batch,)``. Neither is normalized here: `NORMALIZATIONS` is applied by the trainer. A part that
makes a logit depend on the other images of the batch has the attribute ``mixes_images = True``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from spectralnorm.gan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from spectralnorm.gan.models.r3gan import R3GANDiscriminator, R3GANGenerator
from spectralnorm.gan.models.sncnn import SNCNNDiscriminator, SNCNNGenerator, SNDCGANDiscriminator
from spectralnorm.gan.models.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from spectralnorm.transform import add_spectral_norm

__all__ = ["ARCHITECTURES", "NORMALIZATIONS", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A pair of networks, each built from its sizes."""

    generator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=, latent_dim=) -> nn.Module``"""
    discriminator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=) -> nn.Module``"""


ARCHITECTURES: dict[str, Architecture] = {
    "dcgan": Architecture(DCGANGenerator, DCGANDiscriminator),
    "sncnn": Architecture(SNCNNGenerator, SNCNNDiscriminator),
    "sndcgan": Architecture(SNCNNGenerator, SNDCGANDiscriminator),
    "stylegan2": Architecture(StyleGAN2Generator, StyleGAN2Discriminator),
    "stylegan2-lipschitz": Architecture(
        StyleGAN2Generator, partial(StyleGAN2Discriminator, lipschitz=1.0, stddev_group=0)
    ),
    "r3gan": Architecture(R3GANGenerator, R3GANDiscriminator),
}
"""Architectures by name."""

NORMALIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral": add_spectral_norm,
    "none": lambda discriminator: discriminator,
}
"""What is done to a discriminator's weights, by name."""
