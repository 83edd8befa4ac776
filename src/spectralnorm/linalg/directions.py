"""Unit vectors to start from, without the global random number generator."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chirp", "seeded_direction"]


def seeded_direction(seed: str, size: int, like: Tensor) -> Tensor:
    """A unit vector that depends on ``seed`` and ``size`` alone, so that it is the same in every process."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}:{size}".encode()))
    direction = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    return F.normalize(direction, dim=0).to(device=like.device, dtype=like.dtype)


def chirp(size: int, like: Tensor) -> Tensor:
    """A unit vector with a share in every direction, made without a random generator: compiled graphs allow none."""
    steps = torch.arange(1, size + 1, dtype=like.real.dtype, device=like.device)
    return F.normalize(torch.cos(0.618034 * steps * steps), dim=0).to(like.dtype)
