"""What a kept value rests on, as tensors: saved with a checkpoint, it makes a resumed training exact.

The buffers u and v are enough to go on from: the norm is found again from the weight to 1e-4. But a run that was killed
and resumed then differs from one that was not, by that much at first and by everything later. With the tracked vectors
it is the same run to the last bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["restore_tracking", "tracking_of"]

_TENSORS = ("sigma", "u", "v", "frame", "probe")


def tracking_of(normalization: SpectralNorm, weight: Tensor) -> dict[str, Tensor]:
    """What is tracked of one weight, by name; empty where nothing is kept."""
    kept = _kept(normalization, weight)
    if kept is None:
        return {}
    return {name: getattr(kept, name) for name in _TENSORS} | {"age": torch.tensor(kept.age)}


def restore_tracking(normalization: SpectralNorm, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Go on from what `tracking_of` returned, for the same weight as then.

    Args:
        normalization: of the weight.
        weight: the raw weight, already loaded.
        state: as saved; on any device.
    """
    kept = _kept(normalization, weight)
    if kept is None:
        return
    tensors = {name: state[name].to(weight.device, copy=True) for name in _TENSORS}
    with torch.no_grad():
        value = normalization._scaled(weight.detach(), tensors["sigma"])
    normalization._kept = replace(
        kept, value=value, value_version=value._version, age=int(state["age"]), is_in_buffers=False, **tensors
    )


def _kept(normalization: SpectralNorm, weight: Tensor) -> Kept | None:
    if normalization._is_vector or not normalization._can_keep(weight):
        return None
    return normalization._current(weight)
