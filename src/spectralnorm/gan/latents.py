"""Latents: drawn, truncated, and the paths between them; and the labels that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["Labels", "label_tensor", "slerp", "truncated", "walk_latents"]

Labels: TypeAlias = int | str | Sequence[int | str] | Tensor
"""One class for all images, or as many as images; each by its name or its number."""

_MAX_TRUNCATED = 2.0


def truncated(latents: Tensor, truncation: float) -> Tensor:
    """Standard normal numbers to those of a normal distribution cut off at ``2 * truncation`` (Brock et al. 2019).

    The paper draws again what lies beyond a threshold; here each number moves to the same quantile of the distribution
    that this leaves, so that a seed keeps its image, more typical and less varied as the truncation falls.

    Args:
        latents: any shape.
        truncation: above 0; 1 or more changes nothing.
    """
    if truncation >= 1:
        return latents
    threshold = torch.tensor(_MAX_TRUNCATED * truncation, dtype=torch.float64)
    below = torch.special.ndtr(-threshold)
    quantiles = below + (1 - 2 * below) * torch.special.ndtr(latents.double())
    return torch.special.ndtri(quantiles).clamp(-threshold, threshold).to(latents.dtype)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (White 2016): the straight line would pass through latents of untypically small norm.

    Args:
        start: (..., dim).
        end: (..., dim).
        share: (..., 1), 0 at the start, 1 at the end.
    """
    cosine = torch.cosine_similarity(start, end, dim=-1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.arccos(cosine)[..., None]
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)


def walk_latents(stops: Tensor, frames: int, *, loop: bool) -> Tensor:
    """Latents ``(num, frames, dim)`` on the way through stops ``(num, stops, dim)``, evenly in time.

    Args:
        stops: at least two a walk.
        frames: of the whole way.
        loop: go on from the last stop to the first, ending one frame before it, so that the last frame leads over to
            the first; False: end at the last stop.
    """
    num_stops = stops.shape[1]
    legs = num_stops if loop else num_stops - 1
    places = torch.arange(frames) * legs / frames if loop else torch.linspace(0, legs, frames)
    leg = places.floor().long().clamp(max=legs - 1)
    return slerp(stops[:, leg], stops[:, (leg + 1) % num_stops], (places - leg)[:, None])


def label_tensor(labels: Labels, num: int, class_names: Sequence[str]) -> Tensor:
    """Labels as an int64 tensor ``(num,)``.

    Args:
        labels: a name is looked up first, then read as a number.
        num: images.
        class_names: in the order of their numbers.

    Raises:
        UserError: there are no classes, a class is not known, or there are not as many labels as images.
    """
    if not class_names:
        raise UserError("This generator was trained without labels; leave out the class.")
    if isinstance(labels, Tensor):
        if labels.dtype.is_floating_point or labels.dim() > 1:
            raise UserError(f"labels must be whole numbers of shape ({num},), got {labels.dtype} {list(labels.shape)}.")
        labels = labels.tolist()
    if isinstance(labels, int | str):
        return torch.full((num,), _label(labels, class_names))
    if len(labels) != num:
        raise UserError(f"labels must be one class or as many as images ({num}), got {len(labels)}.")
    return torch.tensor([_label(label, class_names) for label in labels])


def _label(label: int | str, class_names: Sequence[str]) -> int:
    if isinstance(label, str) and label in class_names:
        return list(class_names).index(label)
    if str(label).isdecimal() and int(label) < len(class_names):
        return int(label)
    known = ", ".join(f"{index} {name}" for index, name in enumerate(class_names[:20]))
    more = f" and {len(class_names) - 20} more" if len(class_names) > 20 else ""
    raise UserError(f"Unknown class '{label}'; choose a name or a number of {known}{more}.")
