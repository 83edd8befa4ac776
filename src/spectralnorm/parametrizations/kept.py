"""What is kept of a normalized weight between two changes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from spectralnorm.linalg import TrackedTriplet
from spectralnorm.parametrizations.arithmetic import host_has
from spectralnorm.parametrizations.memory import is_held_once
from spectralnorm.parametrizations.occasions import Occasions
from spectralnorm.parametrizations.quotient import Quotient
from spectralnorm.parametrizations.same_numbers import is_quotient
from spectralnorm.parametrizations.unseen_writes import Looks
from spectralnorm.parametrizations.weight_clock import Moment, WeightClock, watch

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["Alone", "Followed", "Kept", "Member", "Verdict", "free_memory"]

_is_grad_enabled = torch.is_grad_enabled  # asked at every use


class Verdict:
    """Which norms could be computed, known to the host without making it wait.

    On the CPU the norms are there. A GPU is still busy with what was queued: the numbers travel behind it into pinned
    memory and are looked at when they are next needed, a training step later. Until they have come they count as good.
    """

    __slots__ = ("_are_all_good", "_on_host", "_sigmas", "eps", "is_immediate")

    def __init__(
        self, sigmas: Tensor, eps: float, before: Verdict | None = None, *, are_all_good: bool | None = None
    ) -> None:
        """Start to find out about ``sigmas``, one for each weight, in the place of the last verdict about them.

        Args:
            sigmas: float32 or float64, (weights,).
            eps: a norm up to here counts as zero.
            before: the last verdict, whose memory is used again.
            are_all_good: whether all are norms, where the host knows that already.
        """
        self.eps, self._are_all_good = eps, are_all_good
        self.is_immediate = are_all_good is not None or host_has(sigmas.device)
        self._on_host: Tensor | None = None
        self._sigmas: list[float] | None = None
        if self.is_immediate:
            self._on_host = sigmas
        elif sigmas.device.type == "cuda":
            if before is not None and before._sigmas is not None and before._on_host is not None:
                self._on_host, before._on_host = before._on_host, None
            else:
                self._on_host = torch.empty(sigmas.shape, dtype=sigmas.dtype, device="cpu", pin_memory=True)
            # No norm is negative: what still is has not come.
            self._on_host.fill_(-1).copy_(sigmas, non_blocking=True)

    @property
    def sigmas(self) -> list[float] | None:
        """The norms as numbers; None while they have not come."""
        if self._sigmas is None and self._on_host is not None:
            sigmas = self._on_host.tolist()
            if self.is_immediate or -1 not in sigmas:
                self._sigmas = sigmas
        return self._sigmas

    def is_any_bad(self) -> bool:
        """Whether a norm is known to be zero or not finite."""
        if self._are_all_good is None:
            sigmas = self.sigmas
            if sigmas is None:
                return False
            self._are_all_good = all(self.eps < sigma < math.inf for sigma in sigmas)
        return not self._are_all_good

    def is_bad(self, index: int) -> bool:
        """The same of one norm."""
        if not self.is_any_bad():
            return False
        sigmas = self.sigmas
        return sigmas is not None and not self.eps < sigmas[index] < math.inf


class Outputs:
    """A value as outputs of nodes of the graph, one for each use.

    D(real) and D(fake) take one each: what comes from both is added up where the gradient is computed, and not in a
    pass through memory before it. What a user hangs on it (a hook, `retain_grad`) stays with that use, so nobody else
    is given the same one.

    Attributes:
        fresh: that nobody has been given yet; two are made at the first use.
    """

    __slots__ = ("_shared", "fresh")

    def __init__(self) -> None:
        self.fresh: list[Tensor] | None = None
        self._shared: tuple[Tensor, Tensor] | None = None  # of another node, made when a third is wanted

    def is_used_up(self) -> bool:
        """Whether a node has to be made before the next use."""
        return not self.fresh and self._shared is None

    def add(self, outputs: list[Tensor]) -> None:
        """Two of a new node."""
        if self.fresh is None:
            self.fresh = outputs
        else:
            self._shared = outputs[0], outputs[1]

    def take(self) -> Tensor:
        """One for a use."""
        if self.fresh:
            return self.fresh.pop()
        assert self._shared is not None
        output, other = self._shared
        self._shared = other, output
        # An alias, of the views the cheapest, lets a sparse gradient through, as that of an embedding may be.
        return output[...]


@dataclass(slots=True)
class Rounded:
    """A value for use under autocast, which would round one that is not, at every use.

    Attributes:
        dtype: whose numbers the entries are.
        value: of that type; of a strict weight in the weight's own, because it is handed out to whoever asks.
        version: the version of the value when it was made.
        quotient: of a strict weight, which is divided by another number then.
        output: the value as a node of the graph, made at the first use under grad.
        outputs: instead of ``output``, of a value that was rounded together with others.
    """

    dtype: torch.dtype
    value: Tensor
    version: int
    quotient: Quotient | None = None
    output: Tensor | None = None
    outputs: Outputs | None = None

    def was_written_to(self) -> bool:
        """Whether somebody wrote into the value."""
        return self.value._version != self.version


class Followed(Protocol):
    """What came of following the singular vectors of one or several weights."""

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        """For each view of a weight the triplets of its blocks."""
        ...


class Alone(NamedTuple):
    """The triplets of one weight, ``index`` in whatever it was renewed with."""

    triplets: tuple[TrackedTriplet, ...]
    index: int = 0

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        assert index == self.index
        return self.triplets


@dataclass(slots=True)
class Kept:
    """The value of a normalized weight, and what the next one starts from.

    Attributes:
        moment: of the weight, when the value was computed.
        value: the normalized weight.
        value_version: the value's version, by which a write of the user's into it is noticed.
        outputs: the value as outputs of the graph.
        followed: where the triplets are to be found.
        age: refreshes since the frames were computed anew.
        is_in_buffers: whether the buffers hold u and v.
        verdict: which weights of the batch had a norm.
        index: this one's place in it.
        rounded: the same for a value whose entries autocast does not round any more, made at the first use under it.
        own_quotient: what the value's derivative needs; None where that is to be asked of ``followed``.
        has_left: whether it is to be divided in another way than those that it was ``followed`` with, whose graphs may
            need the value and not hold its quotient.
        looks: when it is looked whether the value or the weight was written through ``.data``.
        was_used: whether somebody has been handed the value out.
        is_exact: whether the norm is right whatever it was before. After an optimizer's step it is as near as one power
            iteration, which may miss a direction.
    """

    moment: Moment
    value: Tensor
    value_version: int
    outputs: Outputs
    followed: Followed
    age: int
    is_in_buffers: bool
    verdict: Verdict
    index: int
    looks: Looks = field(compare=False)
    rounded: Rounded | None = None
    own_quotient: Quotient | None = None
    has_left: bool = False
    is_exact: bool = False
    was_used: bool = field(default=False, compare=False)

    @classmethod
    def of(
        cls,
        quotient: Quotient,
        followed: Followed,
        verdict: Verdict,
        index: int,
        *,
        age: int,
        looks: Looks | None = None,
    ) -> Kept:
        """A value that has just been computed, and that nobody has used yet.

        Args:
            quotient: the value.
            followed: as the attribute.
            verdict: as the attribute.
            index: as the attribute.
            age: as the attribute.
            looks: those at the value that was renewed; None: it is the first, or was found anew.
        """
        if looks is None:
            looks = Looks(quotient.moment.clock)
        else:
            looks.value_is_new()
        return cls(
            moment=quotient.moment,
            value=quotient.value,
            value_version=quotient.value._version,
            outputs=Outputs(),
            followed=followed,
            age=age,
            is_in_buffers=False,
            verdict=verdict,
            index=index,
            own_quotient=quotient,
            looks=looks,
        )

    def forget_nodes(self) -> None:
        """Make new ones for the next uses."""
        self.outputs = Outputs()
        if self.rounded is not None:
            self.rounded.output = None
            self.rounded.outputs = None if self.rounded.outputs is None else Outputs()

    def forget_graphs(self) -> None:
        """Let the user's graphs be the only ones that hold the value."""
        self.outputs, self.rounded = Outputs(), None

    def leave_others(self) -> None:
        """Be renewed anew and not as one of those that were renewed together."""
        self.own_quotient, self.followed = self.quotient, Alone(self.triplets, self.index)
        self.has_left = True

    @property
    def triplets(self) -> tuple[TrackedTriplet, ...]:
        """For each view of the weight those of its blocks, in memory order, with the frame to go on from."""
        return self.followed.triplets_of(self.index)

    @property
    def quotient(self) -> Quotient:
        """The value, and what its derivative needs."""
        own = self.own_quotient
        return self.followed.quotient_of(self.index, self.moment) if own is None else own  # type: ignore[attr-defined]

    @property
    def divisor(self) -> float | Tensor:
        """What the weight was divided by."""
        own = self.own_quotient
        return self.followed.divisor_of(self.index) if own is None else own.divisor  # type: ignore[attr-defined]

    @property
    def sigma(self) -> Tensor:
        """The raw weight's norm, a scalar."""
        return self.quotient.sigma

    def sigma_on_host(self) -> float:
        """The same as a number, for which a GPU is waited for."""
        sigmas = self.verdict.sigmas
        return float(self.sigma) if sigmas is None else sigmas[self.index]

    def is_current(self, weight: Tensor) -> bool:
        """Whether the value is still that of ``weight``. Called at every use."""
        (clock, steps, writes), looks = self.moment, self.looks
        return (
            clock.weight is weight
            and clock.steps == steps
            and clock.writes == writes
            and weight._version == clock.version
            and weight.data_ptr() == clock.data_ptr
            and self.value._version == self.value_version
            and (self.rounded is None or not self.rounded.was_written_to())
            and (not looks.num_of_copy or not looks.find_initialization(self.value))
            and (
                (looks.last == Occasions.num and Occasions.with_grad is _is_grad_enabled()) or self._is_still_of(clock)
            )
        )

    def _is_still_of(self, clock: WeightClock) -> bool:
        """Whether the value is the clock's weight divided, as far as is known; if not, a write has been counted."""
        if not self.looks.are_due(clock.weight):
            return True
        if not is_quotient(self.value, clock.weight, self.divisor):
            clock.count_unseen_write()
            return False
        self.looks.found_nothing(clock)
        return True

    def stay(self) -> None:
        """Be the value of the weight as it is now, which was written and is the same."""
        self.moment = self.moment.clock.now()
        for quotient in (self.own_quotient, self.rounded and self.rounded.quotient):
            if quotient is not None:
                quotient.moment = self.moment
        self.forget_nodes()  # which may know the weight as it was alone, and have no second derivative now

    def was_written_to(self) -> bool:
        """Whether somebody wrote into the tensor that was handed out, as ``nn.init.normal_(layer.weight)`` does."""
        if self.rounded is not None and self.rounded.was_written_to():
            return True
        return self.value._version != self.value_version

    def go_on_expecting(self, num_of_copy: int) -> None:
        """If no optimizer has moved the weight, find what is written into the value, by so many looks at it."""
        if self.moment.steps == 0:
            self.looks.expect_initialization(self.value, num_of_copy)

    def written_value(self) -> Tensor:
        """The tensor that was written into."""
        return self.rounded.value if self.rounded is not None and self.rounded.was_written_to() else self.value

    def can_be_followed(self) -> bool:
        """Whether exactly one optimizer step, and nothing else, has changed the weight since."""
        return self.moment.is_one_step_ago() and not self.verdict.is_bad(self.index)

    def vectors_for(self, buffers: list[Tensor]) -> list[Tensor]:
        """What to write into the buffers: u and v of each view; of a weight that has no norm what is there."""
        if self.verdict.is_bad(self.index):
            return buffers
        vectors = [vector for pair in self.quotient.pairs for vector in pair]
        if self.verdict.is_immediate:
            return vectors
        # Whether there is a norm may not be known to the host yet.
        usable = (self.sigma > self.verdict.eps) & (self.sigma < math.inf)
        return [torch.where(usable, new, old) for new, old in zip(vectors, buffers, strict=True)]

    def for_copy(self, weight: Tensor) -> Kept:
        """The same for a copy of the weight, sharing nothing that can be written to."""
        moment = watch(weight).now()
        value = self.value.clone()
        quotient = replace(self.quotient, weight=weight, moment=moment, value=value)
        return replace(
            self,
            moment=moment,
            value=value,
            own_quotient=quotient,
            value_version=value._version,
            outputs=Outputs(),
            rounded=None,
            followed=Alone(self.triplets, self.index),
            looks=Looks(moment.clock),
            was_used=False,
        )


class Member(NamedTuple):
    """A weight to be renewed from what was kept of it."""

    normalization: SpectralNorm
    weight: Tensor
    kept: Kept


def free_memory(kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """The memory of an old value, if nobody else holds it (no graph of the user's, no tensor), and of its gradient.

    ``kept`` has no quotient afterwards. Of one that is not its own nothing is said.
    """
    if kept.own_quotient is None or kept.has_left:
        return None, None
    value, gradient, quotient = kept.value, kept.own_quotient.gradient_memory, ref(kept.own_quotient)
    kept.own_quotient = kept.value = None  # type: ignore[assignment]
    # A graph may hold the tensor itself, and not only its memory.
    is_free = quotient() is None and is_held_once(value)
    return value if is_free else None, gradient
