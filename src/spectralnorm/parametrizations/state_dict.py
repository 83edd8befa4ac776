"""Reading other formats: plain weights, and those of torch's older hook.

Our own keys are those of torch's parametrization (``parametrizations.weight.original``, ``.0._u``, ``.0._v``), so its
checkpoints load here and ours there as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["accept_other_formats", "forget_other_formats"]


def accept_other_formats(module: nn.Module) -> None:
    """Let ``module`` load state dicts of the same layer without a normalization and under torch's hook, strictly."""
    if not _our_hooks(module):
        module._register_load_state_dict_pre_hook(_translate, with_module=True)


def forget_other_formats(module: nn.Module) -> None:
    """Undo `accept_other_formats`."""
    for key in _our_hooks(module):
        del module._load_state_dict_pre_hooks[key]


def _our_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._load_state_dict_pre_hooks.items() if getattr(hook, "hook", None) is _translate]


def _translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of each normalized weight to ours, and add vectors where there are none."""
    lists: Any = getattr(module, "parametrizations", None) or {}
    for name, parts in lists.items():
        for index, part in enumerate(parts):
            if isinstance(part, SpectralNorm):
                own = f"{prefix}parametrizations.{name}."
                _translate_weight(state_dict, prefix + name, own, f"{own}{index}.", part)


def _translate_weight(
    state_dict: dict[str, Any], plain: str, own: str, vectors: str, normalization: SpectralNorm
) -> None:
    original = own + "original"
    if original in state_dict:
        return
    if f"{plain}_orig" in state_dict:
        state_dict[original] = state_dict.pop(f"{plain}_orig")
        state_dict.pop(plain, None)  # the oldest version of the hook saved the normalized weight beside it
        for side in ("u", "v"):
            if f"{plain}_{side}" in state_dict:
                state_dict[f"{vectors}_{side}"] = state_dict.pop(f"{plain}_{side}")
    elif plain in state_dict:
        state_dict[original] = state_dict.pop(plain)
    else:
        return
    weight = state_dict[original]
    missing = [side for side in normalization._buffers if vectors + side not in state_dict]
    if missing and isinstance(weight, Tensor) and not weight.is_meta and not is_lazy(weight):
        with torch.no_grad():
            cold = [vector for pair in normalization.cold_vectors(weight) for vector in pair]
        for side, vector in zip(normalization._buffers, cold, strict=True):
            if side in missing:
                state_dict[vectors + side] = vector
