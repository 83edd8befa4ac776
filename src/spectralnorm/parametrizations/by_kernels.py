"""Weights renewed together by kernels of our own: what is called does not grow with the number of layers.

What the engine does in torch's operations, weight by weight or shape by shape, is done here for all weights of a step
at once. On a GPU seven launches of Triton kernels find the norms and vectors, one divides, one writes the buffers, and
the backward is two; on a CPU it is one call each of kernels in C. The numbers are those of the engine but for rounding.

Only what the kernels can read comes here: one matrix or its diagonal blocks, float32 (on a GPU a half type as well), no
gaps in memory, divided by its own estimated norm. All else goes the engine's way, beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, TrackedTriplet, cpu, cuda, seeded_direction
from spectralnorm.linalg.layout import is_dense, layout_of
from spectralnorm.linalg.tracking import PROBE_LENGTH
from spectralnorm.parametrizations.kept import Kept, Verdict, free_memory, host_has
from spectralnorm.parametrizations.quotient import Quotient, is_held_once
from spectralnorm.parametrizations.weight_clock import Moment

if TYPE_CHECKING:
    from spectralnorm.parametrizations.engine import Member
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["ByKernels", "are_usable", "can_be_read", "quotient_by_kernels", "refresh_by_kernels"]


_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def are_usable(weight: Tensor) -> bool:
    """Whether weights of that type, one of those that kernels read, and device are renewed by them."""
    return cpu.is_trusted() if host_has(weight.device) else cuda.is_trusted(weight.device, weight.dtype)


def can_be_read(normalization: SpectralNorm, weight: Tensor) -> bool:
    """Whether the kernels are to do all that is to be done for a weight."""
    return (
        weight.dtype in _DTYPES.get(weight.device.type, ())
        and len(normalization.views) == 1
        and normalization.geometry is None
        and not normalization.strict
        and are_usable(weight)
        and _has_layout(normalization.views[0], weight.shape, weight.stride(), host_has(weight.device))
    )


@lru_cache(maxsize=4096)
def _has_layout(view: MatrixView, shape: torch.Size, stride: tuple[int, ...], is_on_cpu: bool) -> bool:
    weight = torch.empty_strided(shape, stride, device="meta")
    try:
        layout = layout_of(view.blocks_of_columns(weight))
        if is_on_cpu:
            cpu.form_of(layout)
            cpu.form_of(layout_of(weight.movedim(view.out_dim, 0).unsqueeze(0)))
    except ValueError:
        return False
    return is_dense(weight)


class _Kernels(NamedTuple):
    """Those of a kind of device: classes of the same names, used alike.

    Attributes:
        are_of_host: whether they run on the CPU: they divide a weight while they have it in the cache, read numbers
            without waiting, and cost little more when they are called for each weight.
    """

    TrackingPlan: Any
    QuotientPlan: Any
    VectorStore: Any
    are_of_host: bool


def _kernels_for(device: torch.device) -> _Kernels:
    if host_has(device):
        return _Kernels(cpu.TrackingPlan, cpu.QuotientPlan, cpu.VectorStore, True)
    # Here, because `import spectralnorm` loads no Triton.
    from spectralnorm.linalg.cuda.quotients import QuotientPlan
    from spectralnorm.linalg.cuda.storing import VectorStore
    from spectralnorm.linalg.cuda.tracking import TrackingPlan

    return _Kernels(TrackingPlan, QuotientPlan, VectorStore, False)


_Weights = Sequence[tuple["SpectralNorm", Tensor]]


class _Plans:
    """What is remembered of weights in a row.

    Attributes:
        device: of the weights.
        kernels: that do the work.
        prototypes: of each its shape, strides and type, without memory.
        views: how each is read as a matrix.
        quotients: their division.
        store: their buffers.
    """

    def __init__(self, weights: _Weights) -> None:
        self.device = weights[0][1].device
        self.kernels = _kernels_for(self.device)
        self.prototypes = [
            torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
            for _, weight in weights
        ]
        self.views = [normalization.views[0] for normalization, _ in weights]
        rows = [(weight.detach(), view.out_dim) for (_, weight), view in zip(weights, self.views, strict=True)]
        coefficients, caps = zip(*(_rule(normalization) for normalization, _ in weights), strict=True)
        self.quotients = self.kernels.QuotientPlan(rows, coefficients, caps, eps=weights[0][0].eps)
        self.store = self.kernels.VectorStore()
        self._tracking: Any = None

    def tracking(self, weights: _Weights) -> Any:
        """The plan of the weights' matrices, for the same weights as these were made for."""
        if self._tracking is None:
            parts = zip(self.views, weights, strict=True)
            matrices = [view.blocks_of_columns(weight.detach()) for view, (_, weight) in parts]
            self._tracking = self.kernels.TrackingPlan(matrices, [_directions(matrix) for matrix in matrices])
        return self._tracking

    def outs(self, memory: Sequence[Tensor | None]) -> list[Tensor]:
        """Where to write quotients: into ``memory`` where it fits."""
        return [
            out
            if out is not None and out.stride() == like.stride() and out.data_ptr() % 16 == 0
            else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)
            for out, like in zip(memory, self.prototypes, strict=True)
        ]


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
    like = torch.empty(0, dtype=torch.float32, device=matrix.device)
    rows, columns = matrix.shape[1], matrix[0, 0].numel()
    return PROBE_LENGTH * seeded_direction("probe", rows, like), PROBE_LENGTH * seeded_direction("probe", columns, like)


