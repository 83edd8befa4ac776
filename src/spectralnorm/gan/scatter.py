"""Points in the plane as a picture: the real ones gray, generated ones in colour on top."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SIDE", "scatter"]

SIDE = 512
"""Pixels of the picture, height and width."""
_MARGIN = 0.15
_REAL = (0.72, 0.72, 0.72)
_FAKE = (0.84, 0.19, 0.15)


def scatter(points: Tensor | None, *, real: Tensor) -> Tensor:
    """Draw points as dots of three pixels, the denser the darker, in the frame of the real ones.

    Args:
        points: generated, ``(n, 2)``; those outside of the frame are not seen. None: the real ones alone.
        real: ``(m, 2)``.

    Returns:
        uint8 ``(3, SIDE, SIDE)``, the second coordinate upwards.
    """
    low, high = real.amin(0), real.amax(0)
    reach = float((high - low).max()) * (0.5 + _MARGIN)
    corner = (low + high) / 2 - reach
    picture = torch.ones(3, SIDE, SIDE)
    for shown, colour in ((real, _REAL), (points, _FAKE)):
        if shown is not None:
            ink = _ink((shown - corner) / (2 * reach), strength=0.5)
            picture = picture * (1 - ink) + torch.tensor(colour)[:, None, None] * ink
    return (picture * 255).round().to(torch.uint8)


def _ink(places: Tensor, *, strength: float) -> Tensor:
    """How much of each pixel is covered, ``(SIDE, SIDE)`` in [0, 1), by dots at places in the unit square."""
    pixels = (places * SIDE).floor().long()
    inside = ((pixels >= 1) & (pixels < SIDE - 1)).all(dim=1)
    columns, rows = pixels[inside].unbind(1)
    rows = SIDE - 1 - rows
    counts = torch.zeros(SIDE * SIDE)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            index = (rows + down) * SIDE + columns + right
            counts.index_add_(0, index, torch.ones(len(index)))
    return (1 - (1 - strength) ** counts).view(SIDE, SIDE)
