"""What is done to the weights or features of a network, by name: spectral normalization and its rivals.

A setting is a name, or a name with options of `spectralnorm.spectral_norm`: ``spectral:mode=cap,coefficient=2``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from spectralnorm.errors import UserError
from spectralnorm.gan.models.modulated import MODULATED
from spectralnorm.gan.spec import Spec, check_kinds, parse_spec
from spectralnorm.parametrizations import SpectralNorm
from spectralnorm.parametrizations.options import Options
from spectralnorm.transform import add_spectral_norm

__all__ = ["NORMALIZATIONS", "check_normalization", "normalize"]

# A size in pixels would be that of one layer, not of all.
_OPTIONS = tuple(name for name in Options.__annotations__ if name != "input_size")


def spectral(network: nn.Module, **options: object) -> None:
    """Divide every weight by its largest singular value (Miyato et al. 2018)."""
    add_spectral_norm(network, **options)  # pyright: ignore[reportArgumentType]


def strict(network: nn.Module, **options: object) -> None:
    """Divide every weight by a guaranteed upper bound of its layer's own norm."""
    add_spectral_norm(network, **{"strict": True, **options})  # pyright: ignore[reportArgumentType]


def weight(network: nn.Module) -> None:
    """Length and direction of each output's weights as parameters of their own (Salimans and Kingma 2016)."""
    for module in list(network.modules()):
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        outputs = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        others = [axis for axis in range(module.weight.ndim) if axis != outputs]
        is_zero = (module.weight.detach() == 0).all(dim=others, keepdim=True)  # pyright: ignore[reportCallIssue, reportArgumentType]
        weight_norm(module, dim=outputs)
        # Weights that begin at zero have a length, 0, and need a direction.
        direction: nn.Parameter = module.parametrizations.weight.original1  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        with torch.no_grad():
            direction.copy_(torch.where(is_zero, torch.randn_like(direction), direction))


def batch(network: nn.Module) -> None:
    """Batch normalization after every hidden layer but the first, as in Radford et al. 2016."""
    _insert_after_hidden_layers(network, nn.BatchNorm2d, nn.BatchNorm1d)


def layer(network: nn.Module) -> None:
    """Layer normalization (Ba et al. 2016), over all features of an image, after every hidden layer but the first."""
    _insert_after_hidden_layers(network, partial(nn.GroupNorm, 1), nn.LayerNorm)


def none(network: nn.Module) -> None:
    """Leave the network as it is."""


NORMALIZATIONS: dict[str, Callable[..., None]] = {
    "spectral": spectral,
    "strict": strict,
    "weight": weight,
    "batch": batch,
    "layer": layer,
    "none": none,
}
"""Normalizations by name; each changes a network in place. Options belong to the first two."""


def normalize(network: nn.Module, setting: str, *, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """Normalize a network in place as a setting says, and return it.

    Args:
        network: with its initial weights.
        setting: a name in `NORMALIZATIONS`, with options or without.
        input_shape: of one image, if the network will see no other: norms of convolutions that depend on its size are
            then tighter, and cost less. None: they hold for all sizes.

    Raises:
        UserError: there is no such normalization or option, or the network cannot be normalized in this way.
    """
    name, options = _parse(setting)
    if input_shape is not None and (name == "strict" or options.get("strict") or options.get("norm") == "operator"):
        NORMALIZATIONS[name](network, **options, input_shape=input_shape)
    else:
        NORMALIZATIONS[name](network, **options)
    return network


def check_normalization(which: str, setting: str) -> None:
    """See that a setting can be read, and that the library takes its options.

    Raises:
        UserError: it cannot, or does not; the message begins with ``which``, the name of the setting.
    """
    name, options = _parse(setting, which)
    if options:
        try:
            NORMALIZATIONS[name](nn.Sequential(nn.Linear(2, 2)), **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"{which} '{setting}' cannot be: {error}") from error


def _parse(setting: str, which: str = "normalization") -> Spec:
    spec = parse_spec(which, setting)
    name, options = spec
    if name not in NORMALIZATIONS:
        raise UserError(f"Unknown {which} '{name}'; choose one of {', '.join(NORMALIZATIONS)}.")
    if options and name not in ("spectral", "strict"):
        raise UserError(f"{which} '{name}' takes no options, got '{setting}'; spectral and strict do.")
    known = [option for option in _OPTIONS if option != name]  # strict is so already
    for option in options:
        if option not in known:
            raise UserError(f"{which} '{name}' has no option '{option}'; choose among {', '.join(known)}.")
    check_kinds(which, spec, inspect.signature(SpectralNorm).parameters)
    if options.get("update") == "manual":
        raise UserError(f"{which} '{setting}' would never be renewed in training; choose update=step or forward.")
    return spec


def _insert_after_hidden_layers(
    network: nn.Module, of_maps: Callable[[int], nn.Module], of_features: Callable[[int], nn.Module]
) -> None:
    layers = [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    # The first layer sees the image, whose own mean and scale tell real from fake; the last one gives the logit, or the
    # image of a generator.
    for path, layer in layers[1:-1]:
        if isinstance(layer, MODULATED):  # brings its outputs to unit norm itself, or gives the image
            continue
        num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if num_outputs == 1:  # whose layer normalization would be a constant
            continue
        normalization = (of_features if isinstance(layer, nn.Linear) else of_maps)(num_outputs)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Sequential(layer, normalization))
