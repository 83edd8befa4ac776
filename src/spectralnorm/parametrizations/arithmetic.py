"""The circumstances in which norms are computed, whatever the user's code is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "holds_numbers",
    "host_has",
    "is_capturing",
    "is_eager",
    "is_plain",
    "plain_arithmetic",
    "without_autocast",
]


def plain_arithmetic(weight: Tensor) -> AbstractContextManager[None]:
    """No graph, no rounding by autocast, and tensors that a later backward may save (not those of inference mode)."""
    if torch.is_inference_mode_enabled() or torch._C._is_any_autocast_enabled():
        return _switched_back(weight.device.type)
    return torch.no_grad()


@contextmanager
def _switched_back(kind: str) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


def without_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """Where autocast rounds nothing, and layers hand out their weight as it is.

    Where it is off this is nothing, so that what is traced has no context in it.
    """
    kind = weight.device.type
    is_on = _has_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# What torch.compiler.assume_constant_result does, which would import the whole compiler: Dynamo calls the function, in
# which that of torch 2.6 cannot look.
_has_autocast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_eager(weight: Tensor) -> bool:
    """Whether ``weight`` holds numbers and nothing traces, captures or transforms what is done with it."""
    return is_plain(weight) and not is_capturing(weight)


def is_plain(weight: Tensor) -> bool:
    """As `is_eager`, but for captures."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and holds_numbers(weight)
        and not weight.is_inference()
    )


def holds_numbers(tensor: Tensor) -> bool:
    """Whether ``tensor`` is more than its shape: neither on the meta device nor a fake one."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def host_has(device: torch.device) -> bool:
    """Whether the host reads a number of that device without waiting."""
    return device.type == "cpu"


def is_capturing(weight: Tensor) -> bool:
    """Whether what is done with ``weight`` is being captured in a CUDA graph."""
    return weight.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
