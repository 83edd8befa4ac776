"""How kernels write u and v of many weights into the buffers of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from spectralnorm.linalg.cpu.tables import for_one_call
from spectralnorm.parametrizations.division import Division
from spectralnorm.parametrizations.kept import Member
from spectralnorm.parametrizations.plans import can_write

__all__ = ["KnownBuffers", "write_vectors"]


def write_vectors(division: Division, tracking: Any, places: Sequence[int], buffers: Sequence[Tensor]) -> None:
    """Write u and v of the weights at ``places`` of a division, those that have a norm, into ``buffers``.

    Args:
        division: with the norms, and where the vectors are.
        tracking: the plan by which they were found.
        places: of some weights or of all.
        buffers: u, v, u, v, ...
    """
    plans, ends = division.plans, division.ends
    if ends is not None and len(places) == len(plans.views):
        sizes, owners = tracking.vector_sizes, tracking.vector_owners
        return plans.store.copy_from(ends, sizes, owners, division.sigmas, buffers, eps=plans.eps)
    owners = [place for place in places for _ in range(2)]
    vectors = [vector for place in places for vector in division.pairs[place]]
    plans.store.copy(vectors, owners, division.sigmas, buffers, eps=plans.eps)


class KnownBuffers:
    """The buffers of weights of one view each, all in training mode, and where these are in memory."""

    def __init__(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        # Weak, as a `ByKernels` holds its members.
        self._buffers = [(ref(u), ref(v), u.data_ptr(), v.data_ptr()) for u, v in buffers]
        self.addresses = for_one_call([address for _, _, *both in self._buffers for address in both])

    @classmethod
    def of(cls, members: Sequence[Member]) -> KnownBuffers | None:
        """Those of ``members``; None if one is not in training mode, or the kernels cannot write to one."""
        buffers = [normalization.buffers_of_views() for normalization, _, _ in members if normalization.training]
        if len(buffers) < len(members) or not can_write([each for both in buffers for each in both]):
            return None
        return cls([(u, v) for u, v in buffers])

    def are_of(self, members: Sequence[Member]) -> bool:
        """Whether they are still those of ``members``, at the same addresses."""
        for (normalization, _, _), (known_u, known_v, of_u, of_v) in zip(members, self._buffers, strict=True):
            buffers, u, v = normalization._buffers, known_u(), known_v()
            if (
                not normalization.training
                or u is None
                or v is None
                or buffers["_u"] is not u
                or buffers["_v"] is not v
                or u.data_ptr() != of_u
                or v.data_ptr() != of_v
            ):
                return False
        return True
