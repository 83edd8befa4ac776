"""Weights that are worked on together, so that they are still in the cache when they are read again."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["groups_of"]

_BYTES = 24 * 2**20
_MOST = 3


def groups_of(sizes: Sequence[int]) -> list[range]:
    """Runs of consecutive weights that together fit the second-level cache.

    Args:
        sizes: of the weights, in bytes.

    Returns:
        For each run its weights' numbers; at most three, of which the last takes what is left.
    """
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        if index > starts[-1] and total + size > _BYTES and len(starts) < _MOST:
            starts.append(index)
            total = 0
        total += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
