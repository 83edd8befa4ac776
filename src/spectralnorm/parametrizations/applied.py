"""`nn.Module.apply` on a normalized layer: what the function writes through ``.data`` is seen.

Initializations are applied like that, with ``layer.weight.data`` as in that of DCGAN. Such a write leaves no trace, so
the numbers are compared with those of before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.parametrizations.same_numbers import is_same
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.stacked import parameter_of
from spectralnorm.parametrizations.unseen_writes import Looks

__all__ = ["apply_of"]


def apply_of(base: type[nn.Module]) -> Callable[..., nn.Module]:
    """The method ``apply`` of normalized layers whose class without it is ``base``."""

    def apply(self: Any, fn: Callable[[nn.Module], None]) -> nn.Module:
        befores = [
            (_KeptValue if part.hands_out_kept(weight) else _HandedOutValue)(part, weight)
            for parts in self.parametrizations.values()
            for part in parts
            if isinstance(part, SpectralNorm)
            and (weight := parameter_of(parts, part)) is not None
            and part.sees_writes(weight)
        ]
        try:
            return base.apply(self, fn)
        finally:
            for before in befores:
                before.take_over()

    return apply


class _HandedOutValue:
    """A weight whose value is computed when the function reads it."""

    def __init__(self, normalization: SpectralNorm, weight: Tensor) -> None:
        self._normalization, self._weight, self._copy = normalization, weight, weight.detach().clone()
        normalization.remembers_numbers = True

    def take_over(self) -> None:
        """As that of `_KeptValue`, of the value that was read last."""
        normalization, handed = self._normalization, self._normalization.handed_out
        normalization.remembers_numbers = False
        if handed is not None and handed.was_changed_unseen():
            torch.autograd.graph.increment_version(handed.value)
        elif not is_same(self._weight, self._copy):
            normalization.invalidate()


class _KeptValue:
    """A weight and its value before the function."""

    @torch.no_grad()
    def __init__(self, normalization: SpectralNorm, weight: Tensor) -> None:
        self._normalization, self._kept = normalization, normalization._current(weight)
        self._weight, self._value = weight, self._kept.value
        self._copies = weight.clone(), self._value.clone()
        # What the function writes is one write, however often it reads the weight in between.
        self._looks, self._kept.looks = self._kept.looks, Looks.never(self._kept.moment.clock)

    def take_over(self) -> None:
        """Let what was written into the value be the new weight, and forget the value if the weight was written."""
        kept = self._kept
        is_current = self._normalization._kept is kept and kept.is_current(self._weight)
        if kept.value is self._value:  # which may turn out to be that of the weight still
            kept.looks = self._looks
        if not is_current:
            return  # written where it leaves a trace
        raw, value = self._copies
        if not is_same(self._value, value):
            torch.autograd.graph.increment_version(self._value)
        elif not is_same(self._weight, raw):
            self._normalization.invalidate()
