"""`nn.Module.apply` on a normalized layer: what the function writes through ``.data`` is seen.

Initializations are applied like that, with ``layer.weight.data`` as in that of DCGAN. Such a write leaves no trace, so
the numbers are compared with those of before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["apply_of"]


def apply_of(base: type[nn.Module]) -> Callable[..., nn.Module]:
    """The method ``apply`` of normalized layers whose class without it is ``base``."""

    def apply(self: Any, fn: Callable[[nn.Module], None]) -> nn.Module:
        before = [
            _Before(part, parts.original)
            for parts in self.parametrizations.values()
            for part in parts
            if isinstance(part, SpectralNorm) and hasattr(parts, "original") and part._can_keep(parts.original)
        ]
        result = base.apply(self, fn)
        for each in before:
            each.take_over()
        return result

    return apply


class _Before:
    """A weight and its value before the function."""

    @torch.no_grad()
    def __init__(self, normalization: SpectralNorm, weight: Tensor) -> None:
        self._normalization, self._kept = normalization, normalization._current(weight)
        self._weight, self._value = weight, self._kept.value
        self._copies = weight.clone(), self._value.clone()

    def take_over(self) -> None:
        """Let what was written into the value be the new weight, and forget the value if the weight was written."""
        if self._normalization._kept is not self._kept or not self._kept.is_current(self._weight):
            return  # written where it leaves a trace
        raw, value = self._copies
        if not _is_same(self._value, value):
            torch.autograd.graph.increment_version(self._value)
        elif not _is_same(self._weight, raw):
            self._normalization.invalidate()


@torch.no_grad()
def _is_same(tensor: Tensor, copy: Tensor) -> bool:
    return torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)
