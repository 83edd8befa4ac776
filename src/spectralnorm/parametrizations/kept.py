"""What is kept of a normalized weight between two changes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralnorm.parametrizations.weight_clock import WeightClock, watch

__all__ = ["Kept", "Verdict"]


class Verdict:
    """Whether a norm could be computed, known to the host without making it wait.

    On the CPU the norm is read at once. A GPU is still busy with what was queued: the number travels behind it into
    pinned memory and is looked at when it is next needed, a training step later. Until it has come it counts as good.
    """

    __slots__ = ("_arrived", "_sigma", "eps")

    def __init__(self, sigma: Tensor, eps: float) -> None:
        self.eps = eps
        self._arrived: torch.cuda.Event | None = None
        self._sigma: Tensor | None = None
        if sigma.device.type == "cpu":
            self._sigma = sigma
        elif sigma.device.type == "cuda":
            self._sigma = torch.empty((), dtype=sigma.dtype, pin_memory=True)
            self._sigma.copy_(sigma, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(sigma.device))

    def is_bad(self) -> bool:
        """Whether the norm is known to be zero or not finite."""
        if self._sigma is None or (self._arrived is not None and not self._arrived.query()):
            return False
        return not self.eps < float(self._sigma) < math.inf


@dataclass(slots=True)
class Kept:
    """The value of a normalized weight, and what the next one starts from.

    Attributes:
        clock: tells whether the weight has changed since.
        steps: optimizer steps on the clock when the value was computed.
        writes: other changes on the clock then.
        value: the normalized weight; never written again by us, because old graphs hold it.
        value_version: its version, by which a write of the user's into it is noticed.
        sigma: the weight's norm, a scalar.
        u: whole left vector in torch's shape.
        v: whole right vector in torch's shape and order.
        frame: directions around the left vectors of the blocks, to go on from.
        probe: what the frame is stirred with, rolled by ``age``.
        age: refreshes by power iteration since the frame was computed anew.
        is_in_buffers: whether the buffers hold u and v.
        verdict: whether there was a norm at all.
    """

    clock: WeightClock
    steps: int
    writes: int
    value: Tensor
    value_version: int
    sigma: Tensor
    u: Tensor
    v: Tensor
    frame: Tensor
    probe: Tensor
    age: int
    is_in_buffers: bool
    verdict: Verdict

    def is_current(self, weight: Tensor) -> bool:
        """Whether the value is still that of ``weight``. Called at every use."""
        clock = self.clock
        return (
            clock.weight is weight
            and clock.steps == self.steps
            and clock.writes == self.writes
            and weight._version == clock.version
            and weight.data_ptr() == clock.data_ptr
            and self.value._version == self.value_version
        )

    def was_written_to(self) -> bool:
        """Whether somebody wrote into the tensor that was handed out, as ``nn.init.normal_(layer.weight)`` does."""
        return self.value._version != self.value_version

    def is_one_step_old(self, weight: Tensor) -> bool:
        """Whether exactly one optimizer step, and nothing else, has changed the weight since."""
        clock = self.clock
        return (
            clock.weight is weight
            and clock.steps == self.steps + 1
            and clock.writes == self.writes
            and not self.verdict.is_bad()
        )

    def write_vectors(self, u: Tensor, v: Tensor) -> None:
        """Write the vectors into ``u`` and ``v``, once; not those of a weight that has no norm."""
        self.is_in_buffers = True
        if self.verdict.is_bad():
            return
        with torch.no_grad():
            if self.sigma.device.type == "cpu":
                u.copy_(self.u)
                v.copy_(self.v)
            else:  # whether there is a norm may not be known yet
                usable = (self.sigma > self.verdict.eps) & (self.sigma < math.inf)
                u.copy_(torch.where(usable, self.u, u))
                v.copy_(torch.where(usable, self.v, v))

    def for_copy(self, weight: Tensor) -> Kept:
        """The same for a copy of the weight, sharing nothing that can be written to."""
        clock = watch(weight)
        value = self.value.clone()
        return Kept(
            clock=clock,
            steps=clock.steps,
            writes=clock.writes,
            value=value,
            value_version=value._version,
            sigma=self.sigma,
            u=self.u,
            v=self.v,
            frame=self.frame,
            probe=self.probe,
            age=self.age,
            is_in_buffers=self.is_in_buffers,
            verdict=self.verdict,
        )
