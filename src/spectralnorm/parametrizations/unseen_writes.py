"""Writes through ``.data``, which move no version: when numbers are compared to find them, so that it costs little.

A kept value is compared with the weight that it was divided from. That does not tell which of the two was written, so
the value of a new layer, which may be initialized, is compared with a copy of itself as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralnorm.parametrizations.arithmetic import host_has
from spectralnorm.parametrizations.occasions import Occasions
from spectralnorm.parametrizations.same_numbers import is_same, may_be_compared
from spectralnorm.parametrizations.weight_clock import WeightClock

__all__ = ["Looks"]

# On a GPU: comparisons at every occasion, of a new value and of one that has long been trained.
_NUM_AT_FIRST, _NUM_AGAIN = 8, 2
_LONGEST_WAIT = 256  # occasions
_MOST_WAITS = 8  # of the longest, before what is trained is compared again
# How often a new value is compared with a copy of it. An initialization reads a weight a few times.
_MOST_OF_COPY = 32


class Looks:
    """When a kept value is looked at. Of this nothing depends that a model computes.

    Attributes:
        last: the number of `Occasions` when the value was last compared with the weight; -1: compare it now.
        num_of_copy: how often it is still to be compared with a copy of itself, because it is of a new layer.
    """

    __slots__ = ("_began", "_copy", "_num", "_wait", "last", "num_of_copy")

    def __init__(self, clock: WeightClock) -> None:
        """Of a value that is right now."""
        self._copy: Tensor | None = None
        self.num_of_copy = 0
        self.begin(clock)

    @classmethod
    def never(cls, clock: WeightClock) -> Looks:
        """None, whatever happens."""
        looks = cls(clock)
        looks._wait = math.inf
        return looks

    # The value and the weight

    def begin(self, clock: WeightClock) -> None:
        """Look as often as at a value that has just been found."""
        self._wait, self._began, self._num = _first_wait(clock), Occasions.num, 0
        self.value_is_new()

    def value_is_new(self) -> None:
        """The value has just been computed, after a step of an optimizer perhaps as many before."""
        if self._wait > 1 and Occasions.num - self._began >= _MOST_WAITS * _LONGEST_WAIT:
            self._wait, self._began, self._num = 1, Occasions.num, _NUM_AT_FIRST - _NUM_AGAIN
        self.last = Occasions.num if self._wait else -1

    def soon(self) -> None:
        """Compare at the next use."""
        if self._wait < math.inf:
            self.last, self._wait = -1, 0

    def are_due(self, weight: Tensor) -> bool:
        """Whether to compare now, at a use."""
        Occasions.count_use()
        return Occasions.num - self.last >= self._wait and may_be_compared(weight)

    def found_nothing(self, clock: WeightClock) -> None:
        """Wait for the next time.

        A GPU has to be waited for. There what has never been found written by hand is compared at the first occasions,
        and then half as often each time. What an optimizer trains has a new value before the next time is there, and is
        compared no more until long after.
        """
        self._num += 1
        first = _first_wait(clock)
        is_quick = host_has(clock.weight.device) or clock.is_written_by_hand or self._num < _NUM_AT_FIRST
        self._wait = first if is_quick else min(max(2 * self._wait, first), _LONGEST_WAIT)
        self.last = Occasions.num if self._wait else -1

    # The value and a copy of it

    def expect_initialization(self, value: Tensor, num_of_copy: int = _MOST_OF_COPY) -> None:
        """Let so many looks at ``value`` find what is written into it through ``.data``."""
        self.num_of_copy, self._copy = num_of_copy, value.clone() if num_of_copy else None

    def forget_initialization(self) -> None:
        """Expect none any more."""
        self.num_of_copy, self._copy = 0, None

    def find_initialization(self, value: Tensor) -> bool:
        """Whether ``value`` was written unseen, by one more look. From then on it is a write as any other."""
        copy = self._copy
        if copy is None or not may_be_compared(value):
            return False
        self.num_of_copy -= 1
        has_changed = not is_same(value, copy)
        if has_changed:
            torch.autograd.graph.increment_version(value)
        if has_changed or self.num_of_copy <= 0:
            self.forget_initialization()
        return has_changed


def _first_wait(clock: WeightClock) -> float:
    """How many occasions to wait for before a new value is compared with the weight; 0: compare it at every use.

    On the CPU none is left out, and a weight that has once been found written by hand is compared whether there was one
    or not.
    """
    return 0 if clock.is_written_by_hand and host_has(clock.weight.device) else 1
