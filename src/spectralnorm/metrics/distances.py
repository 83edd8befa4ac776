"""Distances between two sets of features, computed by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.metrics.pairwise import check_pair

__all__ = ["frechet_distance", "kernel_distance"]

MAX_SUBSET_SIZE = 500
"""Images in one subset of the kernel distance.

The estimate is unbiased at any size, and a hundred subsets of 500 draw each of 5,000 images ten times: larger ones
take longer without making the mean more certain. Their standard deviation does fall with the size.
"""


def frechet_distance(real_features: Tensor, fake_features: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

    ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))``, in float64.

    It is biased upwards, about in proportion to 1/n for n images: compare numbers of equal n only. With fewer images
    than features the covariances are singular; the distance is still well defined and finite, but most of it is bias.

    Args:
        real_features: (n, d), n >= 2.
        fake_features: (m, d), m >= 2.

    Raises:
        UserError: the sets do not fit together, or have fewer than two members.
    """
    # torchmetrics takes two seconds to import.
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_pair(real_features, fake_features)
    # A common shift changes no distance, and keeps digits: torchmetrics subtracts n m m^T from sums of squares.
    center = real_features.double().mean(dim=0)
    metric = FrechetInceptionDistance(feature=_Precomputed(real_features.shape[1]))
    metric.update(real_features.double().cpu() - center.cpu(), real=True)
    metric.update(fake_features.double().cpu() - center.cpu(), real=False)
    # Rounding can leave a distance of zero a little below.
    return max(0.0, float(metric.compute()))


def kernel_distance(
    real_features: Tensor,
    fake_features: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3`` (Bińkowski et al. 2018, sec. 4), unbiased.

    The mean over random subsets, and the standard deviation from subset to subset. Being unbiased it can be negative
    when the sets are alike.

    Args:
        real_features: (n, d).
        fake_features: (m, d).
        num_subsets: pairs of subsets, drawn without replacement within each.
        subset_size: members of a subset; None: see :func:`default_subset_size`.
        seed: of the draws; the global random numbers are left alone.

    Returns:
        Mean and standard deviation.

    Raises:
        UserError: the sets do not fit together, or are smaller than a subset.
    """
    from torchmetrics.image.kid import poly_mmd

    check_pair(real_features, fake_features)
    smallest = min(len(real_features), len(fake_features))
    size = default_subset_size(len(real_features), len(fake_features)) if subset_size is None else subset_size
    if not 2 <= size <= smallest:
        raise UserError(f"subset_size must be from 2 to the {smallest} images of the smaller set, got {size}.")
    if num_subsets < 1:
        raise UserError(f"num_subsets must be at least 1, got {num_subsets}.")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_subsets):
        real = real_features[torch.randperm(len(real_features), generator=generator)[:size]]
        fake = fake_features[torch.randperm(len(fake_features), generator=generator)[:size]]
        distances.append(poly_mmd(real, fake))
    values = torch.stack(distances).double()
    return float(values.mean()), float(values.std(unbiased=False))


def default_subset_size(num_real: int, num_fake: int) -> int:
    """Half of the smaller set, so that subsets differ from one another, and at most 500."""
    return max(2, min(MAX_SUBSET_SIZE, num_real // 2, num_fake // 2))


class _Precomputed(nn.Module):
    """Stands where torchmetrics expects a network; what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
