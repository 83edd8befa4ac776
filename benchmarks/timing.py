"""Milliseconds of several contenders that take turns, by the clock."""

import random
import statistics
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Spread:
    """Milliseconds over the repeats."""

    median: float
    lowest: float
    rounds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, seconds):
        return cls(1e3 * statistics.median(seconds), 1e3 * min(seconds), [1e3 * each for each in seconds])

    def __format__(self, spec):
        return f"{self.median:{spec}} ({self.lowest:{spec}})"

    def over(self, plain):
        """What it takes more, relative: the median of the rounds, in each of which both ran."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, plain.rounds, strict=True)) - 1


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(calls, repeats, device, *, before=None, between=None):
    """Time each of ``calls`` (name to function) ``repeats`` times, once in every round, in an order drawn for it.

    What is in ``before`` and ``between``, by name, is called before and after each; neither is timed.
    """
    times, order, draw = {name: [] for name in calls}, list(calls), random.Random(0)
    for round_number in range(repeats + 3):
        draw.shuffle(order)
        for name in order:
            call = calls[name]
            if before is not None:
                before[name]()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_number >= 3:
                times[name].append(time.perf_counter() - start)
            if between is not None:
                between[name]()
    return {name: Spread.of(seconds) for name, seconds in times.items()}
