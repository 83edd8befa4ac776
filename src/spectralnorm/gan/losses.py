"""Losses of the two players, as functions of the discriminator's logits. Each is the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["LOSSES", "Loss"]


@dataclass(frozen=True)
class Loss:
    """A pair of losses; each maps logits of any shape to a scalar tensor that its player minimizes."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """``(real_logits, fake_logits) -> scalar``"""
    generator: Callable[[Tensor], Tensor]
    """``(fake_logits) -> scalar``"""
    paired_generator: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(real_logits, fake_logits) -> scalar``, for losses whose generator is judged beside real images; the trainer
    then uses it in the place of ``generator``, which takes real logits of 0."""


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]`` (Miyato et al. 2018, eq. 16)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """``-E[D(G(z))]`` (Miyato et al. 2018, eq. 17)."""
    return -fake_logits.mean()


def nonsaturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))]`` (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_generator(fake_logits: Tensor) -> Tensor:
    """``-E[log sigmoid(D(G(z)))]`` (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def minimax_generator(fake_logits: Tensor) -> Tensor:
    """``E[log(1 - sigmoid(D(G(z))))]`` (Goodfellow et al. 2014, eq. 1); its gradient fades where D is sure."""
    return -F.softplus(fake_logits).mean()


def wasserstein_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``-E[D(x)] + E[D(G(z))]`` (Arjovsky et al. 2017, eq. 2): a distance only for a 1-Lipschitz discriminator."""
    return fake_logits.mean() - real_logits.mean()


def least_squares_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``1/2 E[(D(x) - 1)^2] + 1/2 E[D(G(z))^2]`` (Mao et al. 2017, eq. 9)."""
    return 0.5 * (real_logits - 1).square().mean() + 0.5 * fake_logits.square().mean()


def least_squares_generator(fake_logits: Tensor) -> Tensor:
    """``1/2 E[(D(G(z)) - 1)^2]`` (Mao et al. 2017, eq. 9)."""
    return 0.5 * (fake_logits - 1).square().mean()


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``-E[log sigmoid(D(x) - D(G(z)))]`` over pairs (Jolicoeur-Martineau 2019, eq. 4; Huang et al. 2024, eq. 2).

    Raises:
        UserError: the two batches do not pair up.
    """
    _refuse_unpaired(real_logits, fake_logits)
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``-E[log sigmoid(D(G(z)) - D(x))]`` over pairs (Jolicoeur-Martineau 2019, eq. 5).

    Raises:
        UserError: the two batches do not pair up.
    """
    _refuse_unpaired(real_logits, fake_logits)
    return F.softplus(real_logits - fake_logits).mean()


def _refuse_unpaired(real_logits: Tensor, fake_logits: Tensor) -> None:
    if real_logits.shape != fake_logits.shape:
        raise UserError(
            "The relativistic loss pairs each generated image with a real one, so both batches must have the same "
            f"shape, got {tuple(real_logits.shape)} and {tuple(fake_logits.shape)}; give equally many of both."
        )


LOSSES: dict[str, Loss] = {
    "hinge": Loss(hinge_discriminator, hinge_generator),
    "nonsaturating": Loss(nonsaturating_discriminator, nonsaturating_generator),
    "minimax": Loss(nonsaturating_discriminator, minimax_generator),
    "wasserstein": Loss(wasserstein_discriminator, hinge_generator),
    "least-squares": Loss(least_squares_discriminator, least_squares_generator),
    "relativistic": Loss(relativistic_discriminator, nonsaturating_generator, relativistic_generator),
}
"""Losses by name."""
