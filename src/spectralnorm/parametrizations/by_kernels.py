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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, TrackedTriplet, seeded_direction
from spectralnorm.linalg.cuda import is_trusted
from spectralnorm.linalg.tracking import PROBE_LENGTH
from spectralnorm.parametrizations.kept import Kept, Verdict, free_memory
from spectralnorm.parametrizations.quotient import Quotient

if TYPE_CHECKING:
    from spectralnorm.linalg.cuda.quotients import QuotientPlan
    from spectralnorm.linalg.cuda.storing import VectorStore
    from spectralnorm.linalg.cuda.tracking import Tracked, TrackingPlan
    from spectralnorm.parametrizations.engine import Member

__all__ = ["ByKernels", "are_usable", "can_be_read", "refresh_by_kernels"]


def are_usable(device: torch.device) -> bool:
    """Whether weights on ``device`` are renewed by kernels."""
    return device.type == "cuda" and is_trusted(device)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_be_read(member: Member) -> bool:
    """Whether the kernels can do all that is to be done for a weight."""
    normalization, weight, _ = member
    return (
        weight.dtype in _DTYPES
        and len(normalization.views) == 1
        and normalization.geometry is None
        and not normalization.strict
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


class _Plans(NamedTuple):
    """What is remembered of weights in a row.

    Attributes:
        tracking: their matrices.
        quotients: their division.
        store: their buffers.
        prototypes: of each its shape and strides, without memory.
        views: how each is read as a matrix.
    """

    tracking: TrackingPlan
    quotients: QuotientPlan
    store: VectorStore
    prototypes: list[Tensor]
    views: list[MatrixView]


# By addresses and rules: a plan holds no weight, and is right for whatever lies at its addresses in this form.
_plans: OrderedDict[tuple[Any, ...], _Plans] = OrderedDict()
_MOST_PLANS = 16


def _plans_for(members: Sequence[Member]) -> _Plans:
    key = tuple(_identity(member) for member in members)
    plans = _plans.get(key)
    if plans is None:
        plans = _plans[key] = _made_plans(members)
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return plans


def _identity(member: Member) -> tuple[Any, ...]:
    normalization, weight, _ = member
    place = weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()
    return *place, normalization.views[0], normalization.eps, *_rule(member)


def _rule(member: Member) -> tuple[float, bool]:
    normalization = member.normalization
    return normalization.divided_to, normalization.mode == "cap"


def _made_plans(members: Sequence[Member]) -> _Plans:
    # Here, because `import spectralnorm` loads no Triton.
    from spectralnorm.linalg.cuda.storing import VectorStore
    from spectralnorm.linalg.cuda.tracking import TrackingPlan

    weights = [member.weight.detach() for member in members]
    views = [member.normalization.views[0] for member in members]
    matrices = [view.blocks_of_columns(weight) for view, weight in zip(views, weights, strict=True)]
    tracking = TrackingPlan(matrices, [_directions(matrix) for matrix in matrices])
    prototypes = [
        torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta") for weight in weights
    ]
    return _Plans(tracking, _quotients(members), VectorStore(), prototypes, views)


def _directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What a frame on either side is stirred with, as `probe_at` has it."""
    like = torch.empty(0, device=matrix.device)
    rows, columns = matrix.shape[1], matrix[0, 0].numel()
    return PROBE_LENGTH * seeded_direction("probe", rows, like), PROBE_LENGTH * seeded_direction("probe", columns, like)


def _quotients(members: Sequence[Member]) -> QuotientPlan:
    from spectralnorm.linalg.cuda.quotients import QuotientPlan

    weights = [(member.weight.detach(), member.normalization.views[0].out_dim) for member in members]
    coefficients, caps = zip(*map(_rule, members), strict=True)
    return QuotientPlan(weights, coefficients, caps, eps=members[0].normalization.eps)


class ByKernels:
    """What came of one step: a `Followed`, and a `Batch`.

    Attributes:
        us: whole left vectors, for each weight.
        vs: whole right vectors, in torch's order.
        sigmas: the norms, (weights,).
    """

    def __init__(self, plans: _Plans, tracked: Tracked, addresses: list[int], eps: float) -> None:
        self._plans, self._tracked, self._addresses, self._eps = plans, tracked, addresses, eps
        self.us, self.vs, self.sigmas = plans.tracking.whole(tracked, [view.out_dim for view in plans.views])
        self.values: list[Tensor] = []

    @classmethod
    def follow(cls, members: Sequence[Member]) -> ByKernels:
        """One step of power iteration for all."""
        first = members[0].normalization
        ages = [member.kept.age for member in members]
        before = members[0].kept.followed
        if isinstance(before, ByKernels) and before._is_of(members):
            plans, frames, addresses = before._plans, before._tracked, before._addresses
        else:
            plans, frames = _plans_for(members), [member.kept.triplets[0].frame for member in members]
            addresses = [member.weight.data_ptr() for member in members]
        tracked = plans.tracking.track(frames, ages, first.n_power_iterations, eps=first.eps)
        return cls(plans, tracked, addresses, first.eps)

    def _is_of(self, members: Sequence[Member]) -> bool:
        """Whether ``members`` are the very weights that were followed here, in the same memory.

        Whoever changes how a weight is divided gives it another value, which is not followed from here.
        """
        return len(members) == len(self._addresses) and all(
            member.kept.followed is self and member.kept.index == place and member.weight.data_ptr() == address
            for place, (member, address) in enumerate(zip(members, self._addresses, strict=True))
        )

    def divide(self, memory: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each weight divided, into ``memory`` where there is some; the divisors, and whether they depend on sigma."""
        plans = self._plans
        outs = [
            torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.sigmas.device)
            if out is None
            else out
            for out, like in zip(memory, plans.prototypes, strict=True)
        ]
        self.values, divisors, active = plans.quotients.divide(self.sigmas, outs)
        return self.values, divisors, active

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        """Those of a weight's blocks, in the order of the memory."""
        u, v, sigma, frame = self._tracked.triplets[index]
        v = self._plans.views[index].in_memory_order(v, self._plans.prototypes[index])
        return (TrackedTriplet(u, v, sigma, frame),)

    def gradients(self, places: Sequence[int], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `Batch` has it, of any of the weights, in two launches."""
        prototypes = self._plans.prototypes
        return self._plans.quotients.gradients(
            [_laid_out(grad, prototypes[place]) for grad, place in zip(grads, places, strict=True)],
            [self.values[place] for place in places],
            [self.us[place] for place in places],
            [self.vs[place] for place in places],
            self.sigmas,
            places=places,
        )

    @staticmethod
    def can_write(buffers: Sequence[Tensor]) -> bool:
        """Whether `write` can write there."""
        return all(buffer.dtype in _DTYPES and buffer.is_contiguous() for buffer in buffers)

    def write(self, places: Sequence[int], buffers: Sequence[Tensor]) -> None:
        """Write u and v of the weights at ``places``, those that have a norm, into ``buffers``: u, v, u, v, ..."""
        vectors = [vector for place in places for vector in (self.us[place], self.vs[place])]
        owners = [place for place in places for _ in range(2)]
        self._plans.store.copy(vectors, owners, self.sigmas, buffers, eps=self._eps)


def _laid_out(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` with the type and strides of ``like``; the same memory, if only strides of single entries differ."""
    if grad.dtype == like.dtype:
        if grad.stride() == like.stride():
            return grad
        pairs = zip(grad.shape, grad.stride(), like.stride(), strict=True)
        if all(size == 1 or mine == its for size, mine, its in pairs):
            return grad.as_strided(like.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=grad.device).copy_(grad)


def refresh_by_kernels(members: Sequence[Member]) -> None:
    """As `refresh_together`, for weights that the kernels can read, all on one device."""
    followed = ByKernels.follow(members)
    eps = members[0].normalization.eps
    verdict = Verdict(followed.sigmas, eps)
    ages = [member.kept.age + 1 for member in members]
    memory = [free_memory(member.kept)[0] for member in members]
    values, divisors, active = followed.divide(memory)
    parts = zip(members, values, followed.sigmas.unbind(), divisors.unbind(), active.unbind(), ages, strict=True)
    for place, ((normalization, weight, _), value, sigma, divisor, is_active, age) in enumerate(parts):
        quotient = Quotient(
            weight=weight,
            moment=normalization.watched(weight).now(),
            value=value,
            sigma=sigma,
            divisor=divisor,
            active=is_active,
            pairs=((followed.us[place], followed.vs[place]),),
            views=normalization.views,
            flat_v=None,
            coefficient=normalization.divided_to,
            cap=normalization.mode == "cap",
            eps=eps,
            batch=followed,
            place=place,
        )
        normalization.keep(
            Kept(
                moment=quotient.moment,
                quotient=quotient,
                value_version=value._version,
                output=None,
                followed=followed,
                age=age,
                is_in_buffers=False,
                verdict=verdict,
                index=place,
            )
        )
