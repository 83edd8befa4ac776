"""Weights renewed together by kernels of our own: what is called does not grow with the number of layers.

What the engine does in torch's operations, weight by weight or shape by shape, is done here for all weights of a step
at once. On a GPU two launches of Triton kernels find the norms and vectors, one divides, one writes the buffers, and
the backward is two; on a CPU it is one call each of kernels in C. The numbers are those of the engine but for rounding.

Only what the kernels can read comes here: one matrix or its diagonal blocks, float32 (on a GPU a half type as well), no
gaps in memory, divided by its own estimated norm; on a CPU by a guaranteed bound as well, which is found between the
norms and the division. All else goes the engine's way, beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from spectralnorm.linalg import TrackedTriplet
from spectralnorm.linalg.cpu.tables import Ends
from spectralnorm.parametrizations.division import Division, SomeOf
from spectralnorm.parametrizations.fsdp import is_anything_sharded
from spectralnorm.parametrizations.kept import Kept, Member, Outputs, Rounded, Verdict, free_memory
from spectralnorm.parametrizations.kernel_buffers import KnownBuffers, write_vectors
from spectralnorm.parametrizations.memory import Memory
from spectralnorm.parametrizations.plans import Plans, Weights, plans_for
from spectralnorm.parametrizations.promise import Promise, promise_of, shorter_vectors
from spectralnorm.parametrizations.quotient import Quotient
from spectralnorm.parametrizations.weight_clock import Moment, Step, WeightClock

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = [
    "ByKernels",
    "Following",
    "quotient_by_kernels",
    "refresh_by_kernels",
    "tracked_and_divided",
]


class Following(NamedTuple):
    """What a captured graph goes on from, see `ByKernels.following`.

    Attributes:
        plans: of the weights.
        tracking: the plan of their matrices.
        tracked: what was found last, whose frames are where the next ones start.
        members: the weights, each with its normalization, which may be gone later.
        ages: of each how often it has been renewed.
        num_iterations: of each renewal.
        eps: a norm up to here counts as zero.
        narrow: to which type the values were rounded as well when they were computed; None: to none.
    """

    plans: Plans
    tracking: Any
    tracked: Any
    members: list[tuple[ref[SpectralNorm], Tensor]]
    ages: list[int]
    num_iterations: int
    eps: float
    narrow: torch.dtype | None


class ByKernels:
    """Weights that are renewed together, step after step, and what came of it last: a `Followed`.

    What is to be known of all of them is in one place, and is not found out again for each as long as they stay the
    same: one pass over them tells whether an optimizer's step, and nothing else, has changed them.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        """Of these, which are still to be renewed."""
        weights = _weights_of(members)
        first = members[0].normalization
        self._plans = plans = plans_for(weights)
        self._tracking = plans.tracking(weights)
        self._options = first.n_power_iterations, first.eps
        self._strict = [place for place, (normalization, _) in enumerate(weights) if normalization.strict]
        # Weak: a normalization holds this, and nothing of a model is to outlive it.
        self._members = [ref(normalization) for normalization, _ in weights]
        self._addresses = [weight.data_ptr() for _, weight in weights]
        self._step_ids: list[int] | None = None
        self._num_watches = 0
        self._tracked: Any = None
        self._division: Division | None = None
        self._verdict: Verdict | None = None
        # To which type the values were rounded for uses under autocast since they were computed.
        self._used_dtype: torch.dtype | None = None
        # To which they were when they were computed.
        self._narrow: torch.dtype | None = None
        self._buffers: KnownBuffers | None = None

    def renew(self, members: Sequence[Member], *, into_buffers: bool = False) -> None:
        """One step of power iteration for all, and the division by the norms.

        Args:
            members: all of these.
            into_buffers: whether to write u and v into the buffers as well, if all members are in training mode and
                that is sooner done now than later.
        """
        plans, (num_iterations, eps) = self._plans, self._options
        if not isinstance(members, SameMembers):  # they were found one by one, and may be found at once the next time
            self._step_ids, self._num_watches = _all_of_step(members)
        kepts = [member.kept for member in members]
        moments = [kept.moment.clock.now() for kept in kepts]
        ages = [kept.age for kept in kepts]
        is_first = self._tracked is None
        frames = [kept.triplets[0].frame for kept in kepts] if is_first else self._tracked
        rounded = self._used_dtype
        values, gradients_memory, narrows = self._memory(kepts, rounded)
        options = (frames, ages, num_iterations)
        everywhere = range(len(kepts))
        outs = values.free_at(everywhere, plans.prototypes)
        promised: dict[str, Any] = {}
        if self._strict:
            self._tracked = tracked = self._tracking.track(*options, eps=eps)
            sigmas, ends = tracked.weight_sigmas, self._tracking.ends(tracked)
            pairs = partial(_pairs_of, self._tracking, tracked, plans.out_dims)
            promised = plans.promised(self._promises(members), sigmas)
            plans.quotients.prepared(outs, targets=values.addresses, rules=promised["rules"]).divide(sigmas)
        else:
            also: dict[str, Any] = {}
            if narrows is not None and rounded is not None:
                also["narrows"] = narrows.free_at(everywhere, plans.prototypes_of(rounded))
                also["narrow_targets"] = narrows.addresses
            how = plans.quotients.prepared(outs, targets=values.addresses, **also)
            track = partial(self._tracking.track, *options, eps=eps)
            tracked, sigmas, ends, pairs = tracked_and_divided(plans, self._tracking, track, how)
            self._tracked = tracked
            if is_first and not plans.kernels.are_of_host:
                self._tracking.prepare_in_place(tracked, plans.out_dims)
        self._division = division = Division(plans, sigmas, pairs, values, gradients_memory, ends, **promised)
        are_all_good = tracked.num_bad == 0 if plans.kernels.are_of_host else None
        self._verdict = verdict = Verdict(sigmas, eps, self._verdict, are_all_good=are_all_good)
        for place, (kept, moment, value) in enumerate(zip(kepts, moments, outs, strict=True)):
            kept.moment, kept.value, kept.value_version, kept.own_quotient = moment, value, value._version, None
            kept.followed, kept.index, kept.verdict, kept.is_in_buffers = self, place, verdict, False
            kept.age += 1
            kept.was_used, kept.is_exact = False, False
            kept.looks.value_is_new()
        if into_buffers and ends is not None and plans.kernels.are_of_host:
            self._write_new(members, ends, sigmas)
        self._used_dtype, self._narrow = None, None if narrows is None else rounded
        if narrows is not None and rounded is not None:
            division.rounded = rounded, narrows
            for kept, value in zip(kepts, narrows, strict=True):
                kept.rounded = Rounded(rounded, value, value._version, outputs=Outputs())

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> bool:
        """Round all values for uses under autocast to ``dtype``, as the next ones will be at once if these are used.

        Returns:
            Whether they have been rounded. They are not on a CPU, if one is of a half type, or if they have been
            rounded to another type already.
        """
        division, kernels = self._division, self._plans.kernels
        are_wide = all(like.dtype == torch.float32 for like in self._plans.prototypes)
        if division is None or kernels.are_of_host or division.rounded is not None or not are_wide:
            return False
        likes = self._plans.prototypes_of(dtype)
        narrows = Memory([None] * len(likes), self._plans.device)
        rounded = narrows.free_at(range(len(likes)), likes)
        torch._foreach_copy_(rounded, [*division.values])  # type: ignore[reportPrivateImportUsage]
        division.rounded = dtype, narrows
        for _, kept in self.current():
            value = rounded[kept.index]
            kept.rounded = Rounded(dtype, value, value._version, outputs=Outputs())
        return True

    def _promises(self, members: Sequence[Member]) -> dict[int, Promise]:
        """Of the strict weights, by place."""
        promises = {}
        for place in self._strict:
            normalization, weight, _ = members[place]
            leading = None
            if not normalization.is_bounded_by_symbol:
                (triplet,) = self.triplets_of(place)
                leading = shorter_vectors(triplet.u, triplet.v)
            upper = normalization.upper_bound(weight, leading, is_followed=True)
            promises[place] = promise_of(normalization, weight, upper, leading)
        return promises

    def _memory(self, kepts: Sequence[Kept], dtype: torch.dtype | None) -> tuple[Memory, Memory, Memory | None]:
        """Of the last values and gradients, and of the last values of another ``dtype``, as far as it is free."""
        plans, before = self._plans, self._division
        new = partial(Memory, [None] * len(kepts), plans.device)
        if before is None:
            found = [free_memory(kept) for kept in kepts]
            values = Memory(plans.fitting([value for value, _ in found]), plans.device)
            return values, new(), None
        self._division = None
        values, gradients, narrows, graphs = before.values, before.gradients_memory, before.rounded, ref(before)
        for kept in kepts:
            kept.value = None  # type: ignore[assignment]
        del before
        # A graph may hold the tensors themselves, and not only their memory.
        is_free = graphs() is None
        values = values if is_free else new()
        if dtype is None or narrows is None:
            return values, gradients, None
        return values, gradients, narrows[1] if is_free else new()

    @property
    def is_for_one_node(self) -> bool:
        """Whether the gradients of all weights should be asked for at once."""
        return not self._plans.kernels.are_of_host

    def stepped_together(self, step: Step | None) -> SameMembers | None:
        """The members, if ``step`` of an optimizer has changed all of them, nothing else has, and nobody else is by."""
        if (
            step is None
            or step.parameter_ids != self._step_ids
            or WeightClock.num_watches != self._num_watches
            or self._verdict is None
            or self._verdict.is_any_bad()
            or is_anything_sharded()
        ):
            return None
        members, options = SameMembers(self), self._options
        for place, (reference, address) in enumerate(zip(self._members, self._addresses, strict=True)):
            normalization = reference()
            kept = None if normalization is None else normalization._kept
            if normalization is None or kept is None or kept.followed is not self or kept.index != place:
                return None
            clock, steps, writes = kept.moment
            weight = clock.weight
            if (
                clock.last_step is not step
                or clock.before_step != (steps, writes)
                or weight._version != clock.version
                or address != clock.data_ptr
                or address != weight.data_ptr()
                or type(weight) is not nn.Parameter
                or kept.was_written_to()
                or not normalization._keeps
                or (normalization.n_power_iterations, normalization.eps) != options
            ):
                return None
            members.append(Member(normalization, weight, kept))
        return members

    def is_of(self, members: Sequence[Member]) -> bool:
        """Whether ``members`` are the very weights that were followed here, in the same memory.

        Whoever changes how a weight is divided gives it another value, or takes it away from here.
        """
        if isinstance(members, SameMembers):
            return members.followed is self
        first = members[0].normalization
        return (
            len(members) == len(self._addresses)
            and (first.n_power_iterations, first.eps) == self._options
            and all(
                kept.followed is self and kept.index == place and weight.data_ptr() == address
                for place, ((_, weight, kept), address) in enumerate(zip(members, self._addresses, strict=True))
            )
        )

    def current(self) -> list[tuple[SpectralNorm, Kept]]:
        """Those of the members that still have the value that they got last."""
        found = []
        for reference in self._members:
            normalization = reference()
            kept = None if normalization is None else normalization._kept
            if normalization is not None and kept is not None and kept.verdict is self._verdict:
                found.append((normalization, kept))
        return found

    def some(self, kepts: Sequence[Kept], *, are_rounded: bool = False) -> SomeOf:
        """The division of some members, for uses of the values or of the rounded ones."""
        division = self._division
        assert division is not None
        if are_rounded and division.rounded is not None:
            self._used_dtype = division.rounded[0]
        places, moments = [kept.index for kept in kepts], [kept.moment for kept in kepts]
        return SomeOf(division, places, moments, are_rounded=are_rounded)

    def quotient_of(self, index: int, moment: Moment) -> Quotient:
        """What is to be known of a member's value, which was computed at a ``moment``."""
        assert self._division is not None
        return self._division.quotient(index, moment)

    def divisor_of(self, index: int) -> float | Tensor:
        """What a member's weight was divided by."""
        assert self._division is not None
        return self._division.divisor(index)

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        """Those of a weight's blocks, in the order of the memory."""
        u, v, sigma, frame = self._tracked.triplets[index]
        v = self._plans.views[index].in_memory_order(v, self._plans.prototypes[index])
        return (TrackedTriplet(u, v, sigma, frame),)

    def write(self, places: Sequence[int], buffers: Sequence[Tensor]) -> None:
        """As `write_vectors`, what was found last."""
        assert self._division is not None
        write_vectors(self._division, self._tracking, places, buffers)

    def _write_new(self, members: Sequence[Member], ends: Ends, sigmas: Tensor) -> None:
        """Write what has just been found, by one look at each buffer where `write` takes several."""
        known = self._buffers
        if known is None or not known.are_of(members):
            known = self._buffers = KnownBuffers.of(members)
        if known is None:
            return
        sizes, owners = self._tracking.vector_sizes, self._tracking.vector_owners
        self._plans.store.write(ends, sizes, owners, sigmas, known.addresses, eps=self._plans.eps)
        for _, _, kept in members:
            kept.is_in_buffers = True

    def following(self) -> Following | None:
        """What a captured graph goes on from.

        None: the kernels are of the host, or a weight is strict, has no norm, from whose frames nothing can be found
        any more, or is gone.
        """
        tracked, verdict, current = self._tracked, self._verdict, self.current()
        if (
            tracked is None
            or verdict is None
            or verdict.is_any_bad()
            or self._strict
            or self._plans.kernels.are_of_host
            or len(current) < len(self._members)
        ):
            return None
        weights = [kept.moment.clock.weight for _, kept in current]
        members = list(zip(self._members, weights, strict=True))
        ages = [kept.age for _, kept in current]
        return Following(self._plans, self._tracking, tracked, members, ages, *self._options, self._narrow)


