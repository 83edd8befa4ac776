"""Writing a model's weights for those who do not have this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import foreign, normalization_of
from spectralnorm.parametrizations.lazy import pending_of_module
from spectralnorm.parametrizations.state_dict import FORMATS, HOOK, PARAMETRIZATION, Writer
from spectralnorm.transform.upkeep import weight_label

__all__ = ["export_state_dict"]


def export_state_dict(model: nn.Module, format: str) -> dict[str, Tensor]:
    """The state dict of a model as it would be without this package.

    It loads strictly into the same model unwrapped or wrapped by one of torch's two functions, which then computes the
    same function in eval mode. (A torch layer that goes on training divides by its own estimate from then on, for a
    grouped convolution that of the whole reshaped weight.) Nothing in the model is changed. As with ``state_dict()``,
    parameters that are written as they are share their memory with the model.

    Args:
        model: any module; a single layer too.
        format: ``"plain"``: the normalized weights, for the unwrapped model; ``"torch"``: for
            `torch.nn.utils.parametrizations.spectral_norm`; ``"torch-hook"``: for `torch.nn.utils.spectral_norm`.

    Returns:
        Tensors by name, with the metadata that ``load_state_dict`` looks for in ``._metadata``.

    Raises:
        UserError: the format is not one of these; a weight has a setting that it cannot express (torch knows no
            coefficient, no cap above the norm and no weight without a norm: ``"plain"`` takes them all), torch's own
            functions normalize a weight in another format, or a lazy layer has loaded its weight and not run yet.

    >>> from spectralnorm import add_spectral_norm
    >>> model = add_spectral_norm(nn.Sequential(nn.Linear(3, 2)))
    >>> sorted(export_state_dict(model, "torch-hook"))
    ['0.bias', '0.weight_orig', '0.weight_u', '0.weight_v']
    >>> _ = nn.Sequential(nn.Linear(3, 2)).load_state_dict(export_state_dict(model, "plain"))
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    _refuse_foreign(model, format)
    _refuse_waiting(model)
    writer = Writer(format)
    layers = [module for module in model.modules() if _is_ours(module)]
    handles = [layer.register_state_dict_post_hook(writer) for layer in layers]
    try:
        return model.state_dict()
    finally:
        for handle in handles:
            handle.remove()


def _names(module: nn.Module) -> list[str]:
    lists: Any = getattr(module, "parametrizations", None) or {}
    return list(lists)


def _is_ours(module: nn.Module) -> bool:
    return any(normalization_of(module, name) is not None for name in _names(module))


def _refuse_foreign(model: nn.Module, format: str) -> None:
    for path, module in model.named_modules():
        by_hook = foreign.names_under_hooks(module) if format != HOOK else []
        by_parametrization = [name for name in _names(module) if foreign.parametrization_of(module, name) is not None]
        for name in by_hook + (by_parametrization if format != PARAMETRIZATION else []):
            raise UserError(
                f"{weight_label(path, name)} is normalized by torch, so it cannot be written as {format!r}; "
                "add_spectral_norm(model) takes it over."
            )


def _refuse_waiting(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for pending in pending_of_module(module):
            if pending.has_shape(module):
                raise UserError(
                    f"{weight_label(path, pending.name)} is normalized from its first forward on; run one before the "
                    "model is written."
                )
