"""Named starting points: a recipe is a function that returns a `Config`; any setting can be overridden.

>>> from spectralnorm.gan.recipes import RECIPES
>>> RECIPES["sncnn-cifar10"](steps=1000).batch_size
64
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectralnorm.gan.config import Config, choose

__all__ = ["RECIPES", "make_config"]


_FASHION: dict[str, Any] = {
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


def fashion(**settings: Any) -> Config:
    """Garments in minutes on a laptop: a small DCGAN on the built-in images, tuned for two CPU cores.

    What made it better than the usual settings at equal time, most important first: small batches and a large step
    size (many more updates a second), orthogonal weights at the start, averaged weights, a short memory in Adam.
    """
    return _config("fashion", settings, _FASHION)


def fashion_strict(**settings: Any) -> Config:
    """As ``fashion``, with a guaranteed Lipschitz constant: the discriminator is K times a 1-Lipschitz network.

    Spectral normalization as published lets a convolution's own norm be up to the root of the number of patches that
    read a pixel: 2 for each of the three 4x4 convolutions of stride 2. K is the product, 8, so both discriminators are
    steep alike; here it is a proven bound.
    """
    return _config("fashion-strict", settings, {**_FASHION, "normalization": "strict", "lipschitz": 8.0})


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


_SNGAN_RESNET: dict[str, Any] = {
    "architecture": "resnet",
    "channels": 3,
    "loss": "hinge",
    "generator_lr": 2e-4,
    "discriminator_lr": 2e-4,
    "beta1": 0.0,
    "beta2": 0.9,
    "num_discriminator_steps": 5,
    "lr_decay_from": 0.0,
    "ema_half_life_kimg": 0.0,
    "log_every": 50,
    "steps": 100_000,
}


def sngan_resnet_cifar10(**settings: Any) -> Config:
    """The residual networks at 32 px with the settings of Miyato et al. 2018 for CIFAR-10.

    Hinge loss, five updates of D on 64 images for one of G on 128, step sizes that fall from the start. The 100,000
    updates of G are the paper's; the public code stops after 50,000.
    """
    return _config("sngan-resnet-cifar10", settings, {**_SNGAN_RESNET, "generator_batch_size": 128})


def sngan_projection_cifar10(**settings: Any) -> Config:
    """As ``sngan-resnet-cifar10`` with labels: projection discriminator and conditional batch normalization.

    Miyato and Koyama 2018, with the 50,000 updates of G of their public code; the data must have classes.
    """
    defaults = {**_SNGAN_RESNET, "generator_batch_size": 128, "conditional": True, "steps": 50_000}
    return _config("sngan-projection-cifar10", settings, defaults)


def sngan_resnet_stl48(**settings: Any) -> Config:
    """The residual networks at 48 px with the settings of Miyato et al. 2018 for STL-10."""
    return _config("sngan-resnet-stl48", settings, {**_SNGAN_RESNET, "image_size": 48, "generator_batch_size": 128})


def sngan_resnet_64(**settings: Any) -> Config:
    """The residual networks at 64 px with the settings of the public code of Miyato and Koyama 2018 for ImageNet.

    The papers have no experiment of this size. Step sizes fall over the last 50,000 of 250,000 updates of G. Theirs is
    conditional: add ``--conditional`` where the data have classes.
    """
    defaults = {**_SNGAN_RESNET, "image_size": 64, "lr_decay_from": 200 / 250, "steps": 250_000}
    return _config("sngan-resnet-64", settings, defaults)


def sngan_resnet_128(**settings: Any) -> Config:
    """The residual networks at 128 px with the settings of Miyato et al. 2018 for ImageNet, 450,000 updates of G.

    Batches and schedule are those of the public code: four processes with 16 images each for D and 32 for G, and step
    sizes that fall over the last 50,000 updates. Theirs is conditional: add ``--conditional`` where the data have
    classes.
    """
    defaults = {
        **_SNGAN_RESNET,
        "image_size": 128,
        "generator_batch_size": 128,
        "lr_decay_from": 400 / 450,
        "steps": 450_000,
    }
    return _config("sngan-resnet-128", settings, defaults)


def sagan_128(**settings: Any) -> Config:
    """Self-attention at 128 px with the settings of Zhang et al. 2019: spectral normalization in both networks.

    Each network takes one update in turn, D with four times the step size of G. The paper's is conditional: add
    ``--conditional`` where the data have classes.
    """
    defaults = {
        "architecture": "sagan",
        "image_size": 128,
        "channels": 3,
        "loss": "hinge",
        "generator_normalization": "spectral",
        "batch_size": 256,
        "generator_lr": 1e-4,
        "discriminator_lr": 4e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "ema_half_life_kimg": 0.0,
        "log_every": 50,
        "steps": 1_000_000,
    }
    return _config("sagan-128", settings, defaults)


def _stylegan2(image_size: int, batch_size: int, *, steps: int) -> dict[str, Any]:
    """Karras et al. 2020 (StyleGAN2-ADA, "auto"): R1 by the heuristic of the size, every 16th update; path lengths."""
    return {
        "architecture": "stylegan2",
        "image_size": image_size,
        "channels": 3,
        "latent_dim": 512,
        "normalization": "none",
        "loss": "nonsaturating",
        "penalty": "r1",
        "penalty_weight": 0.0002 * image_size**2 / batch_size,
        "penalty_interval": 16,
        "path_length_weight": 2.0,
        "augmentation": "flip",
        "batch_size": batch_size,
        "generator_lr": 0.0025,
        "discriminator_lr": 0.0025,
        "beta1": 0.0,
        "beta2": 0.99,
        "ema_half_life_kimg": batch_size * 10 / 32,
        "log_every": 50,
        "steps": steps,
    }


def stylegan2_64(**settings: Any) -> Config:
    """StyleGAN2 at 64 px with the settings of Karras et al. 2020, a quarter of their channels (--generator-width 256).

    R1 is what the paper has; ``--normalization spectral --penalty none`` puts the layer in its place.
    """
    return _config("stylegan2-64", settings, _stylegan2(64, 32, steps=200_000))


def stylegan2_256(**settings: Any) -> Config:
    """StyleGAN2 at 256 px with the settings of Karras et al. 2020 ("auto": half the channels of their largest)."""
    return _config("stylegan2-256", settings, _stylegan2(256, 16, steps=1_000_000))


def r3gan_32(**settings: Any) -> Config:
    """The modern rival without normalization (Huang et al. 2024): relativistic pairs, R1 and R2, for 32 px.

    Their schedules of the penalty, of Adam's memory and of the augmentation are left out: settings stay as they begin.
    """
    defaults = {
        "architecture": "r3gan",
        "channels": 3,
        "latent_dim": 64,
        "normalization": "none",
        "loss": "relativistic",
        "penalty": "r1-r2",
        "penalty_weight": 0.05,
        "augmentation": "flip",
        "batch_size": 512,
        "generator_lr": 2e-4,
        "discriminator_lr": 2e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "ema_half_life_kimg": 500.0,
        "log_every": 50,
        "steps": 200_000,
    }
    return _config("r3gan-32", settings, defaults)


def emoji_64(**settings: Any) -> Config:
    """A few thousand pictures in colour at 64 px, such as a set of emoji: small residual networks.

    A set this small is soon known by heart, so the discriminator sees shifted and recoloured pictures. An hour on two
    CPU cores.
    """
    defaults = {
        "architecture": "resnet",
        "image_size": 64,
        "channels": 3,
        "generator_width": 24,
        "discriminator_width": 24,
        "loss": "hinge",
        "augmentation": "shift,color",
        "batch_size": 32,
        "generator_lr": 2e-4,
        "discriminator_lr": 4e-4,
        "beta1": 0.0,
        "beta2": 0.99,
        "lr_decay_from": 0.5,
        "ema_half_life_kimg": 5.0,
        "log_every": 25,
        "minutes": 60.0,
    }
    return _config("emoji-64", settings, defaults)


def _toy(name: str, settings: dict[str, Any]) -> Config:
    defaults = {
        "architecture": "points",
        "data": name,
        "image_size": 1,
        "channels": 2,
        "generator_width": 50,
        "discriminator_width": 25,
        "latent_dim": 2,
        "lipschitz": 30.0,
        "loss": "nonsaturating",
        "batch_size": 100,
        "generator_lr": 1e-3,
        "discriminator_lr": 1e-3,
        "beta1": 0.5,
        "beta2": 0.999,
        "lr_decay_from": 0.5,
        "ema_half_life_kimg": 5.0,
        "log_every": 100,
        "num_evaluation_samples": 2500,
        "steps": 20_000,
    }
    return _config(name, settings, defaults)


def toy_ring(**settings: Any) -> Config:
    """Eight Gaussians on a circle, the usual first test of mode coverage; minutes.

    Data, sizes and batch of Lin et al. 2018 (PacGAN), with leaky ReLU in the place of maxout. Points of one mode lie
    0.01 apart, which a 1-Lipschitz discriminator hardly tells apart: its logits are multiplied by 30.
    """
    return _toy("toy-ring", settings)


def toy_grid(**settings: Any) -> Config:
    """Twenty-five Gaussians on a grid; otherwise as ``toy-ring``."""
    return _toy("toy-grid", settings)


RECIPES: dict[str, Callable[..., Config]] = {
    "fashion": fashion,
    "fashion-strict": fashion_strict,
    "sncnn-cifar10": sncnn_cifar10,
    "dcgan-64": dcgan_64,
    **{f"miyato-{letter}": _miyato(letter) for letter in _MIYATO_SETTINGS},
    "sngan-resnet-cifar10": sngan_resnet_cifar10,
    "sngan-projection-cifar10": sngan_projection_cifar10,
    "sngan-resnet-stl48": sngan_resnet_stl48,
    "sngan-resnet-64": sngan_resnet_64,
    "sngan-resnet-128": sngan_resnet_128,
    "sagan-128": sagan_128,
    "stylegan2-64": stylegan2_64,
    "stylegan2-256": stylegan2_256,
    "r3gan-32": r3gan_32,
    "emoji-64": emoji_64,
    "toy-ring": toy_ring,
    "toy-grid": toy_grid,
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
    values = {"recipe": name, **defaults, **settings}
    # As it is, a recipe is valid: the tests see to that.
    return Config(**values) if settings else Config.unchecked(**values)