def tracked_and_divided(
    plans: Plans, tracking: Any, track: Callable[..., Any], how: Any
) -> tuple[Any, Tensor, Any, Callable[[], Sequence[tuple[Tensor, Tensor]]]]:
    """Find norms and vectors by ``track`` of a plan, and divide by the norms in the way ``how``.

    Returns:
        What was tracked, the norms, where the vectors are if that is known, and what gives them whole.
    """
    if tracking.divides:
        tracked = track(division=how)
        # Bound to what belongs to this step, and not to a `ByKernels`, which old graphs need not hold.
        pairs = partial(_pairs_of, tracking, tracked, plans.out_dims)
        return tracked, tracked.weight_sigmas, tracking.ends(tracked), pairs
    tracked = track()
    us, vs, sigmas = tracking.whole(tracked, plans.out_dims)
    how.divide(sigmas)
    return tracked, sigmas, None, partial(list, zip(us, vs, strict=True))


def _pairs_of(tracking: Any, tracked: Any, out_dims: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    us, vs, _ = tracking.whole(tracked, out_dims)
    return list(zip(us, vs, strict=True))


class SameMembers(list[Member]):
    """Members of a `ByKernels` that go on together, in its order."""

    def __init__(self, followed: ByKernels) -> None:
        super().__init__()
        self.followed = followed


def _all_of_step(members: Sequence[Member]) -> tuple[list[int] | None, int]:
    """The parameters that the last step has changed, if ``members`` are all who keep values of them; how many watch."""
    clock = members[0].kept.moment.clock
    watching = [mate for _, mate in clock.stepped_together() if mate is not None and mate._keeps]
    if clock.last_step is None or len(watching) != len(members):
        return None, 0
    return clock.last_step.parameter_ids, WeightClock.num_watches


def _weights_of(members: Sequence[Member]) -> Weights:
    return [(member.normalization, member.weight) for member in members]


def quotient_by_kernels(
    normalization: SpectralNorm,
    weight: Tensor,
    sigma: Tensor,
    pair: tuple[Tensor, Tensor],
    promise: Promise | None = None,
) -> Quotient:
    """One weight divided by a norm that is known; to the same bits as among others, and so is its gradient.

    Args:
        normalization: of the weight.
        weight: that the kernels can read.
        sigma: (1,).
        pair: the whole vectors u and v.
        promise: of a strict weight.
    """
    plans = plans_for([(normalization, weight)])
    values = Memory([None], plans.device)
    promised: dict[str, Any] = {} if promise is None else plans.promised({0: promise}, sigma)
    options: dict[str, Any] = {"rules": promised["rules"]} if promised else {}
    plans.quotients.divide(sigma, values.free_at([0], plans.prototypes), **options)
    memory = Memory([None], plans.device)
    division = Division(plans, sigma, lambda: [pair], values, memory, **promised)
    return division.quotient(0, normalization.watched(weight).now())


def refresh_by_kernels(members: Sequence[Member], *, into_buffers: bool = False) -> None:
    """As `refresh_together`, for weights that the kernels can read, all on one device."""
    before = members[0].kept.followed
    followed = before if isinstance(before, ByKernels) and before.is_of(members) else ByKernels(members)
    followed.renew(members, into_buffers=into_buffers)
