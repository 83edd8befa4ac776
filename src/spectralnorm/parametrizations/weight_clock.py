"""Noticing that a parameter has changed, and whether an optimizer did it.

``Tensor._version`` counts in-place writes, but fused optimizers do not move it and replacing the storage (``.data =``,
`vector_to_parameters`) does not either. So optimizers are listened to through torch's global step hooks, and the
storage is compared beside the version. A write through ``.data`` into the same storage leaves no trace anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectralnorm.parametrizations.arithmetic import is_capturing
from spectralnorm.parametrizations.occasions import Occasions
from spectralnorm.parametrizations.shards import is_distributed, local_part

__all__ = ["Moment", "Step", "WeightClock", "all_clocks", "as_one_step", "version_of", "watch"]


class WeightClock:
    """Counts the changes of one parameter.

    Attributes:
        weight: the parameter. Held, so that its id cannot be taken by another one while it is watched.
        steps: number of optimizer steps that changed it.
        writes: number of other changes that were seen. Neither ever goes back.
        before_step: steps and writes when the last step began, which may have had steps and writes in it; None: there
            was none, or something has been written since.
        version: `version_of` it when it was last looked at.
        data_ptr: address of its storage then; of a distributed tensor, of this process's part.
        is_distributed: whether the parameter is a DTensor.
        is_written_by_hand: whether a write that left no trace has been found.
        storage: the same memory, held so that no new storage can come to lie at the same address.
        last_step: the last optimizer step that changed it.
        watchers: weak references to whoever wants to be found through a step, to settle before it what a user has
            written, and to be told of one that is captured.
        num_watches: how many watchers all clocks ever had.
    """

    num_watches: ClassVar[int] = 0

    __slots__ = (
        "__weakref__",
        "before_step",
        "data_ptr",
        "is_distributed",
        "is_written_by_hand",
        "last_step",
        "steps",
        "storage",
        "version",
        "watchers",
        "weight",
        "writes",
    )

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.is_distributed = is_distributed(weight)
        self.is_written_by_hand = False
        self.steps = 0
        self.writes = 0
        self.before_step: tuple[int, int] | None = None
        self.last_step: Step | None = None
        self.watchers: list[ref[Any]] = []
        self._look()

    def _look(self) -> None:
        self.version = version_of(self.weight)
        memory = local_part(self.weight)
        self.data_ptr = memory.data_ptr()
        self.storage = memory.detach()

    def is_unmoved(self) -> bool:
        """Whether nothing was written since it was last looked at; optimizer steps are counted apart."""
        weight = self.weight
        if not self.is_distributed:  # without the calls: it is asked several times for each weight and step
            return weight._version == self.version and weight.data_ptr() == self.data_ptr
        return version_of(weight) == self.version and local_part(weight).data_ptr() == self.data_ptr

    def observe(self) -> None:
        """Count a write if there was one. Several writes without a look in between count as one."""
        if not self.is_unmoved():
            self.writes += 1
            self.before_step = None
            self._look()

    def count_unseen_write(self) -> None:
        """Count a write that has left no trace but in the numbers."""
        self.is_written_by_hand = True
        self.writes += 1
        self.before_step = None

    def count_step(self, step: Step, began: tuple[int, int]) -> None:
        """Count a step of an optimizer that ``began`` when there were so many steps and writes."""
        self.steps += 1
        self.before_step = began
        self.last_step = step
        if not self.is_unmoved():
            self._look()

    def add_watcher(self, watcher: Any) -> None:
        """Let ``watcher`` be found by `stepped_together`, as long as it lives."""
        if not any(found() is watcher for found in self.watchers):
            self.watchers = [found for found in self.watchers if found() is not None]
            self.watchers.append(ref(watcher))
            WeightClock.num_watches += 1

    def stepped_together(self) -> list[tuple[WeightClock, Any]]:
        """All clocks that the last optimizer step of this one moved and none has moved since, with their watchers."""
        step = self.last_step
        if step is None:
            return []
        clocks = (_clocks.get(key) for key in step.parameter_ids)
        moved = (clock for clock in clocks if clock is not None and clock.last_step is step)
        return [(clock, found()) for clock in moved for found in clock.watchers]

    def now(self) -> Moment:
        """The present state of the count, to be compared with a later one."""
        return Moment(self, self.steps, self.writes)


class Moment(NamedTuple):
    """A state of a parameter in time.

    Attributes:
        clock: the parameter's.
        steps: optimizer steps up to then.
        writes: other changes up to then.
    """

    clock: WeightClock
    steps: int
    writes: int

    def is_now(self) -> bool:
        """Whether the parameter has not changed since."""
        clock = self.clock
        return clock.steps == self.steps and clock.writes == self.writes and clock.is_unmoved()

    def is_one_step_ago(self) -> bool:
        """Whether exactly one optimizer step, and nothing else that was seen, has changed the parameter since."""
        return self.clock.before_step == (self.steps, self.writes)


class Step:
    """One call of an optimizer's ``step``; it holds ids alone, because a clock holds it and a parameter."""

    __slots__ = ("parameter_ids",)

    def __init__(self) -> None:
        self.parameter_ids: list[int] = []


