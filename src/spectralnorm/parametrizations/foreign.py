"""Layers normalized by torch's own two functions: recognizing them, and turning them into ours in place.

P is `torch.nn.utils.parametrizations.spectral_norm`, O the older hook `torch.nn.utils.spectral_norm`. Classes that
others have derived from theirs compute something else, a capped weight for example, and are not recognized.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from spectralnorm.parametrizations.options import Options

__all__ = [
    "derived_hooks",
    "foreign_dim",
    "foreign_options",
    "hook_of",
    "names_under_hooks",
    "parametrization_of",
    "undo_hook",
]


def parametrization_of(module: nn.Module, name: str) -> TorchParametrization | None:
    """Torch's parametrization on the weight, if it is there."""
    if not parametrize.is_parametrized(module, name):
        return None
    found = (part for part in module.parametrizations[name] if type(part) is TorchParametrization)  # type: ignore
    return next(found, None)


def names_under_hooks(module: nn.Module) -> list[str]:
    """Names of the weights that torch's hook normalizes."""
    return [hook.name for hook in _hooks(module) if type(hook) is TorchHook]


def derived_hooks(module: nn.Module) -> dict[str, TorchHook]:
    """Hooks of classes derived from torch's, by the name of the weight that each computes."""
    return {hook.name: hook for hook in _hooks(module) if type(hook) is not TorchHook}


def hook_of(module: nn.Module, name: str) -> TorchHook | None:
    """Torch's hook on the weight, if it is there."""
    return next((hook for hook in _hooks(module) if type(hook) is TorchHook and hook.name == name), None)


def _hooks(module: nn.Module) -> list[TorchHook]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, TorchHook)]


def foreign_dim(module: nn.Module, name: str) -> int | None:
    """The output dimension that torch's normalization was given or chose; None if there is none."""
    found = parametrization_of(module, name) or hook_of(module, name)
    return None if found is None else found.dim


def foreign_options(module: nn.Module, name: str) -> Options[float]:
    """The options that torch's normalization was given; none if there is none."""
    found = parametrization_of(module, name) or hook_of(module, name)
    return {} if found is None else {"n_power_iterations": found.n_power_iterations, "eps": found.eps}


def undo_hook(module: nn.Module, name: str) -> None:
    """Take torch's hook off; the raw weight is again the parameter ``name``, the same object."""
    raw = module._parameters[f"{name}_orig"]
    for attribute in (name, f"{name}_u", f"{name}_v", f"{name}_orig"):
        delattr(module, attribute)
    module.register_parameter(name, raw)
    for hooks, kind in (
        (module._forward_pre_hooks, TorchHook),
        (module._state_dict_hooks, SpectralNormStateDictHook),
        (module._load_state_dict_pre_hooks, SpectralNormLoadStateDictPreHook),
    ):
        for key, hook in list(hooks.items()):
            inner: Any = getattr(hook, "hook", hook)  # some versions of torch wrap it
            if isinstance(inner, kind) and getattr(getattr(inner, "fn", inner), "name", None) == name:
                del hooks[key]
