"""All normalized weights that an optimizer step has moved, renewed together at the first use of one of them.

Which weights belong together is not declared: the optimizer tells, because its step hook says which parameters moved.
So layers that were normalized one by one, or in several models that share an optimizer, are renewed in one go as well.

Only weights that can be followed come here: one optimizer step away from a value that is kept. Everything else is
renewed alone and anew (`spectralnorm.linalg.refine`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectralnorm.linalg import TrackedTriplet, compute_dtype
from spectralnorm.parametrizations.arithmetic import host_has, plain_arithmetic
from spectralnorm.parametrizations.batches import SMALL, Batch, Pairs, Together, wholes
from spectralnorm.parametrizations.by_kernels import (
    ByKernels,
    quotient_by_kernels,
    refresh_by_kernels,
)
from spectralnorm.parametrizations.kept import (
    Alone,
    Kept,
    Member,
    Outputs,
    Rounded,
    Verdict,
    free_memory,
)
from spectralnorm.parametrizations.map_norm import MapNorm
from spectralnorm.parametrizations.plans import can_be_read, can_write
from spectralnorm.parametrizations.promise import (
    Divisor,
    Promise,
    bounded_value,
    promise_of,
    promises_of,
    shorter_vectors,
)
from spectralnorm.parametrizations.quotient import (
    CastWeight,
    NormalizedWeights,
    Quotient,
    Stack,
    divided,
    divisor_of,
    host_divisor_of,
)
from spectralnorm.parametrizations.vector_buffers import REFINED_RTOL

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = [
    "Member",
    "divisors_of",
    "follow_closely",
    "forget_nodes",
    "keep_triplets",
    "output_for_use",
    "refresh_together",
    "rounded_for_autocast",
    "rounded_output_for_use",
    "stepped_together",
    "write_buffers",
]

# Of weights that have moved little, before a norm that still changes is found anew.
_MOST_STEPS = 6
# Weights up to this many entries share one node of the graph. Larger ones have nodes of their own, so that each one's
# gradient is there as early as it can be (DistributedDataParallel sends it while the backward goes on).
_SMALL = SMALL
# As many entries of a weight that shares a node if kernels on the CPU divide it and nobody waits for its gradient: a
# call costs as much as a hundred thousand entries, and the gradients that wait for the last one are still in a cache.
_MODERATE = 2**21


def stepped_together(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> list[Member]:
    """The weights that can be followed from before the last step to now, ``weight`` among them."""
    clock = kept.moment.clock
    if isinstance(kept.followed, ByKernels):
        members = kept.followed.stepped_together(clock.last_step)
        if members is not None:
            return members
    members = [Member(normalization, weight, kept)]
    options = (normalization.n_power_iterations, normalization.eps, weight.device, compute_dtype(weight.dtype))
    for mate_clock, mate in clock.stepped_together():
        if mate is None or mate is normalization:
            continue
        mate_kept = mate.kept_to_follow(mate_clock)
        if mate_kept is not None:
            mate_weight = mate_clock.weight
            dtype = compute_dtype(mate_weight.dtype)
            if (mate.n_power_iterations, mate.eps, mate_weight.device, dtype) == options:
                members.append(Member(mate, mate_weight, mate_kept))
    return members


def refresh_together(members: Sequence[Member], *, into_buffers: bool = False) -> None:
    """Give each member a new kept value, by power iteration from its frames.

    Args:
        members: they have one device, type of arithmetic, ``n_power_iterations`` and ``eps``.
        into_buffers: whether to write u and v into the buffers of those in training mode as well, where that is sooner
            done now than by `write_buffers`.
    """
    for member in members:
        member.kept.forget_graphs()
        member.kept.looks.forget_initialization()  # what is trained is initialized
    before = members[0].kept.followed
    by_kernels, others = [], []
    if isinstance(before, ByKernels) and before.is_of(members):
        by_kernels = members
    else:
        for member in members:
            (by_kernels if can_be_read(member.normalization, member.weight) else others).append(member)
    try:
        if by_kernels:
            refresh_by_kernels(by_kernels, into_buffers=into_buffers)
        if others:
            _refresh(others)
    except BaseException:
        # What was kept may have been given away for the new values, which are not all there.
        for member in members:
            member.normalization.forget()
        raise


def follow_closely(members: Sequence[Member]) -> None:
    """As `refresh_together`, until each norm is as accurate as one that is found anew.

    Of one that is not after a few steps nothing is kept any more.
    """
    sigmas, have_converged = [math.nan] * len(members), [False] * len(members)
    nums_of_copy = [member.kept.looks.num_of_copy for member in members]
    for _ in range(_MOST_STEPS):
        refresh_together(members)
        members = [member._replace(kept=member.normalization._kept) for member in members]
        before, sigmas = sigmas, [member.kept.sigma_on_host() for member in members]
        have_converged = [abs(new - old) <= 0.1 * REFINED_RTOL * new for new, old in zip(sigmas, before, strict=True)]
        if all(have_converged):
            break
    for member, has_converged, num_of_copy in zip(members, have_converged, nums_of_copy, strict=True):
        if has_converged:
            member.kept.is_exact = True
            member.kept.looks.begin(member.kept.moment.clock)
            member.kept.go_on_expecting(num_of_copy)
        else:
            member.normalization.forget()


def _refresh(members: Sequence[Member]) -> None:
    """In torch's operations."""
    before = members[0].kept.followed
    together = before.again() if isinstance(before, Together) and before.is_of(members) else Together.of(members)
    first = members[0].normalization
    together.follow(first.n_power_iterations, first.eps)
    sigmas, pairs = together.wholes(members)
    maps = {
        place: member.normalization.followed_map(member.weight)
        for place, member in enumerate(members)
        if member.normalization.follows_map
    }
    if maps:
        sigmas = torch.stack([maps[place].sigma if place in maps else each for place, each in enumerate(sigmas)])
    verdict = Verdict(sigmas, first.eps)
    divisors = divisors_of([member.normalization for member in members], sigmas, verdict)
    quotients: list[Quotient | None] = [None] * len(members)
    all_matrices = together.take_matrices()
    promises = promises_of(members, together, all_matrices)
    for place, promise in promises.items():
        divisors[place] = promise.divisor
    for batch, matrices, found in zip(together.batches, all_matrices, together.found, strict=True):
        if batch.is_stack and all(divisors[place][1] is True and place not in maps for place in batch.places):
            stacked = _stacked(batch, matrices, found, members, divisors, pairs, promises)
            for place, quotient in zip(batch.places, stacked, strict=True):
                quotients[place] = quotient
    for place, member in enumerate(members):
        quotient = quotients[place]
        if quotient is None:
            memory, gradient_memory = free_memory(member.kept)
            flat_v = together.flat_v_of(place)
            quotient = _quotient(
                member.normalization,
                member.weight,
                flat_v,
                sigmas[place],
                pairs[place],
                divisors[place],
                memory,
                promises.get(place),
                maps[place].direction if place in maps else None,
            )
            quotient.gradient_memory = gradient_memory
        member.normalization.keep(
            Kept.of(quotient, together, verdict, place, age=member.kept.age + 1, looks=member.kept.looks)
        )


