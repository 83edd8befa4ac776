"""Generators and discriminators by name. Each file reads alone; image size and width are data.

A generator maps latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]; a discriminator
maps images to logits ``(batch,)``. Neither is normalized here: `NORMALIZATIONS` is applied by the trainer. ``width=64``
gives the published number of channels everywhere.

Every discriminator but SAGAN's takes ``lipschitz=``: a number asks for the form whose parts without weights have norm
at most 1, so that dividing every weight by a guaranteed bound of its norm makes that number a Lipschitz constant of the
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from spectralnorm.gan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from spectralnorm.gan.models.mlp import ImageMLPDiscriminator, ImageMLPGenerator
from spectralnorm.gan.models.resnet import ResNetDiscriminator, ResNetGenerator
from spectralnorm.gan.models.sagan import SAGANDiscriminator, SAGANGenerator
from spectralnorm.gan.models.sncnn import SNCNNDiscriminator, SNCNNGenerator, SNDCGANDiscriminator
from spectralnorm.transform import add_spectral_norm

__all__ = ["ARCHITECTURES", "NORMALIZATIONS", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A pair of networks, each built from its sizes."""

    generator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=, latent_dim=) -> nn.Module``"""
    discriminator: Callable[..., nn.Module]
    """``(image_size=, channels=, width=, lipschitz=None) -> nn.Module``"""
    image_sizes: tuple[int, ...] = (32, 48, 64, 128)
    """The sizes that it is offered for."""


ARCHITECTURES: dict[str, Architecture] = {
    "dcgan": Architecture(DCGANGenerator, DCGANDiscriminator),
    "sncnn": Architecture(SNCNNGenerator, SNCNNDiscriminator),
    "sndcgan": Architecture(SNCNNGenerator, SNDCGANDiscriminator),
    "resnet": Architecture(ResNetGenerator, ResNetDiscriminator),
    "sagan": Architecture(SAGANGenerator, SAGANDiscriminator, image_sizes=(32, 64, 128)),
    "mlp": Architecture(ImageMLPGenerator, ImageMLPDiscriminator),
}
"""Architectures by name."""

NORMALIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral": add_spectral_norm,
    "none": lambda discriminator: discriminator,
}
"""What is done to a discriminator's weights, by name."""
