"""Which weights a GPU goes through together, so that it still has them in its cache when it reads them again."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["groups_of"]

_CACHE_BYTES = 24 * 2**20  # about half of the second-level cache of an A100 or H100
_MOST_GROUPS = 3  # each makes launches of its own


def groups_of(sizes: Sequence[int]) -> list[range]:
    """Consecutive weights that fit a cache together, but no more than three groups.

    Args:
        sizes: bytes of each.

    Returns:
        The places of each group's weights. All are one group if they fit; if they would be more than three, the groups
        are larger, and about equal.
    """
    most = max(_CACHE_BYTES, sum(sizes) / _MOST_GROUPS)
    starts, held = [0], 0
    for place, size in enumerate(sizes):
        # A weight goes where most of it lies.
        if place > starts[-1] and held + size / 2 > most and len(starts) < _MOST_GROUPS:
            starts.append(place)
            held = 0
        held += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
