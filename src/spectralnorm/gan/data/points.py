"""Points in the plane drawn from known mixtures of Gaussians, by which mode collapse is measured.

They take the place of images: a point is a float "image" of two channels and one pixel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralnorm.gan.data.image_set import ImageSet
from spectralnorm.gan.data.summary import DataSummary

__all__ = ["MIXTURES", "Mixture", "open_points"]

_NUM_TRAINING = 100_000
_NUM_HELD_OUT = 10_000


@dataclass(frozen=True)
class Mixture:
    """Equally frequent Gaussians, alike in every direction."""

    centers: Tensor
    """float32 ``(modes, 2)``."""
    standard_deviation: float
    source: str

    def draw(self, num: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Points, float32 ``(num, 2)``, and the mode of each, int64 ``(num,)``."""
        random = torch.Generator().manual_seed(seed)
        modes = torch.randint(len(self.centers), (num,), generator=random)
        return self.centers[modes] + self.standard_deviation * torch.randn(num, 2, generator=random), modes


def _ring() -> Mixture:
    angles = torch.arange(8) * (2 * math.pi / 8)
    centers = torch.stack([angles.cos(), angles.sin()], dim=1)
    return Mixture(centers, 0.01, "8 Gaussians on a circle (Srivastava et al. 2017, VEEGAN)")


def _grid() -> Mixture:
    places = torch.arange(5) * 2.0 - 4
    return Mixture(
        torch.cartesian_prod(places, places), 0.05, "25 Gaussians on a grid (Srivastava et al. 2017, VEEGAN)"
    )


MIXTURES: Mapping[str, Mixture] = {"toy-ring": _ring(), "toy-grid": _grid()}
"""Mixtures by the name that ``config.data`` calls them."""


def open_points(name: str) -> ImageSet:
    """100,000 points of a mixture to train on and 10,000 held out, always the same ones, with their modes as labels.

    Args:
        name: in `MIXTURES`.
    """
    mixture = MIXTURES[name]
    (training, labels), (held_out, held_out_labels) = (
        mixture.draw(num, seed=seed) for seed, num in enumerate((_NUM_TRAINING, _NUM_HELD_OUT))
    )
    class_names = tuple(f"({round(x, 2) + 0:g}, {round(y, 2) + 0:g})" for x, y in mixture.centers.tolist())
    fingerprint = hashlib.sha256(training.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    summary = DataSummary(
        name=name,
        source=mixture.source,
        licence=None,
        num_images=_NUM_TRAINING + _NUM_HELD_OUT,
        num_training=_NUM_TRAINING,
        num_held_out=_NUM_HELD_OUT,
        channels=2,
        image_size=1,
        original_sizes={},
        modes={},
        classes=dict(zip(class_names, counts, strict=True)),
        num_duplicates=0,
        unreadable=(),
        ignored={},
        resize="none",
        fingerprint=fingerprint,
    )
    return ImageSet(
        images=training.view(-1, 2, 1, 1),
        labels=labels,
        held_out=held_out.view(-1, 2, 1, 1),
        held_out_labels=held_out_labels,
        class_names=class_names,
        name=name,
        summary=summary,
        fingerprint=fingerprint,
    )
