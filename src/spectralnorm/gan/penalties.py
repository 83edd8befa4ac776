"""Penalties on gradients, as functions of a network and its images. Each is a scalar that can be differentiated.

A discriminator's penalty is ``penalty(discriminator, real_images, fake_images, random=...)``. Images have the shape
``(batch, channels, height, width)``; a discriminator maps them to logits ``(batch,)``, and one that mixes the images of
a batch is judged by the gradient of the sum of its logits. Gradients are taken with ``create_graph``, so every layer
must be differentiable twice; plain torch layers are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["PENALTIES", "Discriminator", "Penalty", "path_length_penalty", "path_lengths"]


class Discriminator(Protocol):
    """Images to logits."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


class Penalty(Protocol):
    """A penalty of a discriminator, as the registry holds it."""

    def __call__(
        self, discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None
    ) -> Tensor: ...


def r1(discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None) -> Tensor:
    """``1/2 E[|grad D(x)|^2]`` at real images (Mescheder et al. 2018, eq. 9); its weight is their gamma."""
    return 0.5 * _square_norms(_gradients(discriminator, real)).mean()


def r2(discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None) -> Tensor:
    """``1/2 E[|grad D(G(z))|^2]`` at generated images (Mescheder et al. 2018, eq. 10)."""
    return 0.5 * _square_norms(_gradients(discriminator, fake)).mean()


def r1_r2(discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None) -> Tensor:
    """R1 + R2, with one weight for both (Huang et al. 2024, section 2.2)."""
    return r1(discriminator, real, fake) + r2(discriminator, real, fake)


def gradient_penalty(
    discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None
) -> Tensor:
    """``E[(|grad D(y)| - 1)^2]`` at a random y between a real and a generated image (Gulrajani et al. 2017, eq. 3).

    With the Wasserstein loss it makes WGAN-GP, with the minimax or the non-saturating one GAN-GP; weight 10.

    Raises:
        UserError: there are not as many real images as generated ones.
    """
    if real.shape != fake.shape:
        raise UserError(
            "The gradient penalty joins each real image with a generated one, so both batches must have the same "
            f"shape, got {tuple(real.shape)} and {tuple(fake.shape)}; give equally many of both."
        )
    share = torch.rand(len(real), *(1,) * (real.ndim - 1), generator=random, device=real.device, dtype=real.dtype)
    return _distance_from_one(_gradients(discriminator, torch.lerp(real, fake.to(real.dtype), share)))


def dragan(
    discriminator: Discriminator, real: Tensor, fake: Tensor, *, random: torch.Generator | None = None
) -> Tensor:
    """``E[(|grad D(x + d)| - 1)^2]`` around real images, d ~ N(0, c I) (Kodali et al. 2017, eq. 3 and algorithm 1).

    The noise has half the standard deviation of the batch, the scale of their public code; that code draws uniform
    noise, the paper's is normal, as here. Weight 10.
    """
    noise = torch.randn(real.shape, generator=random, device=real.device, dtype=real.dtype)
    return _distance_from_one(_gradients(discriminator, real + 0.5 * real.std() * noise))


PENALTIES: dict[str, Penalty] = {
    "r1": r1,
    "r2": r2,
    "r1-r2": r1_r2,
    "gradient-penalty": gradient_penalty,
    "dragan": dragan,
}
"""Penalties of a discriminator by name."""


def path_lengths(images: Tensor, styles: Tensor, *, random: torch.Generator | None = None) -> Tensor:
    """How far an image moves per unit of its style, in a random direction (Karras et al. 2020, section 3.2).

    Args:
        images: (batch, channels, height, width), computed from ``styles``.
        styles: (batch, layers, style_dim), one style per layer of the generator.
        random: of the direction; None: the global generator.

    Returns:
        (batch,): ``|J' y|`` with y ~ N(0, I / pixels), its square averaged over the layers as the public code does.
    """
    noise = torch.randn(images.shape, generator=random, device=images.device, dtype=images.dtype)
    direction = noise / (images.shape[2] * images.shape[3]) ** 0.5
    (gradients,) = torch.autograd.grad((images * direction).sum(), styles, create_graph=True)
    return _root(gradients.square().sum(2).mean(1))


def path_length_penalty(lengths: Tensor, average: Tensor, *, decay: float = 0.01) -> tuple[Tensor, Tensor]:
    """``E[(|J' y| - a)^2]`` with a the running mean of the lengths (Karras et al. 2020, eq. 4); weight 2.

    Args:
        lengths: (batch,), of `path_lengths`.
        average: scalar, the running mean before this batch; 0 at the start.
        decay: share of this batch in the running mean.

    Returns:
        The penalty, and the running mean to pass with the next batch.
    """
    average = torch.lerp(average, lengths.detach().mean(), decay)
    return (lengths - average).square().mean(), average


def _gradients(discriminator: Discriminator, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_(True)
    (gradients,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradients


def _square_norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).square().sum(1)


def _distance_from_one(gradients: Tensor) -> Tensor:
    return (_root(_square_norms(gradients)) - 1).square().mean()


def _root(square: Tensor) -> Tensor:
    # At 0 the root has no derivative; a tiny number under it makes that of a vanishing gradient's norm 0 and not NaN.
    return (square + torch.finfo(square.dtype).tiny).sqrt()
