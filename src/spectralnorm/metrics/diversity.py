"""How different generated images are from one another, against how different real ones are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.pairwise import check_pair, mean_distance

__all__ = ["Diversity", "diversity"]


class Diversity(NamedTuple):
    """Mean distance between two images, generated over real: 1 when they differ as much as real ones."""

    overall: float
    within_class: float | None
    """Of two images of one class, averaged over the classes that both sets have; None without classes."""


def diversity(
    real: Tensor,
    fake: Tensor,
    *,
    real_classes: Tensor | None = None,
    fake_classes: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Diversity:
    """Compare mean pairwise distances of features.

    Below 1 generated images are too much alike. Within classes it shows a collapse that leaves one image a class, which
    overall distances hardly see. Unlike LPIPS, distances are those of the extractor's features, as they are.

    Args:
        real: (n, d), n >= 2.
        fake: (m, d), m >= 2.
        real_classes: int64 (n,), for the number within classes.
        fake_classes: int64 (m,).
        device: where to compute.

    Raises:
        UserError: the sets do not fit together, or all real images are the same.
    """
    check_pair(real, fake)
    spread = mean_distance(real, device=device)
    if spread == 0:
        raise UserError("All real images have the same features, so no diversity can be measured against them.")
    overall = mean_distance(fake, device=device) / spread
    if real_classes is None or fake_classes is None:
        return Diversity(overall, None)
    ratios = []
    for number in real_classes.unique().tolist():
        of_real, of_fake = real[real_classes == number], fake[fake_classes == number]
        if min(len(of_real), len(of_fake)) < 2:
            continue
        spread = mean_distance(of_real, device=device)
        if spread > 0:
            ratios.append(mean_distance(of_fake, device=device) / spread)
    return Diversity(overall, sum(ratios) / len(ratios) if ratios else None)
