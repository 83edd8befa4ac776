"""How far a weight has moved from what is kept of it, whoever has moved it.

Averages, target networks and what is updated by hand move little, and what is written into memory where it was already
does not move. Power iteration from the directions that are known is as accurate for a weight nearby as to begin anew,
in less time. But those directions tell nothing of what is outside of them. So the distance has to be known: what had
the norm s before has at most s and that distance now (Weyl 1912).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectralnorm.linalg import NUM_TRACKED, Frame, compute_dtype
from spectralnorm.parametrizations.kept import Kept, Member
from spectralnorm.parametrizations.weight_clock import WeightClock, all_clocks

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["Distance", "distance_from", "moved_together"]

# The norm is as it was found, to 1e-4, if the weight has moved by so little of it.
_SAME_NORM = 1e-5
# The last of the known directions tells about what is outside of them, and is itself not exact.
_SAFETY = 2


class Distance(Enum):
    """How far a weight is."""

    NONE = auto()
    """The numbers are the same, up to rounding."""
    SMALL = auto()
    """The largest singular values are sure to be found from the directions that are kept."""
    LARGE = auto()
    """Nothing is known of it."""


def distance_from(kept: Kept, normalization: SpectralNorm, weight: Tensor) -> Distance:
    """How far a weight is from what is kept of it. It waits for the device.

    Args:
        kept: the value of the weight as it was.
        normalization: of the weight.
        weight: raw, as it is now.
    """
    # What one iteration for a step of training has missed would be missed again.
    is_known = kept.is_exact and kept.moment.clock.weight is weight and not kept.verdict.is_bad(kept.index)
    if not is_known or kept.was_written_to():
        return Distance.LARGE
    weight, value = weight.detach(), kept.value
    if _form_of(weight) != _form_of(value):
        return Distance.LARGE
    wide = compute_dtype(weight.dtype)
    now = weight.to(wide)
    moved, sigma = float(torch.linalg.vector_norm(now - value.to(wide) * kept.divisor)), kept.sigma_on_host()
    info = torch.finfo(wide)
    if not moved < sigma or sigma < info.tiny**0.5 / info.eps:
        return Distance.LARGE  # or not finite, or so small that squares may vanish
    if moved < _SAME_NORM * sigma and moved <= torch.finfo(weight.dtype).eps * float(torch.linalg.vector_norm(now)):
        return Distance.NONE
    # A bound of a strict weight takes longer than to begin anew.
    if normalization.strict or normalization.follows_map or weight.is_complex():
        return Distance.LARGE
    parts = zip(normalization.views, kept.triplets, strict=True)
    is_small = all(_is_led_from_within(view.memory_blocks(now), each.frame, moved) for view, each in parts)
    return Distance.SMALL if is_small else Distance.LARGE


def moved_together(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> list[Member]:
    """All weights that were written and moved little, this one among them, which was.

    Whoever writes into one weight writes into those of its model. Those whose value nobody has used are left out: an
    average may be written after every step and used once in a thousand.
    """
    options = _options_of(normalization, weight)
    members = []
    for clock in all_clocks():
        for mate in (found() for found in clock.watchers):
            if mate is normalization:  # which may have watched another parameter before
                if clock is kept.moment.clock:
                    members.append(Member(normalization, weight, kept))
            elif mate is not None and _is_like(mate, clock, options):
                members.append(Member(mate, clock.weight, mate._kept))
    return members


def _options_of(normalization: SpectralNorm, weight: Tensor) -> tuple[object, ...]:
    return normalization.n_power_iterations, normalization.eps, weight.device, compute_dtype(weight.dtype)


def _is_like(mate: SpectralNorm, clock: WeightClock, options: tuple[object, ...]) -> bool:
    kept, weight = mate._kept, clock.weight
    if kept is None or not kept.was_used or kept.moment.clock is not clock or _options_of(mate, weight) != options:
        return False
    if kept.moment.is_now() and not clock.is_written_by_hand:
        return False
    if not mate._can_keep(weight) or kept.is_current(weight) or mate.kept_to_follow(clock) is not None:
        return False
    return distance_from(kept, mate, weight) is Distance.SMALL


def _form_of(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _is_led_from_within(matrices: Tensor, frame: Frame, moved: float) -> bool:
    """Whether the first direction is so much longer than the last that nothing outside can have overtaken it."""
    if frame.rows.shape[-1] <= NUM_TRACKED:
        return True  # nothing is outside
    ends = frame.rows[:, :: NUM_TRACKED - 1]
    images = torch.bmm(ends, matrices if frame.is_left else matrices.mT)
    # A frame may have fewer directions than rows. The others are zero, and say nothing.
    pairs = torch.linalg.vector_norm(images, dim=-1).tolist()
    return all(0 < last <= first - 2 * _SAFETY * moved for first, last in pairs)
