"""How the kept value of one weight is renewed: by which of four ways, the cheapest that is right.

What an optimizer's step has moved is followed, together with all else that this step has moved
(`engine.refresh_together`). Of what was written otherwise `nearby` tells how far it is from what is kept: weights that
have moved little are followed until their norms are right, one that has not moved keeps its norm, and of all others the
norm is found anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from spectralnorm.parametrizations import engine, norm_alone
from spectralnorm.parametrizations.arithmetic import plain_arithmetic
from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.nearby import Distance, distance_from, moved_together
from spectralnorm.parametrizations.same_numbers import is_quotient
from spectralnorm.parametrizations.threads import one_at_a_time

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["current", "divide_again"]


def current(normalization: SpectralNorm, weight: Tensor, *, into_buffers: bool = False) -> Kept:
    """The kept value of ``weight``, renewed if that has changed.

    Args:
        normalization: of the weight, of which it can keep a value.
        weight: raw.
        into_buffers: as for `engine.refresh_together`.
    """
    with one_at_a_time, plain_arithmetic(weight):
        normalization.settle()
        kept, clock = normalization._kept, normalization.watched(weight)
        clock.observe()
        if kept is not None and kept.is_current(weight):
            return kept
        if kept is not None and normalization.kept_to_follow(clock) is kept:
            engine.refresh_together(engine.stepped_together(normalization, weight, kept), into_buffers=into_buffers)
        elif kept is None or not _has_been_nearby(normalization, weight, kept):
            _find_anew(normalization, weight)
    assert normalization._kept is not None
    return normalization._kept


def divide_again(normalization: SpectralNorm) -> None:
    """Renew the kept value, not the norm that it rests on; one that is not current at the next use."""
    if normalization._norm_alone is not None:
        norm_alone.divide_again(normalization, normalization._norm_alone)
    kept = normalization._kept
    if kept is None:
        return
    weight = kept.moment.clock.weight
    if kept.is_current(weight):
        _divide_by_kept(normalization, weight, kept)
    else:
        kept.leave_others()  # who are divided as they were


def _find_anew(normalization: SpectralNorm, weight: Tensor) -> None:
    normalization._restore_scale()
    found = [normalization.refined(view, weight.detach()) for view in normalization.views]
    engine.keep_triplets(normalization, weight, found, age=0, is_exact=True)
    if normalization.awaits_initialization:
        normalization.expect_initialization()


def _has_been_nearby(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> bool:
    """Renew what is kept of a weight that has moved little, to the accuracy of what is found anew.

    Returns:
        Whether that was possible.
    """
    distance = distance_from(kept, normalization, weight)
    if distance is Distance.NONE:
        is_same = is_quotient(kept.value, weight, kept.divisor, are_all_compared=True)
        if is_same and not kept.has_left:
            kept.stay()
        else:  # small entries may have moved by more than their own rounding
            _divide_by_kept(normalization, weight, kept)
    elif distance is Distance.SMALL:
        engine.follow_closely(moved_together(normalization, weight, kept))
    return normalization._kept is not None and distance is not Distance.LARGE


def _divide_by_kept(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> None:
    """Divide ``weight`` by the norm that is ``kept`` of it."""
    with plain_arithmetic(weight):
        found_map = normalization.map_again(weight) if normalization.follows_map else None
        age, is_exact = kept.age, kept.is_exact
        engine.keep_triplets(normalization, weight, kept.triplets, age=age, is_exact=is_exact, found_map=found_map)
