"""Lazy layers: a normalization that waits until the layer's first forward has given its weight a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from spectralnorm.parametrizations.image_size import look_at_input
from spectralnorm.parametrizations.options import Options, check_dim, check_options
from spectralnorm.parametrizations.registration import register
from spectralnorm.parametrizations.snapshot import unchanged_on_failure
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["PendingNorm", "can_wait", "pending_of", "pending_of_module", "with_shape"]


class PendingNorm:
    """A normalization to come, as a hook of its layer.

    Torch's own hook, registered at the layer's construction and so called before this one, gives the parameters of a
    lazy layer their shapes at the first forward. The same forward already uses the normalized weight.

    Layers that share a weight share this object too, and then the normalization.

    Attributes:
        name: the weight's name in the layer.
        dim: its output dimension, as for `SpectralNorm`.
        options: the others of `SpectralNorm`'s arguments.
    """

    def __init__(self, name: str, dim: int | None, options: Options[float]) -> None:
        self.name = name
        self.dim = dim
        self.options: Options[float] = {**options}
        check_dim(dim)
        self._loaded: dict[str, Tensor] = {}
        self._normalization: SpectralNorm | None = None

    def check_change(self, module: nn.Module, **changes: Unpack[Options[float]]) -> None:
        """Raise what the first forward of ``module`` would with these options changed, as far as is known by now.

        Raises:
            UserError: the options cannot be changed to these.
            IndexError: ``dim`` will not be a dimension of the weight.
        """
        if self._normalization is not None:
            return self._normalization.check_change(**changes)
        merged: Options[float] = {**self.options, **changes}
        check_options(**merged)
        layer = with_shape(module, self.name)
        if layer is not None:
            SpectralNorm(layer, self.name, dim=self.dim, **merged)

    def set_options(self, **changes: Unpack[Options[float]]) -> None:
        """Change options, which `check_change` has let pass; those that are not given stay."""
        self.options = {**self.options, **changes}
        if self._normalization is not None:
            self._normalization.set_options(**changes)

    def wait(self, module: nn.Module) -> None:
        """Normalize the weight of ``module`` as soon as it has a shape.

        Raises:
            UserError, IndexError: as `check_change`.
        """
        self.check_change(module)
        module.register_forward_pre_hook(self, with_kwargs=True)
        if not _load_hooks(module):
            module._register_load_state_dict_pre_hook(_load, with_module=True)

    def cancel(self, module: nn.Module) -> None:
        """Undo `wait`."""
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if not pending_of_module(module):
            for key in _load_hooks(module):
                del module._load_state_dict_pre_hooks[key]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Normalize the weight now, before it is used for the first time."""
        if self.has_shape(module):  # else the first forward failed, and torch has told why
            self.normalize(module)
            look_at_input(module, args, kwargs)

    def has_shape(self, module: nn.Module) -> bool:
        """Whether the weight of ``module`` has its shape by now: of a forward, or of a state dict that was loaded."""
        parameter: Any = module._parameters[self.name]
        return not is_lazy(parameter)

    def normalize(self, module: nn.Module) -> None:
        """Put the normalization on ``module``, whose weight has its shape.

        Raises:
            UserError, IndexError: as `check_change`. It goes on waiting then.
        """
        if self._normalization is None:  # until this succeeds, every forward fails
            normalization = SpectralNorm(module, self.name, dim=self.dim, **self.options)
            normalization.load_state_dict(self._loaded, strict=False)
            self._normalization = normalization
        with unchanged_on_failure(module):
            self.cancel(module)
            register(module, self.name, self._normalization)

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Let the layer load the state of one that is normalized already; what belongs to the norm is put by."""
        own = f"{prefix}parametrizations.{self.name}."
        vectors = own + "0."
        weight = state_dict.pop(own + "original", None)
        if weight is None:  # plain; or of torch's older hook, whose vectors are found anew
            weight = state_dict.pop(f"{prefix}{self.name}_orig", None)
            for side in ("_u", "_v"):
                state_dict.pop(f"{prefix}{self.name}{side}", None)
        for key in [key for key in state_dict if key.startswith(vectors)]:
            self._loaded[key.removeprefix(vectors)] = state_dict.pop(key)
        if weight is None:
            return
        parameter: Any = module._parameters[self.name]
        if is_lazy(parameter):
            parameter.materialize(weight.shape)
        state_dict[prefix + self.name] = weight


def can_wait(module: nn.Module, name: str) -> bool:
    """Whether a parameter has no shape yet and will get it before the layer's first forward begins."""
    parameter = module._parameters.get(name)
    return parameter is not None and is_lazy(parameter) and isinstance(module, LazyModuleMixin)


def pending_of(module: nn.Module, name: str = "weight") -> PendingNorm | None:
    """The normalization that waits for a weight; None if there is none."""
    return next((pending for pending in pending_of_module(module) if pending.name == name), None)


def pending_of_module(module: nn.Module) -> list[PendingNorm]:
    """The normalizations that wait for weights of one layer."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, PendingNorm)]


def with_shape(module: nn.Module, name: str) -> nn.Module | None:
    """The layer as one channel for each group would make it, without values; None where only a forward can tell."""
    layer: Any = module
    if name != "weight":
        return None
    if isinstance(module, nn.Linear):
        shape = (layer.out_features, 1)
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        shape = (layer.groups, layer.out_channels // layer.groups, *layer.kernel_size)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = (layer.out_channels, 1, *layer.kernel_size)
    else:
        return None
    weight = torch.empty(shape, dtype=layer.weight.dtype, device="meta")
    shaped = type(module).__new__(type(module))
    vars(shaped).update({**vars(module), "_parameters": {name: nn.Parameter(weight)}})
    return shaped


def _load_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._load_state_dict_pre_hooks.items() if getattr(hook, "hook", None) is _load]


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for pending in pending_of_module(module):
        pending.load(module, state_dict, prefix)
