"""Noticing that a parameter has changed, and whether an optimizer did it.

``Tensor._version`` counts in-place writes, but fused optimizers do not move it and replacing the storage (``.data =``,
`vector_to_parameters`) does not either. So optimizers are listened to through torch's global step hooks, and the
storage is compared beside the version. A write through ``.data`` into the same storage leaves no trace anywhere.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectralnorm.parametrizations.shards import is_distributed, local_part

__all__ = ["WeightClock", "version_of", "watch"]


class WeightClock:
    """Counts the changes of one parameter.

    Attributes:
        weight: the parameter. Held, so that its id cannot be taken by another one while it is watched.
        steps: number of optimizer steps that changed it.
        writes: number of other changes that were seen.
        version: `version_of` it when it was last looked at.
        data_ptr: address of its storage then; of a distributed tensor, of this process's part.
        storage: the same memory, held so that no new storage can come to lie at the same address.
    """

    __slots__ = ("__weakref__", "data_ptr", "steps", "storage", "version", "weight", "writes")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.steps = 0
        self.writes = 0
        self._look()

    def _look(self) -> None:
        self.version = version_of(self.weight)
        memory = local_part(self.weight)
        self.data_ptr = memory.data_ptr()
        self.storage = memory.detach()

    def is_unmoved(self) -> bool:
        """Whether nothing was written since it was last looked at; optimizer steps are counted apart."""
        return version_of(self.weight) == self.version and local_part(self.weight).data_ptr() == self.data_ptr

    def observe(self) -> None:
        """Count a write if there was one. Several writes without a look in between count as one."""
        if not self.is_unmoved():
            self.writes += 1
            self._look()

    def count_step(self, steps_before: int) -> None:
        """Count the step of an optimizer that began when there were ``steps_before``."""
        self.steps = steps_before + 1
        if not self.is_unmoved():
            self._look()


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


# Steps on the clocks when an optimizer's step began. Optimizers can be nested: one that shards its state over processes
# (ZeroRedundancyOptimizer) runs another one for its share of the parameters, and the two together are one step.
_steps_before: WeakKeyDictionary[Optimizer, dict[int, int]] = WeakKeyDictionary()


def _watched(optimizer: Optimizer) -> list[WeightClock]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    found = (_clocks.get(id(parameter)) for parameter in parameters)
    return [clock for clock in found if clock is not None]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step moves `_version`, which is noticed without a hook
        return
    clocks = _watched(optimizer)
    for clock in clocks:
        clock.observe()
    _steps_before[optimizer] = {id(clock): clock.steps for clock in clocks}


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    before = _steps_before.pop(optimizer, {})
    for clock in _watched(optimizer):
        # Optimizers pass over a parameter without a gradient, unless the step made and freed it: then it was written.
        if clock.weight.grad is not None or not clock.is_unmoved():
            clock.count_step(before.get(id(clock), clock.steps))
