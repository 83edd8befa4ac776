"""What compiled code gets of a normalized weight: its value, in each form that a place of use may want.

Autocast may begin or end within the code, so what is read where the code is called need not fit where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.parametrizations.arithmetic import without_autocast
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.strict import Target, autocast_dtype, rounded_within

__all__ = ["HandedOver", "handed_over"]


class HandedOver(NamedTuple):
    """A value for one call.

    Attributes:
        value: as it is read where autocast is off.
        rounded: as it is read under the autocast of the call.
        dtype: the type that this autocast rounds it to; None: ``rounded`` is ``value``.
        target: what is promised of it after any rounding; None: nothing, because it is not strict.
    """

    value: Tensor
    rounded: Tensor
    dtype: torch.dtype | None
    target: Target | None

    def for_use(self) -> Tensor:
        """The form for the autocast of this place."""
        dtype = autocast_dtype(self.value)
        if dtype == self.dtype:
            return self.rounded
        if dtype is None or self.target is None:
            return self.value
        return rounded_within(self.value, self.target, dtype)


def handed_over(read: Callable[[], Tensor], normalization: SpectralNorm, weight: Tensor) -> HandedOver:
    """What ``read`` gives, the value of ``weight``, and what it gives without autocast if that is on and rounds it."""
    value = rounded = read()
    dtype = normalization.type_for_use(weight)
    # One that is not kept may advance when it is read. It is not rounded unless it is strict, and then its numbers keep
    # the promise where autocast is off as well.
    if dtype is not None and normalization.hands_out_kept(weight):
        with without_autocast(weight):
            value = read()
    target = normalization.target(weight.dtype) if normalization.strict else None
    return HandedOver(value, rounded, dtype, target)
