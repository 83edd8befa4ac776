"""CUDA graphs for tests: real ones on a GPU, and on a CPU what they do.

A graph repeats operations and launches with the memory that they had when they were captured. That is done here by
hand: each is written down, and done again into the same memory. What was allocated in the capture is filled with NaN
before each replay, so that nothing can be carried in it from one to the next.
"""

import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import spectralnorm as sn
from spectralnorm.linalg.cuda import quotients, storing
from spectralnorm.linalg.cuda import tracking as kernels_of_tracking
from spectralnorm.parametrizations import arithmetic, captured

__all__ = ["Graph", "capture", "warm_up"]


class Graph:
    """What was captured."""

    def __init__(self) -> None:
        self.kernels: list[str] = []  # that were launched, of ours; not known of a real graph

    def replay(self) -> None:
        """Do it once more."""
        raise NotImplementedError


def capture(step: Callable[[], Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """A graph of one call of ``step``, which has been called before. On a CPU the call takes effect, as a replay."""
    return _OfDevice(step) if device.type == "cuda" else _ByHand(step, monkeypatch)


def warm_up(step: Callable[[], Any], number: int, device: torch.device) -> None:
    """Calls before a capture, on a stream of their own where there are streams."""
    if device.type != "cuda":
        for _ in range(number):
            step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(number):
            step()
    torch.cuda.current_stream().wait_stream(stream)


class _OfDevice(Graph):
    def __init__(self, step: Callable[[], Any]) -> None:
        super().__init__()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            step()
        self._graph.replay()

    def replay(self) -> None:
        self._graph.replay()


class _ByHand(Graph):
    _numbers = count(1)

    def __init__(self, step: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._made: list[Tensor] = []
        with monkeypatch.context() as patches:
            number = next(self._numbers)
            for module in (arithmetic, sys.modules[sn.SpectralNorm.__module__]):
                patches.setattr(module, "is_capturing", lambda weight: True)
            patches.setattr(captured, "capture_id", lambda device: number)
            patches.setattr(sn.SpectralNorm, "read", sn.SpectralNorm.forward)
            for module in (kernels_of_tracking, quotients, storing):
                patches.setattr(module, "launch", self._recorded(module.launch))
            with _Operations(self):
                step()

    def replay(self) -> None:
        with torch.no_grad():
            for tensor in self._made:
                if tensor.is_floating_point():
                    tensor.untyped_storage().copy_(torch.full_like(tensor, float("nan")).untyped_storage())
            for call in self._calls:
                call()

    def _recorded(self, launch: Callable[..., None]) -> Callable[..., None]:
        def recorded(kernel: Any, *arguments: Any, **options: Any) -> None:
            self.kernels.append(kernel.fn.__name__)
            with _disable_current_modes():
                launch(kernel, *arguments, **options)
            self._calls.append(lambda: launch(kernel, *arguments, **options))

        return recorded

    def add(self, operation: Any, arguments: Any, options: Any, result: Any) -> None:
        """An operation of torch's that has been done."""
        if operation.is_view:
            return
        if operation._schema.is_mutable:
            self._calls.append(lambda: operation(*arguments, **options))
            return
        before = {each.untyped_storage().data_ptr() for each in _tensors((arguments, options))}
        made = [each for each in _tensors(result) if each.untyped_storage().data_ptr() not in before]
        self._made += made
        if made and "empty" not in operation.__name__:
            self._calls.append(lambda: _again(operation, arguments, options, made))


def _again(operation: Any, arguments: Any, options: Any, made: list[Tensor]) -> None:
    for old, new in zip(made, _tensors(operation(*arguments, **options)), strict=True):
        old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class _Operations(TorchDispatchMode):
    """Gives what torch does to a graph."""

    def __init__(self, graph: _ByHand) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._graph.add(func, args, kwargs or {}, result)
        return result
