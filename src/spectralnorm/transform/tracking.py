"""Exact resumption of a training: the tracked vectors of a whole model."""

from __future__ import annotations

from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.parametrizations.tracking import fits_tracking, restore_tracking, tracking_of
from spectralnorm.transform.upkeep import normalized_weights, own_parameter

__all__ = ["load_tracking_state", "tracking_state"]


def tracking_state(model: nn.Module) -> dict[str, Tensor]:
    """The vectors from which each normalized weight's norm is tracked, to be saved beside ``model.state_dict()``.

    A model loaded from its state dict alone computes the same function to 1e-4; with these it goes on exactly as the
    one that was saved.

    Returns:
        Tensors by ``<layer>/<vector>``; nothing for weights that keep nothing between uses.
    """
    return {
        f"{name}/{part}": tensor
        for name, module, tensor_name, normalization in normalized_weights(model)
        if (weight := own_parameter(module, tensor_name)) is not None
        for part, tensor in tracking_of(normalization, weight).items()
    }


def load_tracking_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Go on exactly as the model that was saved; call it after ``model.load_state_dict``.

    Args:
        model: with the weights that were saved together with ``state``.
        state: what `tracking_state` returned; layers it does not name are left to find their norms anew.

    Raises:
        UserError: it is of another model. Nothing has been changed then.
    """
    of_each = []
    for name, module, tensor_name, normalization in normalized_weights(model):
        prefix = f"{name}/"
        parts = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        weight = own_parameter(module, tensor_name)
        if parts and (weight is None or not fits_tracking(normalization, weight, parts)):
            raise UserError(
                f"The tracking state has vectors of {name} for a weight of another shape, or another norm of it; make "
                "the model as it was when it was saved."
            )
        of_each.append((normalization, weight, parts))
    for normalization, weight, parts in of_each:
        if parts and weight is not None:
            restore_tracking(normalization, weight, parts)
