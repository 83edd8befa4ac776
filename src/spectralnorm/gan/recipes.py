"""Named starting points: a recipe is a function that returns a `Config`; any setting can be overridden.

>>> from spectralnorm.gan.recipes import RECIPES
>>> RECIPES["sncnn-cifar10"](steps=1000).batch_size
64
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectralnorm.gan.config import Config, choose
from spectralnorm.gan.models import ARCHITECTURES

__all__ = ["RECIPES", "make_config"]


def fashion(**settings: Any) -> Config:
    """Garments in minutes on a laptop: a small DCGAN on the built-in images, tuned for two CPU cores.

    What made it better than the usual settings at equal time, most important first: small batches and a large step
    size (many more updates a second), orthogonal weights at the start, averaged weights, a short memory in Adam.
    """
    defaults = {
        "architecture": "dcgan",
        "generator_width": 24,
        "discriminator_width": 24,
        "latent_dim": 100,
        "initialization": "orthogonal",
        "loss": "nonsaturating",
        "batch_size": 16,
        "generator_lr": 2e-3,
        "discriminator_lr": 2e-3,
        "beta1": 0.5,
        "beta2": 0.99,
        "lr_decay_from": 0.5,
        "ema_half_life_kimg": 5.0,
        "log_every": 25,
        "minutes": 2.0,
    }
    return _config("fashion", settings, defaults)


def sncnn_cifar10(**settings: Any) -> Config:
    """The standard CNN at 32 px with the settings of Miyato et al. 2018 for CIFAR-10 (setting C of their Table 1)."""
    return _sncnn("sncnn-cifar10", _MIYATO_SETTINGS["c"], settings)


_MIYATO_SETTINGS = {
    "a": (1e-4, 0.5, 0.9, 5),
    "b": (1e-4, 0.5, 0.999, 1),
    "c": (2e-4, 0.5, 0.999, 1),
    "d": (1e-3, 0.5, 0.9, 5),
    "e": (1e-3, 0.5, 0.999, 5),
    "f": (1e-3, 0.9, 0.999, 5),
}
"""Adam's step size, beta1, beta2 and the discriminator's updates per generator update (Miyato et al. 2018, Table 1)."""


def _miyato(letter: str) -> Callable[..., Config]:
    def recipe(**settings: Any) -> Config:
        return _sncnn(f"miyato-{letter}", _MIYATO_SETTINGS[letter], settings)

    recipe.__doc__ = f"The standard CNN at 32 px with setting {letter.upper()} of Miyato et al. 2018, Table 1."
    return recipe


def _sncnn(name: str, adam: tuple[float, float, float, int], settings: dict[str, Any]) -> Config:
    step_size, beta1, beta2, num_discriminator_steps = adam
    defaults = {
        "architecture": "sncnn",
        "channels": 3,
        "loss": "nonsaturating",
        "generator_lr": step_size,
        "discriminator_lr": step_size,
        "beta1": beta1,
        "beta2": beta2,
        "num_discriminator_steps": num_discriminator_steps,
        "ema_half_life_kimg": 0.0,
        "steps": 100_000,
    }
    return _config(name, settings, defaults)


def dcgan_64(**settings: Any) -> Config:
    """DCGAN at 64 px in colour, settings of Radford et al. 2016, spectral in place of batch normalization in D."""
    defaults = {
        "architecture": "dcgan",
        "image_size": 64,
        "channels": 3,
        "latent_dim": 100,
        "loss": "nonsaturating",
        "batch_size": 128,
        "generator_lr": 2e-4,
        "discriminator_lr": 2e-4,
        "beta1": 0.5,
        "beta2": 0.999,
        "ema_half_life_kimg": 10.0,
        "log_every": 50,
        "steps": 50_000,
    }
    return _config("dcgan-64", settings, defaults)


def _sngan_resnet(image_size: int) -> Callable[..., Config]:
    name = f"sngan-resnet-{image_size}"

    def recipe(**settings: Any) -> Config:
        defaults = {
            "architecture": "resnet",
            "image_size": image_size,
            "channels": 3,
            "loss": "hinge",
            "generator_lr": 2e-4,
            "discriminator_lr": 2e-4,
            "beta1": 0.0,
            "beta2": 0.9,
            "num_discriminator_steps": 5,
            "lr_decay_from": 0.0,
            "ema_half_life_kimg": 0.0,
            "steps": 100_000,
        }
        return _config(name, settings, defaults)

    recipe.__doc__ = (
        f"The residual networks at {image_size} px with the settings of Miyato et al. 2018: hinge loss, five updates "
        "of D for one of G, step sizes that fall from the start. For CIFAR-10 the paper updates G on 128 images; here "
        "both networks see 64."
    )
    return recipe


RECIPES: dict[str, Callable[..., Config]] = {
    "fashion": fashion,
    "sncnn-cifar10": sncnn_cifar10,
    "dcgan-64": dcgan_64,
    **{f"miyato-{letter}": _miyato(letter) for letter in _MIYATO_SETTINGS},
    **{f"sngan-resnet-{size}": _sngan_resnet(size) for size in ARCHITECTURES["resnet"].image_sizes},
}
"""Recipes by name."""


def make_config(recipe: str = "fashion", **settings: Any) -> Config:
    """The config of a recipe, with some of its settings replaced.

    Args:
        recipe: a name in `RECIPES`.
        settings: any field of `Config`. Giving one of ``steps`` and ``minutes`` replaces the recipe's budget.

    Raises:
        UserError: the recipe is unknown, or a setting is out of its range.
    """
    choose("recipe", recipe, RECIPES)
    return RECIPES[recipe](**settings)


def _config(name: str, settings: dict[str, Any], defaults: dict[str, Any]) -> Config:
    if {"steps", "minutes"} & settings.keys():
        defaults = {key: value for key, value in defaults.items() if key not in ("steps", "minutes")}
    return Config(**{"recipe": name, **defaults, **settings})
