"""How evenly images change along a path between latents, as an extractor sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["PathLength", "path_length"]


class PathLength(NamedTuple):
    """Of many short steps along paths; squared distances of features over squared lengths of steps."""

    mean: float
    """Without the lowest and the highest percent."""
    standard_error: float
    """Of that mean."""
    num: int
    """Steps that were taken."""


@torch.inference_mode()
def path_length(
    images: Callable[[Tensor, slice], Tensor],
    features: Callable[[Tensor], Tensor],
    starts: Tensor,
    ends: Tensor,
    *,
    spherical: bool,
    epsilon: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PathLength:
    """Perceptual path length (Karras et al. 2019, eq. 2 and 3), with squared distances of an extractor's features.

    ``E |f(G(p(t))) - f(G(p(t + epsilon)))|^2 / epsilon^2``, t uniform on [0, 1], p the path. The published number has
    the distance of LPIPS, which weighs the features of VGG; this one is in the units of its own extractor, and compares
    with numbers of the same extractor alone.

    Args:
        images: ``images(latents, rows)`` maps latents (n, latent_dim) to float images (n, channels, height, width) of
            0 to 255, not rounded; ``rows`` says which of the paths they are, for what belongs to a path, such as its
            class.
        features: maps such images to features (n, d).
        starts: of the paths, (num, latent_dim), on the device of the generator.
        ends: of the paths, of that shape too.
        spherical: along great circles, for a normal z; otherwise along straight lines, for w.
        epsilon: length of a step, as a part of the path.
        batch_size: steps at once.
        seed: of the places on the paths; the global random numbers are left alone.
        progress: called with the steps done and their number.

    Raises:
        UserError: there are fewer than two paths, or epsilon is no small positive number.
    """
    if starts.shape != ends.shape or starts.ndim != 2 or len(starts) < 2:
        raise UserError(
            f"starts and ends must be matrices of one shape and at least two rows, got {tuple(starts.shape)} and "
            f"{tuple(ends.shape)}."
        )
    if not 0 < epsilon < 0.1:
        raise UserError(f"epsilon must be positive and below 0.1, got {epsilon}.")
    interpolate = slerp if spherical else torch.lerp
    places = torch.rand(len(starts), 1, generator=torch.Generator().manual_seed(seed)).double().to(starts.device)
    lengths = []
    for begin in range(0, len(starts), batch_size):
        rows = slice(begin, begin + batch_size)
        # Places in float64: t + epsilon in float32 would be off by a thousandth of the step.
        pair = [
            interpolate(starts[rows].double(), ends[rows].double(), places[rows] + step).to(starts.dtype)
            for step in (0.0, epsilon)
        ]
        # Both in one batch, so that the same kernels round them alike.
        both = features(torch.cat([images(latents, rows) for latents in pair]))
        first, second = both.double().chunk(2)
        lengths.append(((first - second).square().sum(1) / epsilon**2).cpu())
        if progress is not None:
            progress(min(begin + batch_size, len(starts)), len(starts))
    values = torch.cat(lengths).sort().values
    cut = int(0.01 * (len(values) - 1))
    kept = values[cut : len(values) - cut]
    return PathLength(float(kept.mean()), float(kept.std() / len(kept) ** 0.5), len(values))


def slerp(starts: Tensor, ends: Tensor, share: Tensor) -> Tensor:
    """Walk on the sphere between vectors (n, d), by shares (n, 1), both normalized first (Karras et al. 2019, app. C).

    The length of a z hardly matters to generators that normalize it, and for others all vectors get the usual length,
    the root of their dimensions.
    """
    starts, ends = (part / part.norm(dim=1, keepdim=True) for part in (starts, ends))
    angle = torch.arccos((starts * ends).sum(1, keepdim=True).clamp(-1, 1))
    across = ends - starts * torch.cos(angle)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (starts * torch.cos(share * angle) + across * torch.sin(share * angle)) * starts.shape[1] ** 0.5