def keep_triplets(
    normalization: SpectralNorm,
    weight: Tensor,
    triplets: Sequence[TrackedTriplet],
    *,
    age: int,
    is_exact: bool,
    upper: Tensor | None = None,
    found_map: MapNorm | None = None,
) -> None:
    """Keep the value that follows from singular triplets of one watched weight.

    Args:
        normalization: of the weight.
        weight: raw.
        triplets: for each view those of its blocks: u of (blocks, out), v of (blocks, in) in the order of
            `MatrixView.memory_matrix`, sigma of (blocks,).
        age: refreshes since the frames were computed anew.
        is_exact: as in `Kept`.
        upper: of a strict one the upper bound of its norm, where it is known already.
        found_map: the same of the norm of its map, where that is followed.
    """
    sigmas, pairs = wholes([(normalization, weight)], [triplets])
    direction = None
    if normalization.follows_map:
        sigma, direction = normalization.refined_map(weight) if found_map is None else found_map
        sigmas = sigma.reshape(1)
    verdict = Verdict(sigmas, normalization.eps)
    promise = None
    if normalization.strict:
        leading = shorter_vectors(triplets[0].u, triplets[0].v)
        upper = normalization.upper_bound(weight, leading, is_followed=True) if upper is None else upper
        promise = promise_of(normalization, weight, upper, leading)
    if can_be_read(normalization, weight):
        quotient = quotient_by_kernels(normalization, weight, sigmas, pairs[0][0], promise)
    else:
        (divisor,) = divisors_of([normalization], sigmas, verdict)
        divisor = divisor if promise is None else promise.divisor
        quotient = _quotient(
            normalization, weight, triplets[0].v[0], sigmas[0], pairs[0], divisor, None, promise, direction
        )
    kept = Kept.of(quotient, Alone(tuple(triplets)), verdict, 0, age=age)
    kept.is_exact = is_exact
    if normalization._kept is not None:
        kept.go_on_expecting(normalization._kept.looks.num_of_copy)
    normalization.keep(kept)


