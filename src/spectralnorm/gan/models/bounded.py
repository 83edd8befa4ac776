"""What discriminators with a known Lipschitz constant are made of: parts without weights whose norm is exactly one.

A network's Lipschitz constant (2-norm, per image) is at most the product of the bounds of its parts. Parts with weights
can be normalized; the others have the norm they have: averaging 2x2 pixels has norm 1/2, so two of them in a row throw
away three quarters of the slope that the bound allows, while a sum over an ``H x W`` map has norm ``sqrt(H W)``. The
parts here are the same operations times a constant that makes the norm 1, and it is attained, so nothing is wasted.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from spectralnorm.errors import UserError

__all__ = ["UnitGlobalPool", "UnitPool2d", "output_gain"]


class UnitPool2d(nn.Module):
    """Averages of ``s x s`` pixels, times ``s``: ``(batch, channels, height, width)`` to ``(..., height/s, width/s)``.

    The windows do not overlap, so the map is a row ``(1/s, ..., 1/s)`` of norm 1 for each window, and has norm 1 (the
    plain average: ``1/s``). Attained by constant images.

    Args:
        size: ``s``, pixels of a window a side.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return self.size * functional.avg_pool2d(maps, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class UnitGlobalPool(nn.Module):
    """Sums over all pixels, divided by ``sqrt(H W)``: ``(batch, channels, H, W)`` to ``(batch, channels)``.

    Norm 1, attained by constant maps (the plain sum: ``sqrt(H W)``; the plain mean: ``1 / sqrt(H W)``).
    """

    def forward(self, maps: Tensor) -> Tensor:
        return maps.sum((2, 3)) * (maps.shape[2] * maps.shape[3]) ** -0.5


def output_gain(lipschitz: float | None) -> float:
    """The constant that the output of a discriminator is multiplied by.

    Args:
        lipschitz: the Lipschitz constant asked of it, or None for the network as published, whose output is left alone.

    Raises:
        UserError: the constant is not a positive number.
    """
    if lipschitz is None:
        return 1.0
    if not 0 < lipschitz < math.inf:
        raise UserError(f"lipschitz must be a positive number, or None for the published network, got {lipschitz}.")
    return float(lipschitz)
