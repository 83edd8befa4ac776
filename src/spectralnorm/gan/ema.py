"""The moving average of the generator's weights, from which samples are drawn."""

from __future__ import annotations

import copy

import torch
from torch import nn

from spectralnorm.gan.parts import whole

__all__ = ["GeneratorAverage"]


class GeneratorAverage:
    """Exponential moving average of a generator, buffers included, in eval mode and without gradients.

    The half-life is counted in images, not steps, so it means the same at every batch size, and it grows from the
    start of the run (a twentieth of the images seen so far, as in Karras et al. 2020), so the first, random weights are
    forgotten at once.

    Args:
        generator: the network being trained.
        half_life_images: images after which a weight's share has halved; 0 copies the generator.
    """

    def __init__(self, generator: nn.Module, *, half_life_images: float) -> None:
        self.module = copy.deepcopy(generator).eval().requires_grad_(False)
        self.half_life_images = half_life_images
        self.follow(generator)

    def follow(self, generator: nn.Module) -> None:
        """Average another generator from now on, or the same one whose parameters several processes now hold in parts.

        The average itself is whole on every process.
        """
        self._pairs = list(zip(_tensors(self.module), _tensors(generator), strict=True))

    @torch.no_grad()
    def update(self, *, batch_size: int, images_seen: int) -> None:
        """Move towards the generator as it is now.

        Args:
            batch_size: images since the last update.
            images_seen: images since the start of the run.
        """
        half_life = min(self.half_life_images, images_seen / 20)
        weight = 1 - 0.5 ** (batch_size / half_life) if half_life > 0 else 1.0
        floating = [(a, c) for a, c in self._pairs if a.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [a for a, _ in floating], [whole(c) for _, c in floating], weight
        )
        for average, current in self._pairs:
            if not average.is_floating_point():
                average.copy_(current)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