def version_of(weight: Tensor) -> int:
    """A number that each write in place makes larger; of a distributed tensor also one into this process's part."""
    return weight._version + local_part(weight)._version if is_distributed(weight) else weight._version


# By id: looked up for every parameter at every optimizer step. Who needs a clock holds it; the clock holds the
# parameter, so an id found here is that parameter's.
_clocks: WeakValueDictionary[int, WeightClock] = WeakValueDictionary()
_is_listening = False


def watch(weight: Tensor) -> WeightClock:
    """The clock of ``weight``, one for all who ask; it runs as long as somebody holds it."""
    global _is_listening
    if not _is_listening:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _is_listening = True
    clock = _clocks.get(id(weight))
    if clock is None:
        clock = _clocks[id(weight)] = WeightClock(weight)
    return clock


def all_clocks() -> list[WeightClock]:
    """Those of all parameters that are watched."""
    return list(_clocks.values())


_Counts = dict[int, tuple[int, int]]
# Steps and writes on the clocks when steps of an optimizer began that are not over. Steps can be nested, and are one
# then: an optimizer that shards its state over processes (ZeroRedundancyOptimizer) runs another one for its share of
# the parameters, and a class whose step calls that of its base has both listened to. A step that raised is never over,
# so the length is limited.
_began: WeakKeyDictionary[Optimizer, deque[_Counts]] = WeakKeyDictionary()
_MOST_NESTED = 8


def _watched(optimizer: Optimizer) -> list[WeightClock]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    found = (_clocks.get(id(parameter)) for parameter in parameters)
    return [clock for clock in found if clock is not None]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _begin_step(optimizer)
    elif _leaves_graph(optimizer):
        _begin_step_uncompiled(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _end_step(optimizer)
    elif _leaves_graph(optimizer):
        _end_step_uncompiled(optimizer)


def _leaves_graph(optimizer: Optimizer) -> bool:
    """Whether a compiled step is more than one graph whatever is done here.

    One of torch's optimizers always is. One of another kind may be a single graph and is left that: it moves
    `_version`, and counts as a write.
    """
    return type(optimizer).__module__.startswith("torch.optim.")


def _begin_step(optimizer: Optimizer) -> None:
    _began.setdefault(optimizer, deque(maxlen=_MOST_NESTED)).append(_observed(_watched(optimizer)))


def _end_step(optimizer: Optimizer) -> None:
    # Optimizers pass over a parameter without a gradient, unless the step made and freed it: then it was written.
    moved = [clock for clock in _watched(optimizer) if clock.weight.grad is not None or not clock.is_unmoved()]
    began = _began.get(optimizer)
    _count_step(moved, began.pop() if began else {})


def _observed(clocks: list[WeightClock]) -> _Counts:
    """What is on the clocks, by their ids, after a look at what was written before."""
    for clock in clocks:
        for found in clock.watchers:
            watcher = found()
            if watcher is not None:
                watcher.settle()
        clock.observe()
    return {id(clock): (clock.steps, clock.writes) for clock in clocks}


def _count_step(moved: list[WeightClock], began: _Counts) -> None:
    step = Step()
    Occasions.num += 1
    for clock in moved:
        clock.count_step(step, began.get(id(clock), (clock.steps, clock.writes)))
        step.parameter_ids.append(id(clock.weight))
        if is_capturing(clock.weight):  # what moves the weight from now on is seen by nobody
            for watcher in [found() for found in clock.watchers]:
                if watcher is not None:
                    watcher.was_stepped_in_graph()


_begin_step_uncompiled = torch._disable_dynamo(_begin_step)  # type: ignore[attr-defined]
_end_step_uncompiled = torch._disable_dynamo(_end_step)  # type: ignore[attr-defined]


@contextmanager
def as_one_step(weights: Iterable[Tensor]) -> Iterator[None]:
    """Count whatever is done to ``weights`` within, by optimizers too, as one step of an optimizer.

    One that is given several times, because layers share it, is one weight.
    """
    clocks = [watch(weight) for weight in {id(weight): weight for weight in weights}.values()]
    began = _observed(clocks)
    try:
        yield
    finally:
        _count_step(clocks, began)
