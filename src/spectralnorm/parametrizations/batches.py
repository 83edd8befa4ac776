"""Weights renewed together in torch's operations: sorted into batches of matrices of one shape, and followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import Frame, TrackedTriplet, compute_dtype, probe_rows, seeded_direction, track_together
from spectralnorm.parametrizations.arithmetic import host_has
from spectralnorm.parametrizations.kept import Member

__all__ = ["SMALL", "Batch", "Pairs", "Together", "probe_at", "wholes"]

# Matrices up to this many entries are copied into one batch if their shapes are equal: below it the calls cost more
# than the work. Larger ones stay where they are.
SMALL = 2**16

Pairs = tuple[tuple[Tensor, Tensor], ...]


def wholes(
    members: Sequence[tuple[Any, ...]], triplets: Sequence[Sequence[TrackedTriplet]]
) -> tuple[Tensor, list[Pairs]]:
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


class Batch(NamedTuple):
    """Matrices of one shape that go through the products together.

    Attributes:
        parts: for each weight its (blocks, out, in).
        places: for each weight its place among the members.
        blocks: matrices per weight.
        is_stack: whether the weights are these matrices, in the same order in memory, and known to the host.
        age: refreshes since the frames were computed anew.
    """

    parts: list[Tensor]
    places: list[int]
    blocks: int
    is_stack: bool
    age: int

    def matrices(self) -> Tensor:
        """(batch, out, in)."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class Together:
    """Weights that are followed together, and what came of it; next time the same ones need no sorting.

    Attributes:
        batches: of the weights.
        frames: of each batch, to start from.
        found: of each batch, after `follow`.
        addresses: of the weights' memory; None where the batches hold copies.
    """

    def __init__(self, batches: list[Batch], frames: list[Frame], addresses: list[int] | None, size: int) -> None:
        self.batches, self.frames, self.addresses, self.size = batches, frames, addresses, size
        self.found: list[TrackedTriplet] = []
        self._matrices: list[Tensor] = []
        # For each weight, view by view: which batch it is in, and where.
        self._where: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for number, batch in enumerate(batches):
            for slot, place in enumerate(batch.places):
                self._where[place].append((number, slot))

    @classmethod
    def of(cls, members: Sequence[Member]) -> Together:
        """Sort the matrices of the weights into batches."""
        groups: dict[tuple[Any, ...], list[tuple[int, Tensor, Frame]]] = {}
        stacks: set[tuple[Any, ...]] = set()
        are_views = True
        for place, (normalization, weight, kept) in enumerate(members):
            detached = weight.detach()
            for number, (view, triplet) in enumerate(zip(normalization.views, kept.triplets, strict=True)):
                matrices = view.memory_blocks(detached)
                matrices = matrices.to(compute_dtype(matrices.dtype))
                are_views &= matrices.data_ptr() == weight.data_ptr()
                is_small = matrices.numel() <= SMALL
                is_plain = detached.is_contiguous() and view.is_dense_in(detached) and len(normalization.views) == 1
                is_left = triplet.frame.is_left
                key = (number, kept.age, matrices.shape, weight.shape, weight.dtype, is_plain, is_left)
                key = key if is_small else (number, kept.age, place)
                groups.setdefault(key, []).append((place, matrices, triplet.frame))
                if is_small and is_plain and matrices.dtype == weight.dtype and host_has(weight.device):
                    stacks.add(key)
        batches, frames = [], []
        # The triplets of a weight's views are collected in the order of the batches: first views first.
        for key in sorted(groups, key=lambda key: key[0]):
            places, parts, of_weights = (list(each) for each in zip(*groups[key], strict=True))
            batches.append(Batch(parts, places, len(parts[0]), key in stacks and len(parts) > 1, key[1]))
            rows = [frame.rows for frame in of_weights]
            frames.append(Frame(rows[0] if len(rows) == 1 else torch.cat(rows), of_weights[0].is_left))
        addresses = [member.weight.data_ptr() for member in members] if are_views else None
        return cls(batches, frames, addresses, len(members))

    def is_of(self, members: Sequence[Member]) -> bool:
        """Whether ``members`` are the very weights that were followed here, in the same memory."""
        return (
            self.addresses is not None
            and len(members) == self.size
            and all(
                member.kept.followed is self and member.kept.index == place and member.weight.data_ptr() == address
                for place, (member, address) in enumerate(zip(members, self.addresses, strict=True))
            )
        )

    def again(self) -> Together:
        """The same weights, to be followed from where they are now."""
        batches = [batch._replace(age=batch.age + 1) for batch in self.batches]
        return Together(batches, [found.frame for found in self.found], self.addresses, self.size)

    def follow(self, num_iterations: int, eps: float) -> None:
        """One step of power iteration for all."""
        probes = [probe_at(frame, batch.age) for frame, batch in zip(self.frames, self.batches, strict=True)]
        self._matrices = [batch.matrices() for batch in self.batches]
        self.found = track_together(self._matrices, self.frames, probes, num_iterations, eps=eps)
        self.frames = []

    def take_matrices(self) -> list[Tensor]:
        """Of each batch (batch, out, in), after `follow`; once, because copies of the weights are not kept."""
        matrices, self._matrices = self._matrices, []
        return matrices

    def triplets_of(self, index: int) -> tuple[TrackedTriplet, ...]:
        """For each view of a weight the triplets of its blocks."""
        triplets = []
        for number, slot in self._where[index]:
            blocks, (u, v, sigma, (rows, is_left)) = self.batches[number].blocks, self.found[number]
            its = slice(slot * blocks, (slot + 1) * blocks)
            triplets.append(TrackedTriplet(u[its], v[its], sigma[its], Frame(rows[its], is_left)))
        return tuple(triplets)

    def flat_v_of(self, index: int) -> Tensor:
        """v of the first block of a weight's first view, in memory order."""
        number, slot = self._where[index][0]
        return self.found[number].v[slot * self.batches[number].blocks]

    def wholes(self, members: Sequence[Member]) -> tuple[Tensor, list[Pairs]]:
        """The norms of the weights, one tensor for all, and the whole vectors of their views."""
        if len(self.batches) == 1 and self.batches[0].is_stack:
            u, v, sigma, _ = self.found[0]
            return sigma, [(pair,) for pair in zip(u.unbind(), v.unbind(), strict=True)]
        return wholes(members, [self.triplets_of(index) for index in range(self.size)])


_probes: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def probe_at(frame: Frame, age: int) -> Tensor:
    """What a frame is stirred with at its age: rolled, it is another direction each time, without random numbers."""
    rows = frame.rows
    key = (rows.shape[-2], rows.shape[-1], rows.dtype, rows.device)
    probe = _probes.get(key)
    if probe is None:
        probe = _probes[key] = probe_rows(seeded_direction("probe", rows.shape[-1], rows), rows.shape[-2])
    return probe.roll(age, dims=-1)
