"""Differentiable augmentations of what the discriminator sees (DiffAugment, Zhao et al. 2020).

Real and fake images pass through the same random transformation, and gradients flow through it to the generator, so
the generator learns the distribution of the images, not of their augmented copies. Every function takes images of
shape ``(batch, channels, height, width)`` in [-1, 1] and a generator of random numbers on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AUGMENTATIONS", "Augmentation", "compose"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its size on both axes; what comes in is background (-1)."""
    batch, _, height, width = images.shape
    reach_y, reach_x = height // 8, width // 8
    # One padded gather moves every image by its own offset without a loop. -1 is black after scaling to [-1, 1].
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), value=-1.0)
    rows = _integers(batch, 2 * reach_y + 1, generator)[:, None] + torch.arange(height, device=images.device)
    columns = _integers(batch, 2 * reach_x + 1, generator)[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(batch, device=images.device)
    return padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Set a square of half the image's size, at a random place, to mid-gray (0)."""
    batch, _, height, width = images.shape
    top = _integers(batch, height + 1, generator)[:, None] - height // 4
    left = _integers(batch, width + 1, generator)[:, None] - width // 4
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + height // 2)
    in_columns = (columns >= left) & (columns < left + width // 2)
    keep = ~(in_rows[:, :, None] & in_columns[:, None, :])
    return images * keep[:, None].to(images.dtype)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = _integers(images.shape[0], 2, generator).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def color(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, saturation and contrast of each image at random, as in the reference code of DiffAugment."""

    def uniform() -> Tensor:
        return torch.rand(images.shape[0], 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)

    images = images + (uniform() - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (2 * uniform())
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (images - middle) * (0.5 + uniform())


AUGMENTATIONS: dict[str, Augmentation] = {"shift": shift, "cutout": cutout, "flip": flip, "color": color}
"""Augmentations by name."""


def compose(names: Sequence[str]) -> Augmentation:
    """One augmentation that applies the named ones in order; none for an empty list."""
    steps = [AUGMENTATIONS[name] for name in names]

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment


def _integers(batch: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (batch,), generator=generator, device=generator.device)
