"""Weights of which the norm is kept between two changes, but not the normalized value.

It is so where a copy of the whole weight would undo what sharding saves (FSDP2), where this process holds a part of the
weight only (DTensor), and in the replicas that DataParallel makes for one forward. The norm follows the parameter that
optimizers change. So everything but the division happens once per change of the weight, and all uses until the next one
divide by the same norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spectralnorm.parametrizations import fsdp
from spectralnorm.parametrizations.arithmetic import plain_arithmetic
from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.shards import distributed_as, is_distributed, local_part, scaled_part, whole
from spectralnorm.parametrizations.weight_clock import version_of, watch

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["NormAlone", "advance", "changing_parameter", "refresh_for_replicas", "sigma_of", "use"]


@dataclass(slots=True)
class NormAlone:
    """What is kept.

    Attributes:
        kept: the norm, its vectors and what the next one starts from; the value in it is empty.
        handed_out: the value that was last handed out, where it is kept: this process's part of it, or all of it if the
            user wants that.
        version: its version, by which a write into it is noticed.
    """

    kept: Kept
    handed_out: Tensor | None = None
    version: int = 0

    def hand_out(self, value: Tensor) -> None:
        self.handed_out, self.version = value.detach(), version_of(value)

    def was_written_to(self) -> bool:
        return self.handed_out is not None and version_of(self.handed_out) != self.version

    def is_current(self, parameter: Tensor) -> bool:
        kept = self.kept
        clock = kept.clock
        return (
            clock.weight is parameter
            and clock.is_unmoved()
            and clock.steps == kept.steps
            and clock.writes == kept.writes
            and not self.was_written_to()
        )


def changing_parameter(normalization: SpectralNorm, weight: Tensor) -> Tensor | None:
    """The parameter whose changes ``weight`` follows, if the norm alone is kept of it; else None."""
    if isinstance(weight, nn.Parameter):
        parameter = fsdp.sharded_of(weight)
        return weight if parameter is None and is_distributed(weight) else parameter
    # What the replica copied from the module it was made from, a moment ago.
    kept = normalization._kept
    return kept.clock.weight if kept is not None and normalization.__dict__.get("_is_replica", False) else None


def use(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> Tensor:
    """The normalized ``weight``, which `changing_parameter` says follows ``parameter``."""
    if normalization._kept is not None and weight is not parameter and not isinstance(weight, nn.Parameter):
        return _of_replica(normalization, weight, normalization._kept)
    state = _current(normalization, weight, parameter)
    kept = state.kept
    if torch.is_grad_enabled() and normalization.training and not kept.is_in_buffers:
        kept.write_vectors(local_part(normalization._u), local_part(normalization._v))
    if is_distributed(weight):
        value = scaled_part(weight, kept.sigma, kept.u, kept.v, normalization.view, normalization._scaled)
        state.hand_out(value)
        return value
    value = state.handed_out
    if value is None or is_distributed(value) or value.dtype != weight.dtype or value.device != weight.device:
        with torch.no_grad():
            value = normalization._scaled(weight.detach(), kept.sigma)
    if normalization.keeps_value_when_sharded or fsdp.is_between_uses(weight):
        state.hand_out(value)  # between uses, the user may be about to write into it
    else:
        state.handed_out = None
    return normalization._as_function_of(weight, value, kept)


def sigma_of(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> Tensor:
    """The norm of ``weight``: a scalar."""
    return _current(normalization, weight, parameter).kept.sigma


def advance(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> None:
    """Power iteration now."""
    current = _current(normalization, weight, parameter).kept
    kept = normalization._computed(whole(weight), current.clock, current)
    kept.write_vectors(local_part(normalization._u), local_part(normalization._v))
    normalization._norm_alone = _without_value(kept)


def refresh_for_replicas(normalization: SpectralNorm, weight: Tensor) -> None:
    """Bring the norm up to date before DataParallel copies the module for one forward."""
    if not normalization._can_keep(weight):
        return
    kept = normalization._current(weight)
    if torch.is_grad_enabled() and normalization.training and not kept.is_in_buffers:
        kept.write_vectors(normalization._u, normalization._v)


@torch.no_grad()
def _current(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> NormAlone:
    """What is kept, renewed if the parameter has changed."""
    state = normalization._norm_alone
    if state is not None and state.is_current(parameter):
        return state
    # An ordinary parameter's from before it was sharded: it holds the whole weight, twice.
    normalization._kept = None
    if state is not None and state.handed_out is not None and state.was_written_to():
        _take_over(state.handed_out, weight, parameter)
    clock = watch(parameter)
    clock.observe()
    warm = state.kept if state is not None and state.kept.is_one_step_old(parameter) else None
    with plain_arithmetic(weight):
        kept = normalization._computed(whole(weight), clock, warm)
    state = normalization._norm_alone = _without_value(kept)
    return state


def _without_value(kept: Kept) -> NormAlone:
    kept.value = kept.value.new_empty(0)
    return NormAlone(kept)


def _take_over(written: Tensor, weight: Tensor, parameter: Tensor) -> None:
    """Copy what was written into a handed-out value to the parameter, and to the whole weight that stands in for it."""
    entries = whole(written)
    parameter.copy_(distributed_as(parameter, entries))
    if weight is not parameter:
        weight.copy_(distributed_as(weight, entries))


def _of_replica(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> Tensor:
    """The normalized ``weight`` of a replica, on its device, by the norm of the parameter it is a copy of."""
    moved = replace(kept, **{part: getattr(kept, part).to(weight.device) for part in ("sigma", "u", "v")})
    with torch.no_grad():
        value = normalization._scaled(weight.detach(), moved.sigma)
    return normalization._as_function_of(weight, value, moved)
