"""Uses of weights in a captured CUDA graph, by the kernels that renew them outside of one.

A graph repeats what was launched while it was captured, and nothing that Python decided. So whatever Python knows holds
for one capture: the first use in it renews all weights that were renewed together before, later uses share what it
found until an optimizer's step, captured as well, has changed the weights. Every replay then does the same. It goes on
from where the last one ended, because the frames go back to the memory that they were read from, and a weight that was
zero or not finite in between is followed again from the frames of before.

What a replay changes is seen by nobody. So what a graph trains is not kept outside of it any more. And what a replay
reads and writes is held here as long as one of the weights' normalizations is there: the weights and buffers of the
others, and the frames, those of earlier graphs as well.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralnorm.linalg import compute_dtype, track
from spectralnorm.linalg.cuda.capture import capture_id
from spectralnorm.parametrizations.arithmetic import is_plain, plain_arithmetic
from spectralnorm.parametrizations.by_kernels import ByKernels, Following, tracked_and_divided
from spectralnorm.parametrizations.division import Division, SomeOf
from spectralnorm.parametrizations.kept import Outputs
from spectralnorm.parametrizations.kernel_buffers import write_vectors
from spectralnorm.parametrizations.memory import Memory
from spectralnorm.parametrizations.plans import can_write, identity_of
from spectralnorm.parametrizations.quotient import NormalizedWeights

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["InGraphs", "use"]


def use(normalization: SpectralNorm, weight: Tensor) -> Tensor | None:
    """The normalized ``weight`` for a use that is being captured.

    None: this cannot be done by kernels, or not yet, because the weight has not been renewed by them before with the
    others of its optimizer. The use has to find the norm by itself then.
    """
    if not is_plain(weight):
        return None
    renews = normalization.training and torch.is_grad_enabled()
    group = normalization.in_graphs
    if group is None and renews:
        group = _taken_over(normalization, weight)
    if renews and weight.requires_grad:
        normalization.leave_to_graphs()
    return None if group is None else group.use(normalization, weight, renews=renews)


def _taken_over(normalization: SpectralNorm, weight: Tensor) -> InGraphs | None:
    """The weights that were renewed together with one outside of graphs, from now on in graphs as well."""
    kept = normalization._kept
    if kept is None or not isinstance(kept.followed, ByKernels) or kept.moment.clock.weight is not weight:
        return None
    following = kept.followed.following()
    if following is None or capture_id(weight.device) is None:
        return None
    group = InGraphs(following)
    if not group.is_ready():
        return None
    group.take_over()
    return group


class InGraphs:
    """Weights that are renewed together in every graph that uses one of them in training."""

    def __init__(self, following: Following) -> None:
        self._following = following
        members = self._members()
        self._identities = [identity_of(*each) for each in members]
        self._places = {id(normalization): place for place, (normalization, _) in enumerate(members)}
        self._buffers = [buffer for normalization, _ in members for buffer in normalization.buffers_of_views()]
        self._ages = following.ages
        self._before: list[InGraphs] = []
        # Of the capture that was seen last; of another one nothing of this holds.
        self._capture: int | None = None
        self._division: Division | None = None
        self._moments: list[Any] = []
        self._versions: list[int] = []
        self._outputs: dict[bool, list[Outputs]] = {}

    def is_ready(self) -> bool:
        """Whether nothing has to be sent to the device that a capture cannot send."""
        owners = [place for place in range(len(self._identities)) for _ in range(2)]
        return can_write(self._buffers) and self._following.plans.store.hold(owners, self._buffers)

    def take_over(self) -> None:
        """Renew the weights from now on, also those that were renewed with others in earlier captures."""
        for normalization, _ in self._members():
            before, normalization.in_graphs = normalization.in_graphs, self
            if before is not None and before not in self._before:
                self._before.append(before)

    def use(self, normalization: SpectralNorm, weight: Tensor, *, renews: bool) -> Tensor | None:
        """One use; None: it cannot be done here.

        Args:
            normalization: one of those that were taken over.
            weight: that it normalizes.
            renews: whether a use in training asks, which renews the weights if they have changed.
        """
        capture, place = capture_id(weight.device), self._places[id(normalization)]
        if capture is None or self._following.members[place][1] is not weight:
            return None
        if not self._is_current(place, capture):
            if not renews or not self._fit():
                return None
            with plain_arithmetic(weight):
                self._renew(capture)
        division, dtype = self._division, normalization.type_for_use(weight)
        assert division is not None
        are_rounded = division.rounded is not None and division.rounded[0] is dtype
        if torch.is_grad_enabled() and weight.requires_grad:
            if self._outputs[are_rounded][place].is_used_up():
                self._connect(are_rounded=are_rounded)
            return self._outputs[are_rounded][place].take()
        values = division.rounded[1] if division.rounded is not None and are_rounded else division.values
        return values[place].detach()

    def restart(self, normalization: SpectralNorm) -> None:
        """Let replays go on from a weight as it is now: the frames are those of another one, in whose place it came."""
        for before in self._before:
            before.restart(normalization)
        place = self._places.get(id(normalization))
        if place is None:
            return
        _, tracking, frames, members, *_ = self._following
        weight, view = members[place][1].detach(), normalization.view
        if identity_of(normalization, weight) != self._identities[place]:  # no replay can read it any more
            return
        with plain_arithmetic(weight):
            frame = normalization.refined(view, weight).frame
            if frame.is_left != frames.next_sides[place]:
                blocks = view.memory_blocks(weight)
                frame = track(blocks.to(compute_dtype(blocks.dtype)), frame).frame
            tracking.restart(frames, place, frame)

    def forget(self) -> None:
        """Let go of what was found in a capture, which is over or has changed the weights."""
        self._capture = self._division = None
        self._outputs = {}

    def _members(self) -> list[tuple[SpectralNorm, Tensor]]:
        """The weights whose normalizations are still there."""
        found = [(reference(), weight) for reference, weight in self._following.members]
        return [(normalization, weight) for normalization, weight in found if normalization is not None]

    def _is_current(self, place: int, capture: int) -> bool:
        """Whether a value was computed in this capture, and neither it nor the weight has changed since."""
        if self._capture != capture or self._division is None or not self._moments[place].is_now():
            return False
        return self._division.values[place]._version == self._versions[place]

    def _fit(self) -> bool:
        """Whether all weights and buffers are where they were, in training, and renewed and divided as they were."""
        members = self._members()
        buffers = [buffer for normalization, _ in members for buffer in normalization.buffers_of_views()]
        return (
            all(
                normalization.training
                and normalization.update == "step"
                and normalization.n_power_iterations == self._following.num_iterations
                for normalization, _ in members
            )
            and [identity_of(*each) for each in members] == self._identities
            and [each.data_ptr() for each in buffers] == [each.data_ptr() for each in self._buffers]
        )

    def _renew(self, capture: int) -> None:
        """As `ByKernels.renew`, into memory of the graph."""
        plans, tracking, frames, members, _, num_iterations, eps, narrow = self._following
        everywhere = range(len(members))
        new = partial(Memory, [None] * len(members), plans.device)
        values, also = new(), {}
        outs = values.free_at(everywhere, plans.prototypes)
        rounded = None
        if narrow is not None:
            rounded = narrow, new()
            also["narrows"] = rounded[1].free_at(everywhere, plans.prototypes_of(narrow))
            also["narrow_targets"] = rounded[1].addresses
        how = plans.quotients.prepared(outs, targets=values.addresses, **also)
        track = partial(tracking.track_in_place, frames, self._ages, num_iterations, eps=eps)
        _, sigmas, ends, pairs = tracked_and_divided(plans, tracking, track, how)
        self._division = division = Division(plans, sigmas, pairs, values, new(), ends)
        division.rounded = rounded
        write_vectors(division, tracking, everywhere, self._buffers)
        self._ages = [age + num_iterations + num_iterations % 2 for age in self._ages]
        self._capture = capture
        clocks = [normalization.watched(weight) for normalization, weight in self._members()]
        for clock in clocks:
            clock.observe()
        self._moments = [clock.now() for clock in clocks]
        self._versions = [value._version for value in values]
        self._outputs = {are_rounded: [Outputs() for _ in members] for are_rounded in (False, True)}

    def _connect(self, *, are_rounded: bool) -> None:
        """Make a node of the graph of derivatives for all weights that have none to give."""
        outputs, division = self._outputs[are_rounded], self._division
        weights = [weight for _, weight in self._following.members]
        assert division is not None
        places = [place for place, weight in enumerate(weights) if weight.requires_grad and outputs[place].is_used_up()]
        some = SomeOf(division, places, [self._moments[place] for place in places], are_rounded=are_rounded)
        made = NormalizedWeights.apply(some, *[weights[place] for place in places])
        for place, *of_place in zip(places, made, made[len(places) :], strict=False):
            outputs[place].add(of_place)
