"""Weights of which the norm is kept between two changes, but not the normalized value.

It is so where a copy of the whole weight would undo what sharding saves (FSDP2), where this process holds a part of the
weight only (DTensor), and in the replicas that DataParallel makes for one forward. The norm follows the parameter that
optimizers change. So everything but the division happens once per change of the weight, and all uses until the next one
divide by the same norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import TrackedTriplet, compute_dtype, track_together
from spectralnorm.parametrizations import fsdp
from spectralnorm.parametrizations.arithmetic import plain_arithmetic
from spectralnorm.parametrizations.batches import probe_at, wholes
from spectralnorm.parametrizations.engine import divisors_of, write_buffers
from spectralnorm.parametrizations.kept import Kept, Verdict
from spectralnorm.parametrizations.quotient import NormalizedWeights, Quotient
from spectralnorm.parametrizations.shards import distributed_as, is_distributed, scaled_part, whole
from spectralnorm.parametrizations.weight_clock import Moment, version_of, watch

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = [
    "NormAlone",
    "advance",
    "changing_parameter",
    "divide_again",
    "refresh_for_replicas",
    "refuse_sharded",
    "sigma_of",
    "use",
    "write_vectors",
]


@dataclass(slots=True)
class NormAlone:
    """What is kept.

    Attributes:
        moment: of the parameter that optimizers change, when the norm was computed.
        sigma: the raw weight's norm, a scalar.
        pairs: for each view the whole vectors u and v.
        divisor: what the weight is divided by; a number where the host knows it.
        active: whether that depends on sigma.
        triplets: for each view those of its blocks, with the frame to go on from.
        age: refreshes since the frames were computed anew.
        verdict: whether there was a norm.
        is_in_buffers: whether the buffers hold u and v.
        handed_out: the value that was last handed out, where it is kept: this process's part of it, or all of it if the
            user wants that.
        version: its version, by which a write into it is noticed.
    """

    moment: Moment
    sigma: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]
    divisor: float | Tensor
    active: bool | Tensor
    triplets: tuple[TrackedTriplet, ...]
    age: int
    verdict: Verdict
    is_in_buffers: bool = False
    handed_out: Tensor | None = None
    version: int = 0

    def hand_out(self, value: Tensor) -> None:
        self.handed_out, self.version = value.detach(), version_of(value)

    def was_written_to(self) -> bool:
        return self.handed_out is not None and version_of(self.handed_out) != self.version

    def written_value(self, parameter: Tensor) -> Tensor | None:
        """What was written into the value of ``parameter``, if that has not changed since; None: nothing."""
        is_of_now = self.moment.clock.weight is parameter and self.moment.is_now()
        return self.handed_out if is_of_now and self.was_written_to() else None

    def is_current(self, parameter: Tensor) -> bool:
        return self.moment.clock.weight is parameter and self.moment.is_now() and not self.was_written_to()

    def can_be_followed(self, parameter: Tensor) -> bool:
        """Whether the parameter is one optimizer step further and nothing else has happened to it."""
        moment = self.moment
        is_followed = moment.clock.weight is parameter and moment.is_one_step_ago() and not self.was_written_to()
        return is_followed and not self.verdict.is_bad(0) and not parameter.is_complex()


def changing_parameter(normalization: SpectralNorm, weight: Tensor) -> Tensor | None:
    """The parameter whose changes ``weight`` follows, if the norm alone is kept of it; else None."""
    if isinstance(weight, nn.Parameter):
        parameter = fsdp.sharded_of(weight)
        return weight if parameter is None and is_distributed(weight) else parameter
    # What the replica copied from the module it was made from, a moment ago.
    kept = normalization._kept
    return kept.moment.clock.weight if kept is not None and normalization.__dict__.get("_is_replica", False) else None


def refuse_sharded(weight: Tensor, option: str) -> None:
    """Refuse an option for a weight of which processes hold parts.

    Nothing would add up the gradients of a learned scale, and a bound of the whole is not one of what FSDP2 rounds.

    Raises:
        UserError: it is such a weight.
    """
    if is_distributed(weight) or (isinstance(weight, nn.Parameter) and fsdp.sharded_of(weight) is not None):
        raise UserError(
            f"{option} is not offered for weights that FSDP2 or tensor parallelism shards; leave it out or use "
            "DistributedDataParallel."
        )


def use(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> Tensor:
    """The normalized ``weight``, which `changing_parameter` says follows ``parameter``."""
    if not isinstance(weight, nn.Parameter):
        return _of_replica(normalization, weight)
    state = _current(normalization, weight, parameter)
    if torch.is_grad_enabled() and normalization.training and not state.is_in_buffers:
        write_vectors(normalization, state)
    if is_distributed(weight):
        value = scaled_part(weight, state.sigma, state.pairs, normalization.views, normalization.quotient)
        state.hand_out(value)
        return value
    value = state.handed_out
    if value is None or is_distributed(value) or value.dtype != weight.dtype or value.device != weight.device:
        with torch.no_grad():
            value = normalization.quotient(weight.detach(), state.sigma)
    if normalization.keeps_value_when_sharded or fsdp.is_between_uses(weight):
        state.hand_out(value)  # between uses, the user may be about to write into it
    else:
        state.handed_out = None
    return _as_function_of(normalization, weight, value, state)


def sigma_of(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> Tensor:
    """The norm of ``weight``: a scalar."""
    return _current(normalization, weight, parameter).sigma


def advance(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> None:
    """Power iteration now."""
    state = _current(normalization, weight, parameter)
    if not parameter.is_complex():
        with plain_arithmetic(weight):
            entries = whole(weight)
            found = _followed(normalization, entries, state)
            state = normalization._norm_alone = _found(normalization, entries, found, state.moment, state.age + 1)
    write_vectors(normalization, state)


def refresh_for_replicas(normalization: SpectralNorm, weight: Tensor) -> None:
    """Bring the norm up to date before DataParallel copies the module for one forward."""
    if not normalization._can_keep(weight):
        return
    kept = normalization._current(weight)
    if torch.is_grad_enabled() and normalization.training and not kept.is_in_buffers:
        write_buffers(normalization, kept)


@torch.no_grad()
def _current(normalization: SpectralNorm, weight: Tensor, parameter: Tensor) -> NormAlone:
    """What is kept, renewed if the parameter has changed."""
    state = normalization._norm_alone
    if state is not None and state.is_current(parameter):
        return state
    # An ordinary parameter's from before it was sharded: it holds the whole weight, twice.
    normalization._kept = None
    written = None if state is None else state.written_value(parameter)
    if written is not None:
        _take_over(written, weight, parameter)
    clock = watch(parameter)
    clock.observe()
    with plain_arithmetic(weight):
        entries = whole(weight)
        if state is not None and state.can_be_followed(parameter):
            found, age = _followed(normalization, entries, state), state.age + 1
        else:
            found, age = [normalization.refined(view, entries) for view in normalization.views], 0
        state = normalization._norm_alone = _found(normalization, entries, found, clock.now(), age)
    return state


def _followed(normalization: SpectralNorm, entries: Tensor, state: NormAlone) -> list[TrackedTriplet]:
    """Triplets of the whole weight, by power iteration from the frames of the last ones."""
    frames = [triplet.frame for triplet in state.triplets]
    blocks = [view.memory_blocks(entries) for view in normalization.views]
    return track_together(
        [each.to(compute_dtype(each.dtype)) for each in blocks],
        frames,
        [probe_at(frame, state.age) for frame in frames],
        normalization.n_power_iterations,
        eps=normalization.eps,
    )


def _found(
    normalization: SpectralNorm, entries: Tensor, triplets: Sequence[TrackedTriplet], moment: Moment, age: int
) -> NormAlone:
    sigmas, (pairs,) = wholes([(normalization, entries)], [triplets])
    verdict = Verdict(sigmas, normalization.eps)
    ((divisor, active),) = divisors_of([normalization], sigmas, verdict)
    return NormAlone(moment, sigmas[0], pairs, divisor, active, tuple(triplets), age, verdict)


def divide_again(normalization: SpectralNorm, state: NormAlone) -> None:
    """Follow a change of what the weight is divided to."""
    ((state.divisor, state.active),) = divisors_of([normalization], state.sigma.reshape(1), state.verdict)
    if not state.was_written_to():
        state.handed_out = None


def write_vectors(normalization: SpectralNorm, state: NormAlone) -> None:
    """Write u and v into the buffers; not those of a weight that has no norm."""
    state.is_in_buffers = True
    if state.verdict.is_bad(0):
        return
    usable = (state.sigma > normalization.eps) & (state.sigma < float("inf"))
    with torch.no_grad():
        for buffers, vectors in zip(normalization.pairs(), state.pairs, strict=True):
            for buffer, vector in zip(buffers, vectors, strict=True):
                buffer.copy_(vector if state.verdict.is_immediate else torch.where(usable, vector, buffer))


def _take_over(written: Tensor, weight: Tensor, parameter: Tensor) -> None:
    """Copy what was written into a handed-out value to the parameter, and to the whole weight that stands in for it."""
    entries = whole(written)
    parameter.copy_(distributed_as(parameter, entries))
    if weight is not parameter:
        weight.copy_(distributed_as(weight, entries))


def _of_replica(normalization: SpectralNorm, weight: Tensor) -> Tensor:
    """The normalized ``weight`` of a replica, on its device, by the norm of the parameter it is a copy of."""
    kept = normalization._kept
    assert kept is not None
    with torch.no_grad():
        value = normalization.quotient(weight.detach(), kept.sigma.to(weight.device))
    return _as_function_of(normalization, weight, value, kept)


def _as_function_of(normalization: SpectralNorm, weight: Tensor, value: Tensor, state: NormAlone | Kept) -> Tensor:
    """``value``, in the graph if there is one: a node of its own for each use."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return value.detach()
    source = state.quotient if isinstance(state, Kept) else state
    divisor, active, device = source.divisor, source.active, weight.device
    quotient = Quotient(
        weight=weight,
        moment=state.moment,
        value=value,
        sigma=state.sigma.to(device),
        divisor=divisor.to(device) if isinstance(divisor, Tensor) else divisor,
        active=active.to(device) if isinstance(active, Tensor) else active,
        pairs=tuple((u.to(device), v.to(device)) for u, v in source.pairs),
        views=normalization.views,
        flat_v=None,
        coefficient=normalization.divided_to,
        cap=normalization.mode == "cap",
        eps=normalization.eps,
    )
    return NormalizedWeights.apply([quotient], weight)[0]
