"""Weights on a GPU renewed together by Triton kernels: launches do not grow with the number of layers.

What the engine does in torch's operations, weight by weight or shape by shape, is done here for all weights of a step
at once: seven launches find the norms and vectors, one divides, one writes the buffers, and the backward is two. The
numbers are those of the engine but for rounding.

Only what the kernels can read comes here: one matrix or its diagonal blocks, float32 or a half type, no gaps in memory,
divided by its own estimated norm. All else goes the engine's way, beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, TrackedTriplet, seeded_direction
from spectralnorm.linalg.cuda import is_trusted
from spectralnorm.linalg.tracking import PROBE_LENGTH
from spectralnorm.parametrizations.kept import Kept, Verdict, free_memory
from spectralnorm.parametrizations.quotient import Quotient

if TYPE_CHECKING:
    from spectralnorm.linalg.cuda.tracking import Tracked, TrackingPlan
    from spectralnorm.parametrizations.engine import Member
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["ByKernels", "are_usable", "can_be_read", "quotient_by_kernels", "refresh_by_kernels"]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def are_usable(weight: Tensor) -> bool:
    """Whether weights of that type, one of those that kernels read, and device are renewed by them."""
    return weight.is_cuda and is_trusted(weight.device, weight.dtype)


def can_be_read(normalization: SpectralNorm, weight: Tensor) -> bool:
    """Whether the kernels are to do all that is to be done for a weight."""
    return (
        weight.dtype in _DTYPES
        and len(normalization.views) == 1
        and normalization.geometry is None
        and not normalization.strict
        and are_usable(weight)
        and _has_layout(normalization.views[0], weight.shape, weight.stride())
    )


@lru_cache(maxsize=4096)
def _has_layout(view: MatrixView, shape: torch.Size, stride: tuple[int, ...]) -> bool:
    from spectralnorm.linalg.cuda.layout import is_dense, layout_of

    weight = torch.empty_strided(shape, stride, device="meta")
    try:
        layout_of(view.blocks_of_columns(weight))
    except ValueError:
        return False
    return is_dense(weight)


_Weights = Sequence[tuple["SpectralNorm", Tensor]]


class _Plans:
    """What is remembered of weights in a row.

    Attributes:
        prototypes: of each its shape, strides and type, without memory.
        views: how each is read as a matrix.
        quotients: their division.
        store: their buffers.
    """

    def __init__(self, weights: _Weights) -> None:
        # Here, because `import spectralnorm` loads no Triton.
        from spectralnorm.linalg.cuda.quotients import QuotientPlan
        from spectralnorm.linalg.cuda.storing import VectorStore

        self.prototypes = [
            torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
            for _, weight in weights
        ]
        self.views = [normalization.views[0] for normalization, _ in weights]
        rows = [(weight.detach(), view.out_dim) for (_, weight), view in zip(weights, self.views, strict=True)]
        coefficients, caps = zip(*(_rule(normalization) for normalization, _ in weights), strict=True)
        self.quotients = QuotientPlan(rows, coefficients, caps, eps=weights[0][0].eps)
        self.store = VectorStore()
        self._tracking: TrackingPlan | None = None

    def tracking(self, weights: _Weights) -> TrackingPlan:
        """The weights' matrices, for the same weights as these were made for."""
        if self._tracking is None:
            from spectralnorm.linalg.cuda.tracking import TrackingPlan

            parts = zip(self.views, weights, strict=True)
            matrices = [view.blocks_of_columns(weight.detach()) for view, (_, weight) in parts]
            self._tracking = TrackingPlan(matrices, [_directions(matrix) for matrix in matrices])
        return self._tracking


# By addresses and rules: a plan holds no weight, and is right for whatever lies at its addresses in this form.
_plans: OrderedDict[tuple[Any, ...], _Plans] = OrderedDict()
_MOST_PLANS = 64


def _plans_for(weights: _Weights) -> _Plans:
    key = tuple(_identity(normalization, weight) for normalization, weight in weights)
    plans = _plans.get(key)
    if plans is None:
        plans = _plans[key] = _Plans(weights)
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return plans


def _identity(normalization: SpectralNorm, weight: Tensor) -> tuple[Any, ...]:
    place = weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()
    return *place, normalization.views[0], normalization.eps, *_rule(normalization)


def _rule(normalization: SpectralNorm) -> tuple[float, bool]:
    return normalization.divided_to, normalization.mode == "cap"


