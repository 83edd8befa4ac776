"""What `certify` and `mlp_bound` are given, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spectralnorm.errors import UserError

__all__ = ["check_count", "check_input_shape", "check_model"]


def check_model(model: object, *, function: str) -> None:
    """A module whose weights have values to compute with.

    Args:
        model: what was given.
        function: its name, for the message.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"{function} takes a torch.nn.Module, got {type(model).__name__}.")
    if torch.empty(0).is_meta:
        raise UserError(f"{function} computes with values; call it outside of torch.device('meta').")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"{function} needs all weights, and {name!r} gets its shape from the first input; run the model once."
            )
        if tensor.is_meta:
            raise UserError(
                f"{function} needs the values of all weights, and {name!r} is on the meta device; load them."
            )
        if tensor.is_floating_point() and tensor.element_size() == 1:
            raise UserError(
                f"{function} takes no numbers of 8 bits, and {name!r} is {tensor.dtype}; convert a copy of the model "
                "with .float(), which keeps every value."
            )


def check_input_shape(shape: object) -> None:
    """Sizes of one sample.

    Raises:
        UserError: they are none.
    """
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f"input_shape must be the sizes of one sample, such as (3, 32, 32), got {shape!r}.")


def check_count(name: str, count: object, *, least: int) -> None:
    """A whole number.

    Args:
        name: of the argument.
        count: what was given.
        least: that it may be.

    Raises:
        UserError: it is none, or less.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise UserError(f"{name} must be a whole number from {least} up, got {count!r}.")
