"""Reading and writing other formats: plain weights, and those of torch's two functions.

Our own keys are those of torch's parametrization (``parametrizations.weight.original``, ``.0._u``, ``.0._v``), so its
checkpoints load here and ours there as they are. What such a layer makes of ours can still be another weight: it knows
no coefficient and no cap. So writing compares, weight by weight, and refuses what would not be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from spectralnorm.errors import UserError
from spectralnorm.linalg import compute_dtype
from spectralnorm.parametrizations.arithmetic import without_autocast
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.stacked import in_eval_mode, input_of

__all__ = ["FORMATS", "Writer", "accept_other_formats", "forget_other_formats"]

PARAMETRIZATION, HOOK, PLAIN = FORMATS = ("torch", "torch-hook", "plain")

# What torch would divide by, and what we do, may differ by the rounding of a sum over the weight; a setting that torch
# cannot express differs by more.
_SAME_SCALE_RTOL = 1e-4


# Reading


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


def _normalizations(module: nn.Module) -> Iterator[tuple[str, int, SpectralNorm]]:
    """Each normalized weight of one layer: its name, the place among its parametrizations, the normalization."""
    lists: Any = getattr(module, "parametrizations", None) or {}
    for name, parts in lists.items():
        for index, part in enumerate(parts):
            if isinstance(part, SpectralNorm):
                yield name, index, part


def _translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of each normalized weight to ours, and add what the other format does not have.

    Those are vectors, where there are none of the weight's norm, and the learned scale: it starts at the coefficient.
    """
    for name, index, part in _normalizations(module):
        own = f"{prefix}parametrizations.{name}."
        _translate_weight(state_dict, prefix + name, own, f"{own}{index}.", part)


def _translate_weight(
    state_dict: dict[str, Any], plain: str, own: str, vectors: str, normalization: SpectralNorm
) -> None:
    original = own + "original"
    is_ours = original in state_dict
    if is_ours:
        pass
    elif f"{plain}_orig" in state_dict:
        state_dict[original] = state_dict.pop(f"{plain}_orig")
        state_dict.pop(plain, None)  # the oldest version of the hook saved the normalized weight beside it
        for side in ("u", "v"):
            if f"{plain}_{side}" in state_dict:
                state_dict[f"{vectors}_{side}"] = state_dict.pop(f"{plain}_{side}")
    elif plain in state_dict:
        state_dict[original] = state_dict.pop(plain)
    else:
        return
    if normalization.scale is not None and f"{vectors}scale" not in state_dict:
        device = state_dict[original].device
        state_dict[f"{vectors}scale"] = torch.full_like(normalization.scale, normalization._coefficient, device=device)
    if "_u" not in normalization._buffers:
        return
    given = {side: state_dict[vectors + side] for side in normalization._buffers if vectors + side in state_dict}
    if is_ours and ("_u" not in given or "_v" not in given):
        return  # keys of our own that are missing are reported by torch
    # Vectors of all blocks together are of torch's norm.
    if len(given) == len(normalization._buffers) and normalization.view.is_of_one_block(given["_u"], given["_v"]):
        return
    for side, vector in _vectors_of(state_dict[original], normalization).items():
        state_dict[vectors + side] = vector


def _vectors_of(weight: Tensor, normalization: SpectralNorm) -> dict[str, Tensor]:
    """Whole vectors u and v of a weight that has just been read, by buffer; those there are if it has no norm."""
    there: dict[str, Any] = dict(normalization._buffers)
    sizes = (len(there["_u"]), len(there["_v"]))
    if weight.is_meta or is_lazy(weight) or weight.numel() == 0 or normalization.view.whole_shape(weight) != sizes:
        return there
    vectors = [vector for pair in normalization.refined_vectors(weight) for vector in pair]
    return dict(zip(there, vectors, strict=True))


# Writing


