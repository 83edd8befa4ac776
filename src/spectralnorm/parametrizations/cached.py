"""Under `torch.nn.utils.parametrize.cached` all uses of a weight are one tensor, whose gradient can be asked for.

Torch's own cache hands a tensor that was computed under `no_grad` to a later use that needs its gradient, and one from
before a step of an optimizer to a use after it. What is kept of a weight tells whether it has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["one_while_cached", "one_while_kept"]


def one_while_kept(layer: nn.Module, name: str, normalization: SpectralNorm, weight: Tensor) -> Tensor:
    """What this use of ``weight`` gets: the tensor of an earlier one, if the weight has not changed since."""
    value, kept = normalization.read(weight), normalization._kept
    if kept is None or not normalization.hands_out_kept(weight):  # each use has a node that goes backward once
        return value
    entries, key = _entries(), (id(layer), name, value.requires_grad, value.dtype)
    outputs, first = entries.get(key, (None, None))
    if outputs is kept.outputs:  # which every change of the value replaces
        return first
    entries[key] = kept.outputs, value
    return value


def one_while_cached(layer: nn.Module, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, once for all uses with grad and once for those without, as torch does it."""
    entries, key = _entries(), (id(layer), name, torch.is_grad_enabled())
    of_which, value = entries.get(key, (None, None))
    if of_which is not layer:
        value = compute()
        entries[key] = layer, value
    return value


def _entries() -> dict[Any, Any]:
    # Torch empties it when it leaves the context. Its own keys are pairs.
    return parametrize._cache  # type: ignore[return-value]
