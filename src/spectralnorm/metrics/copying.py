"""Whether generated images are copies of training images, judged by how near new real images come to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["Copying", "copying"]


class Copying(NamedTuple):
    """Distances to the nearest training image, of generated against held-out real images."""

    share: float
    """Of the generated images, those nearer to a training image than the given quantile of held-out ones. Without
    copying it is about that quantile, and 1 when all are copies."""
    probability: float
    """That a generated image is nearer to its nearest training image than a held-out one is to its own, ties
    counting half: about 0.5 without copying (Meehan et al. 2020, before standardizing)."""
    median_ratio: float
    """Median distance of the generated images over that of the held-out ones: 0 when half are exact copies."""


def copying(fake_distances: Tensor, held_out_distances: Tensor, *, quantile: float = 0.05) -> Copying:
    """Compare distances to the nearest training image.

    A single distance says little: it depends on the features and on how dense the training set is. Held-out images
    come from where training images come from and are copies of none, so their distances tell what is usual.

    Args:
        fake_distances: (n,), of each generated image to the nearest training image.
        held_out_distances: (m,), of each held-out image; m >= 2.
        quantile: of the held-out distances, below which a generated image counts as nearer than usual.

    Raises:
        UserError: a set is empty, or the quantile is not between 0 and 1.
    """
    if fake_distances.ndim != 1 or held_out_distances.ndim != 1 or not len(fake_distances):
        raise UserError(
            "Distances must be two vectors that are not empty, "
            f"got {tuple(fake_distances.shape)} and {tuple(held_out_distances.shape)}."
        )
    if len(held_out_distances) < 2:
        raise UserError(f"Copying needs at least two held-out images to compare with, got {len(held_out_distances)}.")
    if not 0 < quantile < 1:
        raise UserError(f"quantile must be between 0 and 1, got {quantile}.")
    fake, held_out = fake_distances.double(), held_out_distances.double().sort().values
    # The smallest held-out distance that so many do not exceed; not interpolated, so that ties stay ties.
    limit = held_out[max(0, min(len(held_out) - 1, int(quantile * len(held_out))))]
    farther = len(held_out) - torch.searchsorted(held_out, fake, right=True)
    as_far = torch.searchsorted(held_out, fake, right=True) - torch.searchsorted(held_out, fake)
    probability = float((farther + 0.5 * as_far).mean()) / len(held_out)
    usual = float(held_out.median())
    return Copying(
        share=float((fake < limit).double().mean()),
        probability=probability,
        median_ratio=float(fake.median()) / usual if usual > 0 else float("nan"),
    )