class Writer:
    """Rewrites the state dict of each layer while it is collected: a post hook for `nn.Module.state_dict`.

    One writer serves a whole model, so that a weight which several layers share stays one tensor.

    Args:
        format: one of `FORMATS`.
    """

    def __init__(self, format: str) -> None:
        self._format = format
        self._baked: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        """Replace the keys of this layer's normalized weights.

        Raises:
            UserError: the weight has no values, or a layer under torch's normalization would make another one of it.
        """
        for name, index, normalization in _normalizations(module):
            parts: Any = module.parametrizations[name]  # type: ignore[index]
            label, own = prefix + name, f"{prefix}parametrizations.{name}."
            if any(tensor.is_meta for tensor in parts.parameters()):
                raise UserError(f"{label} has no values yet, it is on the meta device; load or initialize it first.")
            with torch.no_grad(), without_autocast(next(parts.parameters())), in_eval_mode(parts):
                if self._format == PLAIN:
                    baked = self._baked_weight(parts, normalization)
                    _drop(state_dict, own)
                    _drop(state_dict._metadata, own)
                    state_dict[label] = baked
                    continue
                u, v = self._torchs_vectors(label, parts, index)
            if self._format == PARAMETRIZATION:
                _drop(state_dict, f"{own}{index}.")
                if "_u" in normalization._buffers:  # not with a 1-D weight, for which torch has none either
                    state_dict[f"{own}{index}._u"], state_dict[f"{own}{index}._v"] = u, v
            else:
                raw = state_dict[own + "original"]
                _drop(state_dict, own)
                _drop(state_dict._metadata, own)
                state_dict.update({f"{label}_orig": raw, f"{label}_u": u, f"{label}_v": v})
                # Without its version the hook would take the file for one of its oldest.
                local_metadata.setdefault("spectral_norm", {})[f"{name}.version"] = TorchHook._version

    def _baked_weight(self, parts: Any, normalization: SpectralNorm) -> Tensor:
        key = (id(normalization), *map(id, parts.parameters()))
        if key not in self._baked:
            self._baked[key] = parts().clone()  # what is kept must not be written to through the file's tensors
        return self._baked[key]

    def _torchs_vectors(self, label: str, parts: Any, index: int) -> tuple[Tensor, Tensor]:
        """u and v with which torch's layer, in eval mode, makes the same weight out of the raw one."""
        if self._format == HOOK and len(parts) > 1:
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UserError(f"{label} is parametrized by {kinds}, of which torch's hook knows one; write {PLAIN!r}.")
        normalization = parts[index]
        weight = input_of(parts, normalization)
        u, v = normalization.vectors(weight)
        wide = compute_dtype(weight.dtype)
        raw, value = weight.to(wide), normalization(weight).to(wide)
        matrix = normalization.view.whole_matrix(raw) if raw.ndim > 1 else raw.unsqueeze(1)
        image = torch.mv(matrix, v.to(wide))
        # The hook does not conjugate.
        sigma = torch.dot(u.to(wide), image) if self._format == HOOK else torch.vdot(u.to(wide), image)
        # How many times raw / sigma ours is; NaN for a weight without a norm, which torch divides by it all the same.
        scale = sigma * torch.vdot(raw.flatten(), value.flatten()) / torch.vdot(raw.flatten(), raw.flatten())
        if not abs(scale.item() - 1) < _SAME_SCALE_RTOL:
            found = f"{scale.abs().item():.4g} times" if scale.isfinite() else "not"
            raise UserError(
                f"{label} is {found} what torch's layer would compute from the same raw weight "
                f"({normalization.extra_repr()}), and the format {self._format!r} cannot say so; write {PLAIN!r}."
            )
        like = normalization._buffers.get("_u")
        dtype = weight.dtype if like is None else like.dtype
        return u.to(dtype), v.to(dtype)


def _drop(entries: dict[str, Any], prefix: str) -> None:
    """Take out everything at and below ``prefix``, which ends with a dot."""
    for key in [key for key in entries if f"{key}.".startswith(prefix)]:
        del entries[key]