class _Division:
    """Weights divided by norms that are known: a `Batch`."""

    def __init__(self, plans: _Plans, sigmas: Tensor) -> None:
        self.plans, self.sigmas = plans, sigmas

    def gradients(self, quotients: Sequence[Quotient], grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """As `Batch` has it, of any of the weights."""
        places = [quotient.place for quotient in quotients]
        prototypes = [self.plans.prototypes[place] for place in places]
        outs, options = None, {}
        if self.plans.kernels.are_of_host:
            outs = [_memory_of(each.gradient_memory, like) for each, like in zip(quotients, prototypes, strict=True)]
            # Two are added up on the way; the sum of more takes a pass of its own.
            grads = _summed(grads, most=2)
            options["more_grads"] = [
                _laid_out(of_one[1], like) if len(of_one) == 2 else None
                for of_one, like in zip(grads, prototypes, strict=True)
            ]
        else:
            grads = _summed(grads, most=1)
        results = self.plans.quotients.gradients(
            [_laid_out(of_one[0], like) for of_one, like in zip(grads, prototypes, strict=True)],
            [quotient.value for quotient in quotients],
            [quotient.pairs[0][0] for quotient in quotients],
            [quotient.pairs[0][1] for quotient in quotients],
            self.sigmas,
            outs,
            places=places,
            are_checked=True,
            **options,
        )
        if outs is None:
            return results
        for quotient, result in zip(quotients, results, strict=True):
            quotient.gradient_memory = result
        return [result.detach() for result in results]

    def quotients(
        self, weights: _Weights, moments: Sequence[Moment], pairs: Sequence[tuple[Tensor, Tensor]], divided: Any
    ) -> list[Quotient]:
        """What is kept of weights that were ``divided``, with their whole vectors u and v."""
        values, divisors, active = divided
        if self.plans.kernels.are_of_host:
            divisors, active = divisors.tolist(), active.tolist()
        else:
            divisors, active = divisors.unbind(), active.unbind()
        parts = zip(weights, moments, values, self.sigmas.unbind(), divisors, active, pairs, strict=True)
        return [
            Quotient(
                weight=weight,
                moment=moment,
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
            for place, ((normalization, weight), moment, value, sigma, divisor, is_active, pair) in enumerate(parts)
        ]


def _memory_of(last: Tensor | None, like: Tensor) -> Tensor:
    """For a gradient on the CPU that of the last one, if nobody else holds it.

    New memory costs as much as the arithmetic, because the system clears it.
    """
    if last is not None and last.shape == like.shape and last.stride() == like.stride() and is_held_once(last):
        return last
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")


class ByKernels:
    """What came of one step of several weights: a `Followed`.

    Attributes:
        us: whole left vectors, for each weight.
        vs: whole right vectors, in torch's order.
        sigmas: the norms, (weights,).
    """

    def __init__(self, plans: _Plans, tracking: Any, tracked: Any, addresses: list[int]) -> None:
        self._plans, self._tracking, self._tracked, self._addresses = plans, tracking, tracked, addresses
        self.us, self.vs, self.sigmas = tracking.whole(tracked, [view.out_dim for view in plans.views])

    @classmethod
    def renewed(cls, members: Sequence[Member], memory: Sequence[Tensor | None]) -> tuple[ByKernels, Any]:
        """One step of power iteration for all, and the division by the norms, into ``memory`` where it fits."""
        first = members[0].normalization
        ages = [member.kept.age for member in members]
        before = members[0].kept.followed
        if isinstance(before, ByKernels) and before.is_of(members):
            plans, tracking, addresses, frames = before._plans, before._tracking, before._addresses, before._tracked
        else:
            weights = _weights_of(members)
            plans = _plans_for(weights)
            tracking, addresses = plans.tracking(weights), [weight.data_ptr() for _, weight in weights]
            frames = [member.kept.triplets[0].frame for member in members]
        outs, options = plans.outs(memory), (frames, ages, first.n_power_iterations)
        if plans.kernels.are_of_host:
            division = plans.quotients.prepared(outs, are_checked=True)
            followed = cls(plans, tracking, tracking.track(*options, eps=first.eps, division=division), addresses)
            return followed, (outs, division.divisors, division.active.view(torch.bool))
        followed = cls(plans, tracking, tracking.track(*options, eps=first.eps), addresses)
        return followed, plans.quotients.divide(followed.sigmas, outs)

    @property
    def is_for_one_node(self) -> bool:
        """Whether the gradients of all weights should be asked for at once."""
        return not self._plans.kernels.are_of_host

    def is_of(self, members: Sequence[Member]) -> bool:
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
        dtypes = _DTYPES[buffers[0].device.type]
        return all(buffer.dtype in dtypes and buffer.is_contiguous() for buffer in buffers)

    def write(self, places: Sequence[int], buffers: Sequence[Tensor], eps: float) -> None:
        """Write u and v of the weights at ``places``, those that have a norm, into ``buffers``: u, v, u, v, ..."""
        vectors = [vector for place in places for vector in (self.us[place], self.vs[place])]
        owners = [place for place in places for _ in range(2)]
        self._plans.store.copy(vectors, owners, self.sigmas, buffers, eps=eps, are_checked=True)


def _weights_of(members: Sequence[Member]) -> _Weights:
    return [(member.normalization, member.weight) for member in members]


def _summed(grads: Sequence[Sequence[Tensor]], most: int) -> Sequence[Sequence[Tensor]]:
    """The same with at most ``most`` terms for each."""
    if all(len(of_one) <= most for of_one in grads):
        return grads
    places = [place for place, of_one in enumerate(grads) if len(of_one) > most]
    last_two = zip(*(grads[place][-2:] for place in places), strict=True)
    sums = torch._foreach_add(*map(list, last_two))  # type: ignore[reportPrivateImportUsage]
    fewer = list(grads)
    for place, each in zip(places, sums, strict=True):
        fewer[place] = [*grads[place][:-2], each]
    return _summed(fewer, most)


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
    plans = _plans_for(weights)
    divided = plans.quotients.divide(sigma, plans.outs([None]))
    moments = [normalization.watched(weight).now()]
    (quotient,) = _Division(plans, sigma).quotients(weights, moments, [pair], divided)
    return quotient


def refresh_by_kernels(members: Sequence[Member]) -> None:
    """As `refresh_together`, for weights that the kernels can read, all on one device."""
    ages = [member.kept.age + 1 for member in members]
    moments = [member.kept.moment.clock.now() for member in members]
    memory = [free_memory(member.kept) for member in members]
    followed, divided = ByKernels.renewed(members, [value for value, _ in memory])
    verdict = Verdict(followed.sigmas, members[0].normalization.eps)
    pairs = list(zip(followed.us, followed.vs, strict=True))
    quotients = followed.division().quotients(_weights_of(members), moments, pairs, divided)
    for place, (member, quotient, age, (_, gradient)) in enumerate(zip(members, quotients, ages, memory, strict=True)):
        quotient.gradient_memory = gradient
        member.normalization.keep(Kept.of(quotient, followed, verdict, place, age=age))
