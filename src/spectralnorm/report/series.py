"""Long curves in little memory: rows are merged into buckets that keep their mean and their extremes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Curves", "Digest", "thin"]


@dataclass
class Digest:
    """What is told of one curve in numbers; only finite values count."""

    first: float
    last: float
    low: float
    high: float
    count: int = 0
    num_not_finite: int = 0


@dataclass
class _Bucket:
    """Some neighbouring rows: the abscissae of the last one, and count, sum, least and greatest value of each curve."""

    step: int
    images_seen: int
    seconds: float
    parts: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)


class Curves:
    """Curves over the same rows, at most ``limit`` points each however many rows are added.

    All curves share their abscissae. A point stands for a run of neighbouring rows and keeps their mean, least and
    greatest value, so that no spike is lost; while there are at most ``limit`` rows, every row is a point of its own.

    Args:
        limit: most points of a curve; at least 2.
    """

    def __init__(self, limit: int = 600) -> None:
        self._limit = limit
        self._rows_per_bucket = 1
        self._buckets: list[_Bucket] = []
        self._rows: list[tuple[int, int, float, Mapping[str, float]]] = []
        self._digests: dict[str, Digest] = {}

    def add(self, *, step: int, images_seen: int, seconds: float, values: Mapping[str, float]) -> None:
        """Add one row; a curve may be absent from some rows."""
        self._rows.append((step, images_seen, seconds, values))
        if len(self._rows) < self._rows_per_bucket:
            return
        self._close_bucket()
        if len(self._buckets) > self._limit:
            self._buckets = [_merged(pair) for pair in _in_pairs(self._buckets)]
            self._rows_per_bucket *= 2

    def names(self, prefix: str = "") -> list[str]:
        """Names of the curves that begin with ``prefix``, in order of appearance."""
        self._close_bucket()
        return [name for name in self._digests if name.startswith(prefix)]

    def digest(self, name: str) -> Digest:
        """The numbers of one curve, over all of its rows."""
        self._close_bucket()
        return self._digests[name]

    def abscissae(self) -> dict[str, list[int] | list[float]]:
        """``step``, ``images`` and ``seconds`` of the points of every curve."""
        self._close_bucket()
        return {
            "step": [bucket.step for bucket in self._buckets],
            "images": [bucket.images_seen for bucket in self._buckets],
            "seconds": [_rounded(bucket.seconds) for bucket in self._buckets],
        }

    def ordinates(self, name: str) -> dict[str, list[float | None]]:
        """``y``: the mean of each point, None where the curve has no finite value; ``low`` and ``high`` its extremes.

        The extremes are left out where each point is one row.
        """
        self._close_bucket()
        parts = [bucket.parts.get(name) for bucket in self._buckets]
        curve = {"y": [None if part is None else _rounded(part[1] / part[0]) for part in parts]}
        if any(part is not None and part[0] > 1 for part in parts):
            curve["low"] = [None if part is None else _rounded(part[2]) for part in parts]
            curve["high"] = [None if part is None else _rounded(part[3]) for part in parts]
        return curve

    def _close_bucket(self) -> None:
        if not self._rows:
            return
        columns: dict[str, list[float]] = defaultdict(list)
        for *_, values in self._rows:
            for name, value in values.items():
                columns[name].append(value)
        step, images_seen, seconds, _ = self._rows[-1]
        bucket = _Bucket(step, images_seen, seconds)
        for name, column in columns.items():
            finite = [value for value in column if math.isfinite(value)]
            if finite:
                bucket.parts[name] = (len(finite), math.fsum(finite), min(finite), max(finite))
            self._digest(name, finite, num_not_finite=len(column) - len(finite))
        self._buckets.append(bucket)
        self._rows = []

    def _digest(self, name: str, finite: Sequence[float], *, num_not_finite: int) -> None:
        digest = self._digests.setdefault(name, Digest(math.nan, math.nan, math.inf, -math.inf))
        digest.num_not_finite += num_not_finite
        if finite:
            digest.first = finite[0] if digest.count == 0 else digest.first
            digest.last = finite[-1]
            digest.low = min(digest.low, min(finite))
            digest.high = max(digest.high, max(finite))
            digest.count += len(finite)


def thin(num: int, *, limit: int) -> list[int]:
    """Indices of at most ``limit`` of ``num`` things, evenly spread, with the first and the last.

    >>> thin(10, limit=4)
    [0, 3, 6, 9]
    >>> thin(3, limit=4)
    [0, 1, 2]
    """
    if num <= limit:
        return list(range(num))
    return [round(index * (num - 1) / (limit - 1)) for index in range(limit)]


def _in_pairs(buckets: Sequence[_Bucket]) -> Iterator[Sequence[_Bucket]]:
    return (buckets[start : start + 2] for start in range(0, len(buckets), 2))


def _merged(buckets: Sequence[_Bucket]) -> _Bucket:
    last = buckets[-1]
    names: Iterable[str] = dict.fromkeys(name for bucket in buckets for name in bucket.parts)
    merged = _Bucket(last.step, last.images_seen, last.seconds)
    for name in names:
        counts, sums, lows, highs = zip(*(b.parts[name] for b in buckets if name in b.parts), strict=True)
        merged.parts[name] = (sum(counts), math.fsum(sums), min(lows), max(highs))
    return merged


def _rounded(value: float) -> float:
    # Five digits are more than a screen can show, and a third of the size.
    return float(f"{value:.5g}")
