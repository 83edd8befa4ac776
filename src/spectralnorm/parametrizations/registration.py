"""Putting a `SpectralNorm` on a layer's weight, through torch's parametrization mechanism, and taking it off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from spectralnorm.parametrizations import foreign, fsdp, recurrent
from spectralnorm.parametrizations.arithmetic import without_autocast
from spectralnorm.parametrizations.image_size import forget_input_size, watch_input_size
from spectralnorm.parametrizations.layer_class import share_class
from spectralnorm.parametrizations.shards import is_distributed
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.stacked import originals_of
from spectralnorm.parametrizations.state_dict import accept_other_formats

__all__ = ["normalization_of", "register", "unregister"]


def normalization_of(module: nn.Module, name: str = "weight") -> SpectralNorm | None:
    """The `SpectralNorm` on a weight; None if there is none."""
    if not parametrize.is_parametrized(module, name):
        return None
    found = (part for part in module.parametrizations[name] if isinstance(part, SpectralNorm))  # type: ignore[index]
    return next(found, None)


def register(module: nn.Module, name: str, normalization: SpectralNorm) -> None:
    """Make ``normalization`` the parametrization of a weight, in the place of torch's if that is there."""
    if foreign.hook_of(module, name) is not None:
        foreign.undo_hook(module, name)
    if foreign.parametrization_of(module, name) is None:
        fsdp.require_sharded(module, name)
        with without_autocast(getattr(module, name)):
            parametrize.register_parametrization(module, name, normalization)
        fsdp.move((module, name), (module.parametrizations[name], "original"))  # type: ignore[index]
    else:
        parts: Any = module.parametrizations[name]  # type: ignore[index]
        index = next(i for i, part in enumerate(parts) if part is foreign.parametrization_of(module, name))
        normalization.train(module.training)
        parts[index] = normalization
    watch_input_size(module, normalization)
    if normalization._kept is not None:
        normalization._kept.forget_graphs()  # torch has read the weight to see that it fits
        normalization._kept.was_used = False
        normalization.expect_initialization()
    share_class(module)
    accept_other_formats(module)


def unregister(module: nn.Module, name: str, *, bake: bool = True) -> None:
    """Take the normalization off. The parameter stays the same object, if it is one that the weight is made of.

    Args:
        module: the layer.
        name: its weight.
        bake: write the normalized weight into the parameter; else it keeps the raw one.
    """
    parts: Any = module.parametrizations[name]  # type: ignore[index]
    fsdp.require_sharded(parts, "original")
    original = originals_of(parts)[0]
    if bake and is_distributed(original):
        with torch.no_grad(), without_autocast(original):
            original.copy_(getattr(module, name))
        bake = False
    kind = type(module)
    inner = fsdp.inner_class(kind)
    if inner is not None:  # torch takes the first base for the class before parametrizations
        module.__class__ = inner
    with without_autocast(original):
        parametrize.remove_parametrizations(module, name, leave_parametrized=bake)
    if inner is not None:
        module.__class__ = kind if type(module) is inner else fsdp.wrapped_as(kind, type(module))
    fsdp.move((parts, "original"), (module, name))
    if name == "weight":
        forget_input_size(module)
    recurrent.restore_flat_weights(module)
