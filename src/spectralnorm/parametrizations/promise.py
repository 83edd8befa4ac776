"""What strict weights are divided by: the bounds of those that are renewed together, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype
from spectralnorm.linalg.trial import tried_upper_bound
from spectralnorm.parametrizations.arithmetic import host_has
from spectralnorm.parametrizations.batches import Together
from spectralnorm.parametrizations.kept import Member
from spectralnorm.parametrizations.strict import Bounded, bounded, careful_divisor

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["Divisor", "Promise", "bounded_value", "promise_of", "promises_of", "shorter_vectors"]

Divisor = tuple["float | Tensor", "bool | Tensor"]
"""What a weight is divided by, and whether that depends on its norm."""


class Promise(NamedTuple):
    """What a strict weight is divided by.

    Attributes:
        upper: what its norm does not exceed.
        divisor: with which the value's norm does not exceed what is wanted; and whether that depends on the norm.
        value: that value, where it had to be looked at; else None.
    """

    upper: Tensor
    divisor: Divisor
    value: Tensor | None


def shorter_vectors(u: Tensor, v: Tensor) -> Tensor:
    """Those of the vectors u (..., out) and v (..., in) that belong to the shorter side."""
    return u if u.shape[-1] <= v.shape[-1] else v


def promises_of(members: Sequence[Member], together: Together, matrices: Sequence[Tensor]) -> dict[int, Promise]:
    """Of the strict members, by place; equal shapes are bounded as one batch."""
    promises = {}
    for batch, of_batch, found in zip(together.batches, matrices, together.found, strict=True):
        strict = [place for place in batch.places if members[place].normalization.strict]
        if not strict:
            continue
        leading = shorter_vectors(found.u, found.v).unflatten(0, (-1, batch.blocks))
        uppers: Tensor | None = None
        if any(members[place].normalization.geometry is None for place in strict):
            uppers = tried_upper_bound(of_batch, leading.flatten(0, 1)).unflatten(0, (-1, batch.blocks)).amax(-1)
        for slot, place in enumerate(batch.places):
            normalization, weight, _ = members[place]
            if normalization.strict:
                if uppers is not None and normalization.geometry is None:
                    upper = uppers[slot]
                else:
                    upper = normalization.upper_bound(weight, leading[slot], is_followed=True)
                promises[place] = promise_of(normalization, weight, upper, leading[slot])
    return promises


def promise_of(normalization: SpectralNorm, weight: Tensor, upper: Tensor, leading: Tensor | None) -> Promise:
    """Of one weight.

    Args:
        normalization: of the weight.
        weight: raw.
        upper: what its norm does not exceed, float64.
        leading: vectors as for `SpectralNorm.upper_bound`, where it takes any.
    """
    weight = weight.detach()
    value = None
    if weight.dtype == compute_dtype(weight.dtype):
        target = normalization.target(weight.dtype)
        if host_has(weight.device):
            return Promise(upper, careful_divisor(weight, float(upper), target), None)
        divisor, active = careful_divisor(weight, upper, target)
    else:
        value, divisor, active = bounded_value(normalization, weight, upper, leading, weight.dtype)
        if host_has(weight.device):
            return Promise(upper, (float(divisor), bool(active)), value)
    return Promise(upper, (divisor.to(compute_dtype(weight.dtype).to_real()), active), value)


def bounded_value(
    normalization: SpectralNorm, weight: Tensor, upper: Tensor, leading: Tensor | None, dtype: torch.dtype
) -> Bounded:
    """The value of a strict weight whose entries are rounded to ``dtype``; the rest as for `promise_of`."""
    target = normalization.target(dtype)
    return bounded(weight, upper, target, lambda value: normalization.upper_bound(value, leading))