def rounded_for_autocast(normalization: SpectralNorm, kept: Kept, weight: Tensor, dtype: torch.dtype) -> Rounded:
    """What is kept of a weight for uses under autocast to ``dtype``."""
    if kept.rounded is None or kept.rounded.dtype != dtype:
        with plain_arithmetic(weight):
            if normalization.strict:
                kept.rounded = _rounded_strict(normalization, kept, weight.detach(), dtype)
            elif not isinstance(kept.followed, ByKernels) or not kept.followed.round(dtype):
                value = kept.value.to(dtype)
                kept.rounded = Rounded(dtype, value, value._version)
    assert kept.rounded is not None
    return kept.rounded


def _rounded_strict(normalization: SpectralNorm, kept: Kept, weight: Tensor, dtype: torch.dtype) -> Rounded:
    before, triplet = kept.quotient, kept.triplets[0]
    assert before.upper is not None
    leading = shorter_vectors(triplet.u, triplet.v)
    value, divisor, active = bounded_value(normalization, weight, before.upper, leading, dtype)
    if host_has(weight.device):
        divisor, active = float(divisor), bool(active)
    else:
        divisor = divisor.to(compute_dtype(weight.dtype).to_real())
    quotient = replace(before, value=value, divisor=divisor, active=active, batch=None, place=0, gradient_memory=None)
    return Rounded(dtype, value, value._version, quotient)


def rounded_output_for_use(normalization: SpectralNorm, kept: Kept, rounded: Rounded, weight: Tensor) -> Tensor:
    """What is used under autocast in the graph, for one use."""
    if rounded.outputs is not None:
        if rounded.outputs.is_used_up():
            _connect(normalization, kept, weight, rounded.dtype)
        return rounded.outputs.take()
    if rounded.output is None:
        if rounded.quotient is not None:
            rounded.output, _ = NormalizedWeights.apply([rounded.quotient], weight)
        else:
            rounded.output = CastWeight.apply(output_for_use(normalization, kept, weight), rounded.value)
    assert rounded.output is not None
    return rounded.output[...]


def divisors_of(normalizations: Sequence[SpectralNorm], sigmas: Tensor, verdict: Verdict) -> list[Divisor]:
    """What each weight is divided by, and whether that depends on its norm."""
    if verdict.is_immediate and verdict.sigmas is not None:
        return [
            host_divisor_of(sigma, each.divided_to, cap=each.mode == "cap", eps=each.eps)
            for each, sigma in zip(normalizations, verdict.sigmas, strict=True)
        ]
    return [
        divisor_of(sigma, each.divided_to, cap=each.mode == "cap", eps=each.eps)
        for each, sigma in zip(normalizations, sigmas.unbind(), strict=True)
    ]


def _quotient(
    normalization: SpectralNorm,
    weight: Tensor,
    flat_v: Tensor,
    sigma: Tensor,
    pairs: Pairs,
    divisor: Divisor,
    memory: Tensor | None,
    promise: Promise | None,
    direction: Tensor | None,
) -> Quotient:
    """One weight divided, into ``memory`` if that may be overwritten."""
    detached = weight.detach()
    is_dense = normalization.views[0].is_dense_in(detached) and not detached.is_complex()
    return Quotient(
        weight=weight,
        moment=normalization.watched(weight).now(),
        value=divided(detached, divisor[0], memory) if promise is None or promise.value is None else promise.value,
        sigma=sigma,
        divisor=divisor[0],
        active=divisor[1],
        pairs=pairs,
        views=normalization.views,
        flat_v=flat_v if is_dense and direction is None else None,
        coefficient=normalization.divided_to,
        cap=normalization.mode == "cap",
        eps=normalization.eps,
        upper=None if promise is None else promise.upper,
        direction=direction,
    )


def _stacked(
    batch: Batch,
    matrices: Tensor,
    found: TrackedTriplet,
    members: Sequence[Member],
    divisors: Sequence[Divisor],
    pairs: Sequence[Pairs],
    promises: dict[int, Promise],
) -> list[Quotient]:
    """The weights of a batch divided together."""
    numbers = found.sigma.new_tensor([divisors[place][0] for place in batch.places])
    values = matrices / numbers[:, None, None]
    stack = Stack(values, found.u, found.v, found.sigma, numbers)
    shape = members[batch.places[0]].weight.shape
    parts = zip(batch.places, values.view(-1, *shape).unbind(), found.sigma.unbind(), strict=True)
    quotients = []
    for index, (place, value, sigma) in enumerate(parts):
        normalization, weight, kept = members[place]
        divisor, active = divisors[place]
        quotients.append(
            Quotient(
                weight=weight,
                moment=kept.moment.clock.now(),
                value=value.data,  # with a version of its own: a write into one is not one into the others
                sigma=sigma,
                divisor=divisor,
                active=active,
                pairs=pairs[place],
                views=normalization.views,
                flat_v=pairs[place][0][1],
                coefficient=normalization.divided_to,
                cap=normalization.mode == "cap",
                eps=normalization.eps,
                upper=promises[place].upper if place in promises else None,
                batch=stack,
                place=index,
            )
        )
    return quotients


