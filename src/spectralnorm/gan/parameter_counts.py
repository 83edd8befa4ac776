"""How many parameters the networks of a config have, without making them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from spectralnorm.gan.config import Config
from spectralnorm.gan.networks import build_discriminator, build_generator

__all__ = ["parameter_counts"]

_CLASSES = tuple("0123456789")
"""Where the classes will come with the data: as many as in CIFAR-10 and in the built-in images."""


def parameter_counts(config: Config) -> tuple[int, int]:
    """Parameters of the generator and of the discriminator, before normalization."""
    if config.conditional and not config.class_names:
        config = dataclasses.replace(config, class_names=_CLASSES)
    with torch.device("meta"), _NoInitialization():  # tensors without memory
        networks = [build(config, normalized=False) for build in (build_generator, build_discriminator)]
    generator, discriminator = (sum(p.numel() for p in network.parameters()) for network in networks)
    return generator, discriminator


class _NoInitialization(TorchFunctionMode):
    """Random numbers for tensors without memory would only take time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
