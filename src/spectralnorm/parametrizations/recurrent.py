"""RNN, LSTM and GRU: handing the normalized weights of every layer and direction to one fused kernel.

Torch's recurrent layers do not read their weights from their attributes. They keep a list of them, ``_flat_weights``,
and compare it with the attributes at every forward. For a weight that is computed this would store tensors of the last
graph in the layer (it cannot be copied or pickled then), compute each of them several times per forward, and on CUDA
move the biases to new memory each time. Here the list holds the weights during a forward and nothing between. So one
forward of a layer runs at a time, and who copies the layer waits for its end.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralnorm.parametrizations.fsdp import class_before_parametrizations
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.threads import lock_of

__all__ = ["METHODS", "alone", "forget_flat_weights", "is_left_by_compiler", "restore_flat_weights"]


class _Gone:
    """What a dead reference once referred to."""


def forget_flat_weights(module: Any) -> None:
    """Empty the list of weights, in a way that makes torch's own forward fill it again."""
    gone = weakref.ref(_Gone())
    module._flat_weights = [None] * len(module._flat_weights_names)
    module._flat_weight_refs = [gone] * len(module._flat_weights_names)


def restore_flat_weights(module: nn.Module) -> None:
    """Fill the list of a layer that has no normalized weight any more, as torch does; of other layers nothing."""
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._init_flat_weights()


def alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs while no other one of these runs on the same layer in another thread."""

    @wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a lock cannot be traced
            return method(self, *args, **kwargs)
        with lock_of(self):
            return method(self, *args, **kwargs)

    return waiting


@alone
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return class_before_parametrizations(self).forward(self, *args, **kwargs)
    finally:
        forget_flat_weights(self)


def is_left_by_compiler() -> bool:
    """Whether torch.compile leaves recurrent layers to run as they are; an export allows them in its graph."""
    # Asked in this way, because torch's own decorator imports the compiler, for seconds, when it is first called.
    return "torch._dynamo" in sys.modules and not torch._dynamo.config.allow_rnn


def _update_flat_weights(self: Any) -> None:
    """Torch's forward begins with this."""
    # Torch would compile what the layers that it leaves call, once for each weight.
    fill = _fill_uncompiled if is_left_by_compiler() else _fill_flat_weights
    fill(self)


def _fill_flat_weights(self: Any) -> None:
    if any(_advances_by_reading(part) for parts in self.parametrizations.values() for part in parts):
        # Torch's rule of one power iteration per reading is there to reproduce torch, which reads like this.
        self._weights_have_changed()
        weights = [getattr(self, name) if hasattr(self, name) else None for name in self._flat_weights_names]
    else:
        weights = [getattr(self, name, None) for name in self._flat_weights_names]
    if any(isinstance(weight, Tensor) and weight.is_cuda for weight in weights):
        # cuDNN wants them in one piece of memory. Torch puts them there by moving the tensors in the list, so these are
        # copies: parameters stay where their optimizer, or whoever shards them, knows them to be, and kept values too.
        weights = [weight.clone() if isinstance(weight, Tensor) else weight for weight in weights]
    self._flat_weights = weights
    self.flatten_parameters()


_fill_uncompiled = torch._disable_dynamo(_fill_flat_weights)  # type: ignore[attr-defined]


def _advances_by_reading(part: nn.Module) -> bool:
    return isinstance(part, SpectralNorm) and part.update == "forward"


def _init_flat_weights(self: Any) -> None:
    """Torch calls it after a move or a cast."""
    forget_flat_weights(self)


@alone
def _getstate(self: Any) -> dict[str, Any]:
    """What can be pickled: not the weak references."""
    state = self.__dict__.copy()
    del state["_flat_weight_refs"]
    return state


METHODS = {
    "forward": _forward,
    "_update_flat_weights": _update_flat_weights,
    "_init_flat_weights": _init_flat_weights,
    "__getstate__": _getstate,
}