def _directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What a frame on either side is stirred with, as `probe_at` has it."""
    like = torch.empty(0, device=matrix.device)
    rows, columns = matrix.shape[1], matrix[0, 0].numel()
    return PROBE_LENGTH * seeded_direction("probe", rows, like), PROBE_LENGTH * seeded_direction("probe", columns, like)


class _Division:
    """Weights divided by norms that are known: a `Batch`."""

    def __init__(self, plans: _Plans, sigmas: Tensor) -> None:
        self.plans, self.sigmas = plans, sigmas

    def divide(self, memory: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each weight divided, into ``memory`` where it fits; the divisors, and whether they depend on sigma."""
        outs = [
            out
            if out is not None and out.stride() == like.stride() and out.data_ptr() % 16 == 0
            else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.sigmas.device)
            for out, like in zip(memory, self.plans.prototypes, strict=True)
        ]
        return self.plans.quotients.divide(self.sigmas, outs)

    def gradients(self, quotients: Sequence[Quotient], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Batch` has it, of any of the weights, in two launches."""
        places = [quotient.place for quotient in quotients]
        return self.plans.quotients.gradients(
            [_laid_out(grad, self.plans.prototypes[place]) for grad, place in zip(grads, places, strict=True)],
            [quotient.value for quotient in quotients],
            [quotient.pairs[0][0] for quotient in quotients],
            [quotient.pairs[0][1] for quotient in quotients],
            self.sigmas,
            places=places,
        )

    def quotients(
        self, weights: _Weights, pairs: Sequence[tuple[Tensor, Tensor]], memory: Sequence[Tensor | None]
    ) -> list[Quotient]:
        """The weights divided, with their whole vectors u and v."""
        values, divisors, active = self.divide(memory)
        parts = zip(weights, values, self.sigmas.unbind(), divisors.unbind(), active.unbind(), pairs, strict=True)
        return [
            Quotient(
                weight=weight,
                moment=normalization.watched(weight).now(),
                value=value,
                sigma=sigma,
                divisor=divisor,
                active=is_active,
                pairs=(pair,),
                views=normalization.views,
                flat_v=None,
                coefficient=normalization.divided_to,
                cap=normalization.mode == "cap",
                eps=normalization.eps,
                batch=self,
                place=place,
            )
            for place, ((normalization, weight), value, sigma, divisor, is_active, pair) in enumerate(parts)
        ]


class ByKernels:
    """What came of one step of several weights: a `Followed`.

    Attributes:
        us: whole left vectors, for each weight.
        vs: whole right vectors, in torch's order.
        sigmas: the norms, (weights,).
    """

    def __init__(self, plans: _Plans, tracking: TrackingPlan, tracked: Tracked, addresses: list[int]) -> None:
        self._plans, self._tracking, self._tracked, self._addresses = plans, tracking, tracked, addresses
        self.us, self.vs, self.sigmas = tracking.whole(tracked, [view.out_dim for view in plans.views])

    @classmethod
    def follow(cls, members: Sequence[Member]) -> ByKernels:
        """One step of power iteration for all."""
        first = members[0].normalization
        ages = [member.kept.age for member in members]
        before = members[0].kept.followed
        if isinstance(before, ByKernels) and before._is_of(members):
            plans, tracking, addresses, frames = before._plans, before._tracking, before._addresses, before._tracked
        else:
            weights = _weights_of(members)
            plans = _plans_for(weights)
            tracking, addresses = plans.tracking(weights), [weight.data_ptr() for _, weight in weights]
            frames = [member.kept.triplets[0].frame for member in members]
        tracked = tracking.track(frames, ages, first.n_power_iterations, eps=first.eps)
        return cls(plans, tracking, tracked, addresses)

    def _is_of(self, members: Sequence[Member]) -> bool:
        """Whether ``members`` are the very weights that were followed here, in the same memory.

        Whoever changes how a weight is divided gives it another value, which is not followed from here.
        """
        return len(members) == len(self._addresses) and all(
            member.kept.followed is self and member.kept.index == place and member.weight.data_ptr() == address
            for place, (member, address) in enumerate(zip(members, self._addresses, strict=True))
        )

    def division(self) -> _Division:
        """By the norms that were found."""
        return _Division(self._plans, self.sigmas)

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        """Those of a weight's blocks, in the order of the memory."""
        u, v, sigma, frame = self._tracked.triplets[index]
        v = self._plans.views[index].in_memory_order(v, self._plans.prototypes[index])
        return (TrackedTriplet(u, v, sigma, frame),)

    @staticmethod
    def can_write(buffers: Sequence[Tensor]) -> bool:
        """Whether `write` can write there."""
        return all(buffer.dtype in _DTYPES and buffer.is_contiguous() for buffer in buffers)

    def write(self, places: Sequence[int], buffers: Sequence[Tensor], eps: float) -> None:
        """Write u and v of the weights at ``places``, those that have a norm, into ``buffers``: u, v, u, v, ..."""
        vectors = [vector for place in places for vector in (self.us[place], self.vs[place])]
        owners = [place for place in places for _ in range(2)]
        self._plans.store.copy(vectors, owners, self.sigmas, buffers, eps=eps)


def _weights_of(members: Sequence[Member]) -> _Weights:
    return [(member.normalization, member.weight) for member in members]


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` with the type and strides of ``like``; the same memory, if only strides of single entries differ."""
    if grad.dtype == like.dtype:
        if grad.stride() == like.stride():
            return grad
        pairs = zip(grad.shape, grad.stride(), like.stride(), strict=True)
        if all(size == 1 or mine == its for size, mine, its in pairs):
            return grad.as_strided(like.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=grad.device).copy_(grad)


def quotient_by_kernels(
    normalization: SpectralNorm, weight: Tensor, sigma: Tensor, pair: tuple[Tensor, Tensor]
) -> Quotient:
    """One weight divided by a norm that is known; to the same bits as among others, and so is its gradient.

    Args:
        normalization: of the weight.
        weight: that the kernels can read.
        sigma: (1,).
        pair: the whole vectors u and v.
    """
    weights = [(normalization, weight)]
    (quotient,) = _Division(_plans_for(weights), sigma).quotients(weights, [pair], [None])
    return quotient


def refresh_by_kernels(members: Sequence[Member]) -> None:
    """As `refresh_together`, for weights that the kernels can read, all on one device."""
    followed = ByKernels.follow(members)
    verdict = Verdict(followed.sigmas, members[0].normalization.eps)
    ages = [member.kept.age + 1 for member in members]
    memory = [free_memory(member.kept)[0] for member in members]
    pairs = list(zip(followed.us, followed.vs, strict=True))
    quotients = followed.division().quotients(_weights_of(members), pairs, memory)
    for place, (member, quotient, age) in enumerate(zip(members, quotients, ages, strict=True)):
        member.normalization.keep(Kept.of(quotient, followed, verdict, place, age=age))
