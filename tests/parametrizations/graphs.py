"""CUDA graphs for tests: real ones on a GPU, and on a CPU what they do.

A graph repeats operations and launches with the memory that they had when they were captured. That is done here by
hand: each is written down, and done again into the same memory. What was allocated in the capture is filled with NaN
before each replay, so that nothing can be carried in it from one to the next. What a capture refuses is refused: to
read a number of the device, to let a number decide about a shape, and to send a list there, but by kernels.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from spectralnorm.parametrizations import arithmetic, captured, weight_clock

__all__ = ["Graph", "capture", "warm_up"]


class Graph:
    """What was captured."""

    def __init__(self, kernels: list[str] | None) -> None:
        self.kernels = kernels  # that were launched, of ours; None: not known, of a real graph

    def replay(self) -> None:
        """Do it once more."""
        raise NotImplementedError

    def lost(self) -> list[Tensor]:
        """Memory that it reads or writes and that may be another's by now; not known of a real graph."""
        return []


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
        super().__init__(None)
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
        launched: list[str] = []
        super().__init__(launched)
        self._launched = launched
        self._calls: list[Callable[[], object]] = []
        self._made: list[Tensor] = []
        self._changed: list[Tensor] = []
        self._arguments: list[Tensor] = []  # of launches
        with monkeypatch.context() as patches:
            number = next(self._numbers)
            of_kernels = kernels_of_tracking, quotients, storing
            of_python = arithmetic, weight_clock, sys.modules[sn.SpectralNorm.__module__]
            for module in (*of_python, *of_kernels):
                patches.setattr(module, "is_capturing", lambda tensor_or_device: True)
            patches.setattr(captured, "capture_id", lambda device: number)
            patches.setattr(sn.SpectralNorm, "read", sn.SpectralNorm.forward)
            for module in of_kernels:
                patches.setattr(module, "launch", self._recorded(module.launch))
                patches.setattr(module, "uploaded", self._written)
            patches.setattr(torch, "tensor", _on_host(torch.tensor))
            with _Operations(self):
                step()

    def replay(self) -> None:
        with torch.no_grad():
            for tensor in self._made:
                if tensor.is_floating_point():
                    tensor.untyped_storage().copy_(torch.full_like(tensor, float("nan")).untyped_storage())
            with ExitStack() as unseen:  # nobody sees what a graph writes: no version counts it
                for tensor in self._changed:
                    unseen.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor))
                for call in self._calls:
                    call()

    def lost(self) -> list[Tensor]:
        # Memory that was allocated in the capture is held by it; one count is for the object through which it is asked.
        storages = [each.untyped_storage() for each in self._arguments]
        ours = Counter(storage._cdata for storage in storages)
        return [
            each
            for each, storage in zip(self._arguments, storages, strict=True)
            if torch._C._storage_Use_Count(storage._cdata) == ours[storage._cdata] + 1
        ]

    def _recorded(self, launch: Callable[..., None]) -> Callable[..., None]:
        def recorded(kernel: Any, *arguments: Any, **options: Any) -> None:
            self._launched.append(kernel.fn.__name__)
            with _disable_current_modes():
                launch(kernel, *arguments, **options)
                # A graph knows addresses: it does not keep the tensors alive.
                of_graph = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
            self._arguments += _tensors(of_graph)
            self._calls.append(lambda: launch(kernel, *of_graph, **options))

        return recorded

    def _written(self, values: Sequence[int], device: torch.device) -> Tensor:
        """As `launch.written`."""
        with _disable_current_modes():
            host = torch.as_tensor(values, dtype=torch.int64)
            table = host.clone()
        self._calls.append(lambda: table.copy_(host))
        return table

    def add(self, operation: Any, arguments: Any, options: Any, result: Any) -> None:
        """An operation of torch's that has been done."""
        assert operation not in _REFUSED, f"{operation} waits for the device"
        if operation is torch.ops.aten.index.Tensor:
            assert all(each is None or each.dtype != torch.bool for each in arguments[1]), "a mask waits for the device"
        if operation.is_view:
            return
        if operation._schema.is_mutable:
            self._calls.append(lambda: operation(*arguments, **options))
            self._changed += _tensors((arguments, options))
            return
        before = {each.untyped_storage().data_ptr() for each in _tensors((arguments, options))}
        made = [each for each in _tensors(result) if each.untyped_storage().data_ptr() not in before]
        self._made += made
        if made and "empty" not in operation.__name__:
            self._calls.append(lambda: _again(operation, arguments, options, made))


_REFUSED = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


def _on_host(tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` for tables of the host, whose device is given by its name; the other one is that of a tensor."""

    def made(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
        assert not isinstance(device, torch.device), "a list is sent to the device"
        return tensor(*arguments, device=device, **options)

    return made


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
