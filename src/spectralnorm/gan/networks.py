"""The two networks of a config, built, begun and normalized."""

from __future__ import annotations

from torch import nn

from spectralnorm.gan.config import Config
from spectralnorm.gan.initialization import INITIALIZATIONS
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.normalizations import normalize

__all__ = ["build_discriminator", "build_generator", "normalize_discriminator"]


def build_generator(config: Config, *, normalized: bool = True) -> nn.Module:
    """The generator that a config describes, with fresh weights of torch's random state.

    Args:
        config: the settings.
        normalized: whether to normalize it as ``config.generator_normalization`` says.
    """
    generator = ARCHITECTURES[config.architecture].generator(
        image_size=config.image_size,
        channels=config.channels,
        width=config.generator_width,
        latent_dim=config.latent_dim,
        **_classes(config),
    )
    INITIALIZATIONS[config.initialization](generator)
    return normalize(generator, config.generator_normalization) if normalized else generator


def build_discriminator(config: Config, *, normalized: bool = True) -> nn.Module:
    """The discriminator that a config describes, with fresh weights of torch's random state.

    Args:
        config: the settings.
        normalized: whether to normalize it as ``config.normalization`` says.
    """
    discriminator = ARCHITECTURES[config.architecture].discriminator(
        image_size=config.image_size,
        channels=config.channels,
        width=config.discriminator_width,
        lipschitz=config.lipschitz,
        **_classes(config),
    )
    INITIALIZATIONS[config.initialization](discriminator)
    return normalize_discriminator(discriminator, config) if normalized else discriminator


def normalize_discriminator(discriminator: nn.Module, config: Config, setting: str | None = None) -> nn.Module:
    """Normalize a discriminator of a config as ``config.normalization``, or another setting, says; returns it."""
    # What takes labels cannot be followed with an image alone, and gets norms for all sizes.
    shape = None if config.conditional else (config.channels, config.image_size, config.image_size)
    return normalize(discriminator, config.normalization if setting is None else setting, input_shape=shape)


def _classes(config: Config) -> dict[str, int]:
    return {"num_classes": len(config.class_names)} if config.conditional else {}
