"""Fidelity and diversity apart: precision and recall, density and coverage, from nearest neighbours among features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.pairwise import ball_counts, check_pair, smallest_distances

__all__ = ["DensityCoverage", "PrecisionRecall", "density_coverage", "neighbour_radii", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """Shares of one set that lie in the manifold of the other."""

    precision: float
    """Of the generated images, those in the real manifold: 1 when all look real."""
    recall: float
    """Of the real images, those in the generated manifold: 1 when nothing real is left out."""


class DensityCoverage(NamedTuple):
    """The same two questions, less sensitive to single images far from all others."""

    density: float
    """Real neighbourhoods a generated image lies in, over k: about 1 when both sets agree; it can be more."""
    coverage: float
    """Real images with a generated one in their neighbourhood."""


def neighbour_radii(features: Tensor, *, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Distance of each row to its k-th nearest other row: float64 (n,), on the CPU.

    Args:
        features: (n, d), n > k.
        k: which neighbour; the row itself does not count.
        device: where to compute.

    Raises:
        UserError: there are not that many others.
    """
    if features.ndim != 2 or not 1 <= k < len(features):
        raise UserError(f"k must be from 1 to one less than the number of images, got {k} for {tuple(features.shape)}.")
    return smallest_distances(features, features, k=k + 1, device=device)[:, k]


def precision_recall(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = 3,
    real_radii: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The manifold of a set is the union of balls, one around each image, that reach to its k-th nearest neighbour in the
    set. Both numbers depend on k and on the numbers of images; compare at equal ones.

    Args:
        real: (n, d), n > k.
        fake: (m, d), m > k.
        k: neighbours.
        real_radii: (n,), what :func:`neighbour_radii` says of the real ones, if it is known.
        device: where to compute.

    Raises:
        UserError: the sets do not fit together, or are too small.
    """
    check_pair(real, fake, least=k + 1)
    radii = neighbour_radii(real, k=k, device=device) if real_radii is None else real_radii
    in_real, _ = ball_counts(fake, real, radii, device=device)
    in_fake, _ = ball_counts(real, fake, neighbour_radii(fake, k=k, device=device), device=device)
    return PrecisionRecall(_share(in_real > 0), _share(in_fake > 0))


def density_coverage(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = 5,
    real_radii: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4), from the neighbourhoods of real images alone.

    Args:
        real: (n, d), n > k.
        fake: (m, d), m >= 1.
        k: neighbours.
        real_radii: (n,), what :func:`neighbour_radii` says of the real ones, if it is known.
        device: where to compute.

    Raises:
        UserError: the sets do not fit together, or there are too few real images.
    """
    check_pair(real, fake, least=1)
    radii = neighbour_radii(real, k=k, device=device) if real_radii is None else real_radii
    of_fake, of_real = ball_counts(fake, real, radii, device=device)
    return DensityCoverage(float(of_fake.double().mean()) / k, _share(of_real > 0))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
