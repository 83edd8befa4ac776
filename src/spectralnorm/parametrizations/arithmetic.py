"""The circumstances in which norms are computed, whatever the user's code is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["is_capturing", "is_eager", "plain_arithmetic"]


def plain_arithmetic(weight: Tensor) -> AbstractContextManager[None]:
    """No graph, no rounding by autocast, and tensors that a later backward may save (not those of inference mode)."""
    kind = weight.device.type
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(kind):
        return _switched_back(kind)
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


def is_eager(weight: Tensor) -> bool:
    """Whether ``weight`` holds numbers and nothing traces, captures or transforms what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not weight.is_meta
        and not isinstance(weight, FakeTensor)
        and not weight.is_inference()
        and not is_capturing(weight)
    )


def is_capturing(weight: Tensor) -> bool:
    """Whether what is done with ``weight`` is being captured in a CUDA graph."""
    return weight.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
