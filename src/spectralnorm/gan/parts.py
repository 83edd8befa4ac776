"""Tensors that several processes hold in parts (DTensors), made whole and taken apart; others pass as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["part_like", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of one that is held in parts, every process must ask for it."""
    held: Any = tensor
    # The class is not asked for: importing it takes long, and who has none of its tensors need not.
    return held.full_tensor() if hasattr(held, "full_tensor") else tensor


def part_like(held: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as another one is held: in parts, or in its order in memory.

    Args:
        held: the other one.
        value: whole, on any device, the same on every process; one of another shape, or a single number, stays as it
            is: an optimizer counts its steps on the CPU, wherever the weight is.
    """
    if value.shape != held.shape or value.dim() == 0:
        return value
    if hasattr(held, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(held, DTensor)
        return distribute_tensor(value.to(held.device), held.device_mesh, held.placements)
    return torch.empty_like(held).copy_(value)
