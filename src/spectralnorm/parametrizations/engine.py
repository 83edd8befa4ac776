"""All normalized weights that an optimizer step has moved, renewed together at the first use of one of them.

Which weights belong together is not declared: the optimizer tells, because its step hook says which parameters moved.
So layers that were normalized one by one, or in several models that share an optimizer, are renewed in one go as well.

Only weights that can be followed come here: one optimizer step away from a value that is kept. Everything else is
renewed alone and anew (`spectralnorm.linalg.refine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from spectralnorm.linalg import Frame, TrackedTriplet, compute_dtype, probe_rows, seeded_direction, track_together
from spectralnorm.parametrizations.kept import Kept, Verdict, host_has
from spectralnorm.parametrizations.quotient import (
    NormalizedWeights,
    Quotient,
    Stack,
    divided,
    divisor_of,
    host_divisor_of,
    is_held_once,
)

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = [
    "Member",
    "connect",
    "divisors_of",
    "keep_triplets",
    "probe_at",
    "refresh_together",
    "stepped_together",
    "wholes",
    "write_buffers",
]

# Matrices up to this many entries are copied into one batch if their shapes are equal, and share one node of the graph:
# below it the calls cost more than the work. Larger ones stay where they are and have nodes of their own, so that each
# one's gradient is there as early as it can be (DistributedDataParallel sends it while the backward goes on).
_SMALL = 2**16


class Member(NamedTuple):
    """A weight to be renewed from what was kept of it."""

    normalization: SpectralNorm
    weight: Tensor
    kept: Kept


def stepped_together(normalization: SpectralNorm, weight: Tensor, kept: Kept) -> list[Member]:
    """The weights that can be followed from before the last step to now, ``weight`` among them and first."""
    members = [Member(normalization, weight, kept)]
    clock = kept.moment.clock
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


def refresh_together(members: Sequence[Member]) -> None:
    """Give each member a new kept value, by power iteration from its frames.

    The members have one device, type of arithmetic, ``n_power_iterations`` and ``eps``.
    """
    # Old graphs of ours end here; only those of the user still hold old values.
    for member in members:
        member.kept.output = None
    first = members[0].normalization
    batches = _batches(members)
    found = track_together(
        [batch.matrices for batch in batches],
        [batch.frame for batch in batches],
        [batch.probe for batch in batches],
        first.n_power_iterations,
        eps=first.eps,
    )
    triplets: list[list[TrackedTriplet]] = [[] for _ in members]
    for batch, of_batch in zip(batches, found, strict=True):
        for place, triplet in zip(batch.places, _taken_apart(batch, of_batch), strict=True):
            triplets[place].append(triplet)
    sigmas, pairs = wholes(members, triplets)
    verdict = Verdict(sigmas, first.eps)
    divisors = divisors_of([member.normalization for member in members], sigmas, verdict)
    quotients: list[Quotient | None] = [None] * len(members)
    for batch, of_batch in zip(batches, found, strict=True):
        if batch.is_stack and all(active is True for _, active in (divisors[place] for place in batch.places)):
            for place, quotient in zip(batch.places, _stacked(batch, of_batch, members, divisors), strict=True):
                quotients[place] = quotient
    for place, (member, of_member) in enumerate(zip(members, triplets, strict=True)):
        quotient = quotients[place]
        if quotient is None:
            memory, gradient_memory = _free_memory(member.kept)
            quotient = _quotient(
                member.normalization, member.weight, of_member, sigmas[place], pairs[place], divisors[place], memory
            )
            quotient.gradient_memory = gradient_memory
        member.normalization.keep(
            Kept(
                moment=quotient.moment,
                quotient=quotient,
                value_version=quotient.value._version,
                output=None,
                triplets=tuple(of_member),
                age=member.kept.age + 1,
                is_in_buffers=False,
                verdict=verdict,
                index=place,
            )
        )


def keep_triplets(normalization: SpectralNorm, weight: Tensor, triplets: Sequence[TrackedTriplet], *, age: int) -> None:
    """Keep the value that follows from singular triplets of one watched weight.

    Args:
        normalization: of the weight.
        weight: raw.
        triplets: for each view those of its blocks: u of (blocks, out), v of (blocks, in) in the order of
            `MatrixView.memory_matrix`, sigma of (blocks,).
        age: refreshes since the frames were computed anew.
    """
    sigmas, pairs = wholes([(normalization, weight)], [triplets])
    verdict = Verdict(sigmas, normalization.eps)
    (divisor,) = divisors_of([normalization], sigmas, verdict)
    quotient = _quotient(normalization, weight, triplets, sigmas[0], pairs[0], divisor, None)
    normalization.keep(
        Kept(
            moment=quotient.moment,
            quotient=quotient,
            value_version=quotient.value._version,
            output=None,
            triplets=tuple(triplets),
            age=age,
            is_in_buffers=False,
            verdict=verdict,
            index=0,
        )
    )


_Divisor = tuple["float | Tensor", "bool | Tensor"]
_Pairs = tuple[tuple[Tensor, Tensor], ...]


def wholes(
    members: Sequence[tuple[Any, ...]], triplets: Sequence[Sequence[TrackedTriplet]]
) -> tuple[Tensor, list[_Pairs]]:
    """The norms of weights, one tensor for all, and the whole vectors of their views."""
    sigmas, pairs = [], []
    for (normalization, weight, *_), of_weight in zip(members, triplets, strict=True):
        wholes = [
            view.whole_vectors(triplet.u, triplet.v, triplet.sigma, weight)
            for view, triplet in zip(normalization.views, of_weight, strict=True)
        ]
        sigmas.append(wholes[0][2] if len(wholes) == 1 else torch.stack([sigma for *_, sigma in wholes]).mean(0))
        pairs.append(tuple((u, v) for u, v, _ in wholes))
    return sigmas[0].reshape(1) if len(sigmas) == 1 else torch.stack(sigmas), pairs


def divisors_of(normalizations: Sequence[SpectralNorm], sigmas: Tensor, verdict: Verdict) -> list[_Divisor]:
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
    triplets: Sequence[TrackedTriplet],
    sigma: Tensor,
    pairs: _Pairs,
    divisor: _Divisor,
    memory: Tensor | None,
) -> Quotient:
    """One weight divided, into ``memory`` if that may be overwritten."""
    detached = weight.detach()
    is_dense = normalization.views[0].is_dense_in(detached) and not detached.is_complex()
    return Quotient(
        weight=weight,
        moment=normalization.watched(weight).now(),
        value=divided(detached, divisor[0], memory),
        sigma=sigma,
        divisor=divisor[0],
        active=divisor[1],
        pairs=pairs,
        views=normalization.views,
        flat_v=triplets[0].v[0] if is_dense else None,
        coefficient=normalization.divided_to,
        cap=normalization.mode == "cap",
        eps=normalization.eps,
    )


def _stacked(
    batch: _Batch, found: TrackedTriplet, members: Sequence[Member], divisors: Sequence[_Divisor]
) -> list[Quotient]:
    """The weights of a batch divided together."""
    numbers = torch.tensor([divisors[place][0] for place in batch.places], dtype=found.sigma.dtype)
    values = batch.matrices / numbers[:, None, None]
    stack = Stack(values, found.u, found.v, found.sigma, numbers)
    shape = members[batch.places[0]].weight.shape
    parts = zip(
        batch.places,
        values.view(-1, *shape).unbind(),
        found.sigma.unbind(),
        found.u.unbind(),
        found.v.unbind(),
        strict=True,
    )
    quotients = []
    for index, (place, value, sigma, u, v) in enumerate(parts):
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
                pairs=((u, v),),
                views=normalization.views,
                flat_v=v,
                coefficient=normalization.divided_to,
                cap=normalization.mode == "cap",
                eps=normalization.eps,
                stack=stack,
                place=index,
            )
        )
    return quotients


def connect(normalization: SpectralNorm, kept: Kept, weight: Tensor) -> Tensor:
    """Make the node of the graph for a kept value, and for the small ones renewed with it."""
    joined = [(kept, weight)]
    if weight.numel() <= _SMALL:
        for clock, mate in kept.moment.clock.stepped_together():
            if mate is None or mate is normalization or clock.weight.numel() > _SMALL:
                continue
            mate_kept = mate.kept_to_connect(clock.weight)
            if mate_kept is not None and mate_kept.verdict is kept.verdict:
                joined.append((mate_kept, clock.weight))
    outputs = NormalizedWeights.apply([each.quotient for each, _ in joined], *(each for _, each in joined))
    for (each, _), output in zip(joined, outputs, strict=True):
        each.output = output
    return outputs[0]


@torch.no_grad()
def write_buffers(normalization: SpectralNorm, kept: Kept) -> None:
    """Write u and v into the buffers, also those of the weights that were renewed together with this one."""
    together = [(normalization, kept)]
    for _, mate in kept.moment.clock.stepped_together():
        if mate is None or mate is normalization or not mate.training:
            continue
        mate_kept = mate.kept_if_unwritten()
        if mate_kept is not None and mate_kept.verdict is kept.verdict:
            together.append((mate, mate_kept))
    buffers, vectors = [], []
    for each, its_kept in together:
        its_kept.is_in_buffers = True
        its_buffers = each.buffers_of_views()
        buffers += its_buffers
        vectors += its_kept.vectors_for(its_buffers)
    torch._foreach_copy_(buffers, vectors)  # type: ignore[reportPrivateImportUsage]


class _Batch(NamedTuple):
    """Matrices of one shape that go through the products together.

    Attributes:
        matrices: (batch, out, in).
        frame: of rows (batch, k, out or in).
        probe: (k, out or in).
        places: for each weight in the batch its place among the members.
        blocks: matrices per weight.
        is_stack: whether the weights are these matrices, in the same order in memory, and known to the host.
    """

    matrices: Tensor
    frame: Frame
    probe: Tensor
    places: list[int]
    blocks: int
    is_stack: bool


def _batches(members: Sequence[Member]) -> list[_Batch]:
    groups: dict[tuple[Any, ...], list[tuple[int, Tensor, Frame]]] = {}
    ages: dict[tuple[Any, ...], int] = {}
    plain: set[tuple[Any, ...]] = set()
    for place, (normalization, weight, kept) in enumerate(members):
        detached = weight.detach()
        for number, (view, triplet) in enumerate(zip(normalization.views, kept.triplets, strict=True)):
            frame = triplet.frame
            matrices = view.memory_blocks(detached)
            matrices = matrices.to(compute_dtype(matrices.dtype))
            is_small = matrices.numel() <= _SMALL
            is_plain = detached.is_contiguous() and view.is_dense_in(detached) and len(normalization.views) == 1
            key = (matrices.shape, weight.shape, weight.dtype, is_plain, kept.age, frame.is_left, number)
            key = key if is_small else (place, number)
            groups.setdefault(key, []).append((place, matrices, frame))
            ages[key] = kept.age
            if is_small and is_plain and matrices.dtype == weight.dtype and host_has(weight.device):
                plain.add(key)
    # The triplets of a weight's views are collected in the order of the batches: first views first.
    return [_batch(groups[key], ages[key], key in plain) for key in sorted(groups, key=lambda key: key[-1])]


def _batch(group: list[tuple[int, Tensor, Frame]], age: int, is_plain: bool) -> _Batch:
    _, matrices, frame = group[0]
    blocks = matrices.shape[0]
    if len(group) > 1:
        matrices = torch.cat([each for _, each, _ in group])
        frame = Frame(torch.cat([each.rows for _, _, each in group]), frame.is_left)
    places = [place for place, *_ in group]
    return _Batch(matrices, frame, probe_at(frame, age), places, blocks, is_plain and len(group) > 1)


def _taken_apart(batch: _Batch, found: TrackedTriplet) -> list[TrackedTriplet]:
    """The triplets of each weight of a batch."""
    if len(batch.places) == 1:
        return [found]
    u, v, sigma, rows = (part.split(batch.blocks) for part in (*found[:3], found.frame.rows))
    frames = [Frame(each, found.frame.is_left) for each in rows]
    return [TrackedTriplet(*parts) for parts in zip(u, v, sigma, frames, strict=True)]


_probes: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def probe_at(frame: Frame, age: int) -> Tensor:
    """What a frame is stirred with at its age: rolled, it is another direction each time, without random numbers."""
    rows = frame.rows
    key = (rows.shape[-2], rows.shape[-1], rows.dtype, rows.device)
    probe = _probes.get(key)
    if probe is None:
        probe = _probes[key] = probe_rows(seeded_direction("probe", rows.shape[-1], rows), rows.shape[-2])
    return probe.roll(age, dims=-1)


def _free_memory(kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """The memory of an old value, if nobody else holds it (no graph of the user's, no tensor), and of its gradient."""
    value, gradient, quotient = kept.value, kept.quotient.gradient_memory, ref(kept.quotient)
    kept.quotient = None  # type: ignore[assignment]
    # A graph may hold the tensor itself, and not only its memory.
    is_free = quotient() is None and is_held_once(value)
    return value if is_free else None, gradient