def output_for_use(normalization: SpectralNorm, kept: Kept, weight: Tensor) -> Tensor:
    """The value in the graph, for one use."""
    outputs = kept.outputs
    if outputs.is_used_up():
        _connect(normalization, kept, weight)
    return outputs.take()


def _outputs_of(kept: Kept, dtype: torch.dtype) -> Outputs | None:
    """Those of the value that was rounded to ``dtype`` together with others."""
    rounded = kept.rounded
    return None if rounded is None or rounded.dtype != dtype else rounded.outputs


def _connect(normalization: SpectralNorm, kept: Kept, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """Make the node of the graph for a kept value, rounded to ``dtype`` or not, and for the small ones with it."""
    joined, most = [(kept, weight)], _most_in_shared_node(kept)
    if weight.numel() <= most and not _has_hooks(weight):
        joined = []
        for _, mate in _renewed_with(normalization, kept):
            its, outputs = mate.moment.clock.weight, mate.outputs if dtype is None else _outputs_of(mate, dtype)
            is_wanting = outputs is not None and outputs.is_used_up() and its.requires_grad and its.numel() <= most
            if mate is kept or (is_wanting and not _has_hooks(its)):
                joined.append((mate, its))
    kepts = [each for each, _ in joined]
    followed = kept.followed
    if isinstance(followed, ByKernels):
        quotients = followed.some(kepts, are_rounded=dtype is not None)
    else:
        quotients = [each.quotient for each in kepts]
    outputs = NormalizedWeights.apply(quotients, *[each for _, each in joined])
    for each, first, second in zip(kepts, outputs, outputs[len(kepts) :], strict=False):
        of_each = each.outputs if dtype is None else _outputs_of(each, dtype)
        assert of_each is not None
        of_each.add([first, second])


def _has_hooks(weight: Tensor) -> bool:
    """Whether somebody waits for the weight's gradient: a shared node calls him also where a backward brings none."""
    return bool(weight._backward_hooks) or bool(weight._post_accumulate_grad_hooks)


def _renewed_with(normalization: SpectralNorm, kept: Kept) -> list[tuple[SpectralNorm, Kept]]:
    """All whose value was computed with that of ``normalization``, itself included, and is still kept."""
    if isinstance(kept.followed, ByKernels):
        return kept.followed.current()
    mates = [mate for _, mate in kept.moment.clock.stepped_together() if mate is not None and mate is not normalization]
    kepts = [(mate, mate._kept) for mate in mates if mate._kept is not None and mate._kept.verdict is kept.verdict]
    return [(normalization, kept), *kepts]


def _most_in_shared_node(kept: Kept) -> float:
    """Entries of a weight up to which its node is one with those of others."""
    if not isinstance(kept.followed, ByKernels) or _sends_gradients():
        return _SMALL
    return math.inf if kept.followed.is_for_one_node else _MODERATE


def _sends_gradients() -> bool:
    """Whether other processes may wait for a gradient while the backward goes on."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def forget_nodes(normalization: SpectralNorm, kept: Kept) -> None:
    """Let go of the nodes of all that were renewed together, before a graph is captured.

    They hold the nodes that add up the weights' gradients, on the stream where these were made: another one than that
    of the capture, which must not wait for it.
    """
    for _, mate in _renewed_with(normalization, kept):
        mate.forget_nodes()


def write_buffers(normalization: SpectralNorm, kept: Kept) -> None:
    """Write u and v into the buffers, also those of the weights that were renewed together with this one."""
    together = [
        (mate, its_kept)
        for mate, its_kept in _renewed_with(normalization, kept)
        if mate is normalization or (mate.training and not its_kept.is_in_buffers and its_kept.moment.is_now())
    ]
    for _, its_kept in together:
        its_kept.is_in_buffers = True
    buffers = [buffer for each, _ in together for buffer in each.buffers_of_views()]
    if isinstance(kept.followed, ByKernels) and can_write(buffers):
        return kept.followed.write([its_kept.index for _, its_kept in together], buffers)
    vectors = [vector for each, its_kept in together for vector in its_kept.vectors_for(each.buffers_of_views())]
    with torch.no_grad():
        torch._foreach_copy_(buffers, vectors)  # type: ignore[reportPrivateImportUsage]
