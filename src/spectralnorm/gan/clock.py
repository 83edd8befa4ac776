"""The time a training has taken, and the means of what it measures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Clock", "RunningMeans"]


class Clock:
    """Measures training time: runs while the networks are trained, stands still in `paused`.

    Attributes:
        agreed: the time that several processes have agreed on, which is then the time; None where there is one process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elapsed = 0.0
        self._since: float | None = None
        self.agreed: float | None = None

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds."""
        return self.measured if self.agreed is None else self.agreed

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._elapsed = value

    @property
    def measured(self) -> float:
        """The same as this process has measured it."""
        return self._elapsed + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still, once the work already handed to the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        self._elapsed, self._since = self.measured, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work that is not training: metrics, samples, checkpoints."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()


class RunningMeans:
    """Means of scalars over the steps since they were last read, kept on the device so that the loop never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means by name; starts anew. Waits for the device."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
