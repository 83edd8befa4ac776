"""Writes through ``.data``, which move no version: noticed by the numbers, where that costs little."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralnorm.linalg.layout import is_dense
from spectralnorm.parametrizations.arithmetic import is_eager
from spectralnorm.parametrizations.weight_clock import WeightClock

__all__ = ["Sample", "is_same", "may_be_compared"]

_SAMPLED = 256  # entries
# Steps after which what stays the same is compared at the latest, by the kind of device; a GPU is waited for.
_LONGEST_WAIT = {"cpu": 1, "else": 64}


def may_be_compared(tensor: Tensor) -> bool:
    """Whether what is done next may depend on the numbers of ``tensor``: nothing traces or records it."""
    return is_eager(tensor) and torch._C._len_torch_dispatch_stack() == 0


@torch.no_grad()
def is_same(tensor: Tensor, copy: Tensor) -> bool:
    """Whether all numbers are equal."""
    # The first takes a fraction of the time, and is enough where no number is NaN.
    return torch.equal(tensor, copy) or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)


class Sample:
    """Some entries of a weight that no optimizer has moved, as of an average of another network or a target network.

    Code that keeps such a network up to date often writes through ``.data``, while the other one is trained. So they
    are compared at the first use after a step of any optimizer, and not at all while nothing is trained. A GPU has to
    be waited for: there what stays the same is compared after two steps then, after four, and at last after every 64.
    """

    __slots__ = ("_entries", "_num_steps", "_wait")

    def __init__(self, entries: Tensor) -> None:
        self._entries, self._num_steps, self._wait = entries, WeightClock.num_steps, 1

    @classmethod
    def of(cls, weight: Tensor) -> Sample | None:
        """Of a weight; None: of one whose entries do not lie side by side in memory."""
        return cls(_some_entries(weight).clone()) if is_dense(weight) else None

    def is_still_of(self, clock: WeightClock) -> bool:
        """Whether the clock's weight has these entries, as far as is known; if not, the clock has counted a write."""
        weight = clock.weight
        if WeightClock.num_steps - self._num_steps < self._wait or not may_be_compared(weight):
            return True
        self._num_steps = WeightClock.num_steps
        if not is_same(_some_entries(weight), self._entries):
            clock.count_unseen_write()
            return False
        longest = _LONGEST_WAIT.get(weight.device.type, _LONGEST_WAIT["else"])
        self._wait = min(2 * self._wait, longest)
        return True


def _some_entries(weight: Tensor) -> Tensor:
    """At equal distances in memory, the first among them."""
    step = math.ceil(weight.numel() / _SAMPLED)
    return weight.detach().as_strided((math.ceil(weight.numel() / step),), (step,))
