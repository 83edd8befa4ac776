"""Dense networks for points, rows of a table, and as the plainest architecture for small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.gan.models.bounded import output_gain

__all__ = [
    "ImageMLPDiscriminator",
    "ImageMLPGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "PointDiscriminator",
    "PointGenerator",
]

_SLOPE = 0.2
"""Of the discriminator's leaky ReLU for negative numbers."""


class MLPGenerator(nn.Module):
    """Latents ``(batch, latent_dim)`` to samples ``(batch, *shape)``.

    Args:
        shape: of a sample: ``(2,)`` for points in the plane.
        width: features of each hidden layer.
        num_hidden: hidden layers, at least 1, each with ReLU.
        latent_dim: dimensions of the latent.
        bounded: end in tanh, so that samples lie in [-1, 1].

    Raises:
        UserError: there is no hidden layer.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int] = (2,),
        width: int = 128,
        num_hidden: int = 2,
        latent_dim: int = 2,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.layers = _dense_layers([latent_dim, *[width] * num_hidden, math.prod(self.shape)], slope=0.0)
        self.bounded = bounded

    def forward(self, latents: Tensor) -> Tensor:
        samples = self.layers(latents).unflatten(1, self.shape)
        return torch.tanh(samples) if self.bounded else samples


class MLPDiscriminator(nn.Module):
    """Samples ``(batch, *shape)`` to logits ``(batch,)``.

    Beside the weights there is only leaky ReLU, of slope at most 1: the network certifies as it is, with the product of
    the norms of its matrices.

    Args:
        shape: of a sample: ``(2,)`` for points in the plane.
        width: features of each hidden layer.
        num_hidden: hidden layers, at least 1, each with leaky ReLU 0.2.
        lipschitz: a number that the logits are multiplied by: the Lipschitz constant if the norm of every matrix is at
            most 1. None: 1.

    Raises:
        UserError: there is no hidden layer, or ``lipschitz`` is not a positive number.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int] = (2,),
        width: int = 128,
        num_hidden: int = 2,
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        self.gain = output_gain(lipschitz)
        self.layers = _dense_layers([math.prod(shape), *[width] * num_hidden, 1], slope=_SLOPE)

    def forward(self, samples: Tensor) -> Tensor:
        logits = self.layers(samples.flatten(1)).squeeze(1)
        return logits if self.gain == 1.0 else self.gain * logits


class ImageMLPGenerator(MLPGenerator):
    """Latents ``(batch, latent_dim)`` to images ``(batch, channels, size, size)`` in [-1, 1]; two hidden layers.

    Args:
        image_size: any.
        channels: of the images.
        width: an eighth of the features of each hidden layer.
        latent_dim: dimensions of the latent.
    """

    def __init__(self, *, image_size: int = 32, channels: int = 1, width: int = 64, latent_dim: int = 100) -> None:
        shape = (channels, image_size, image_size)
        super().__init__(shape=shape, width=8 * width, latent_dim=latent_dim, bounded=True)


class ImageMLPDiscriminator(MLPDiscriminator):
    """Images ``(batch, channels, size, size)`` to logits ``(batch,)``; two hidden layers.

    Args:
        image_size: any.
        channels: of the images.
        width: an eighth of the features of each hidden layer.
        lipschitz: see `MLPDiscriminator`.

    Raises:
        UserError: ``lipschitz`` is not a positive number.
    """

    def __init__(
        self, *, image_size: int = 32, channels: int = 1, width: int = 64, lipschitz: float | None = None
    ) -> None:
        super().__init__(shape=(channels, image_size, image_size), width=8 * width, lipschitz=lipschitz)


class PointGenerator(MLPGenerator):
    """Latents ``(batch, latent_dim)`` to points as images of one pixel, ``(batch, 2, 1, 1)``; two hidden layers.

    Args:
        image_size: 1.
        channels: 2.
        width: an eighth of the features of each hidden layer.
        latent_dim: dimensions of the latent.
    """

    def __init__(self, *, image_size: int = 1, channels: int = 2, width: int = 16, latent_dim: int = 2) -> None:
        super().__init__(shape=(channels, image_size, image_size), width=8 * width, latent_dim=latent_dim)


class PointDiscriminator(ImageMLPDiscriminator):
    """Points ``(batch, 2, 1, 1)`` to logits ``(batch,)``; as `ImageMLPDiscriminator`."""


def _dense_layers(features: Sequence[int], *, slope: float) -> nn.Sequential:
    """Dense layers with (leaky) ReLU between them."""
    if len(features) < 3:
        raise UserError(f"num_hidden must be at least 1, got {len(features) - 2}.")
    layers: list[nn.Module] = []
    for index in range(len(features) - 1):
        is_last = index == len(features) - 2
        layer = nn.Linear(features[index], features[index + 1])
        # He et al. 2015: features keep their size. Biases stay as torch draws them, uniform up to 1 / sqrt(fan_in):
        # were they zero, all the kinks of the first layer would meet in one point, which matters in the plane.
        nn.init.kaiming_normal_(layer.weight, a=1.0 if is_last else slope, nonlinearity="leaky_relu")
        layers += [layer] if is_last else [layer, nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
