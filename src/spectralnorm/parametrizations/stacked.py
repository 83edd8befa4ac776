"""Weights that several parametrizations make: what a normalization gets that is not the first on its weight.

Alone on a weight, or below others, it gets the parameter itself. Above others it gets what they make of their
parameters, of which there may be several, and of other shapes: `torch.nn.utils.parametrizations.weight_norm` has two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["in_eval_mode", "input_of", "originals_of", "parameter_of"]


def originals_of(parts: nn.Module) -> list[Tensor]:
    """The tensors that the first of a weight's parametrizations gets, which are those that are trained."""
    lists: Any = parts
    if lists.is_tensor:
        return [lists.original]
    return [getattr(lists, f"original{number}") for number in range(lists.ntensors)]


def parameter_of(parts: nn.Module, part: nn.Module) -> Tensor | None:
    """The parameter that ``part`` gets; None if it gets what others make of theirs."""
    lists: Any = parts
    return lists.original if lists.is_tensor and lists[0] is part else None


def input_of(parts: nn.Module, part: nn.Module | None) -> Tensor:
    """What ``part`` gets, the value of those below it; of None what the layer computes with. Nothing advances.

    Args:
        parts: all parametrizations of a weight.
        part: one of them.
    """
    lists: Any = parts
    values = originals_of(parts)
    below = list(lists) if part is None else list(lists)[: next(i for i, each in enumerate(lists) if each is part)]
    for each in below:
        with in_eval_mode(each):
            value = each(*values)
        values = [value]
    return values[0]


@contextmanager
def in_eval_mode(parts: nn.Module) -> Iterator[None]:
    """Nothing advances."""
    modes = [(part, part.training) for part in parts.modules()]
    parts.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
