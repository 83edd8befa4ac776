"""Losses of the two players, as functions of the discriminator's logits. Each is the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Loss"]


@dataclass(frozen=True)
class Loss:
    """A pair of losses; each maps logits of any shape to a scalar tensor that its player minimizes."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """``(real_logits, fake_logits) -> scalar``"""
    generator: Callable[[Tensor], Tensor]
    """``(fake_logits) -> scalar``"""


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


LOSSES: dict[str, Loss] = {
    "hinge": Loss(hinge_discriminator, hinge_generator),
    "nonsaturating": Loss(nonsaturating_discriminator, nonsaturating_generator),
}
"""Losses by name."""
