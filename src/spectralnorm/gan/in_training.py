"""A network as the training loop calls it: compiled, in its precision, together with other processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from spectralnorm.errors import UserError
from spectralnorm.gan.distributed import Processes
from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear
from spectralnorm.gan.precision import Precision
from spectralnorm.parametrizations import SpectralNorm
from spectralnorm.transform import compile as compiled

__all__ = ["InTraining"]

_LAYERS = (nn.Linear, _ConvNd, nn.Embedding, EqualizedLinear, EqualizedConv2d)
# Below it, a message of its own takes longer than what it carries.
_LARGE = 2**16


class InTraining:
    """Calls a network for the loop.

    Args:
        module: on its device, normalized, not yet seen by an optimizer: one that is held in parts gets new parameters.
        precision: of its products.
        processes: that train it together.
        strategy: one of `spectralnorm.gan.precision.STRATEGIES`.
        compile: whether `torch.compile` makes code for it, to which normalized weights are handed over.

    Raises:
        UserError: the settings do not go together, or a batch normalization cannot be shared.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        precision: Precision,
        processes: Processes,
        strategy: str = "ddp",
        compile: bool = False,
    ) -> None:
        self.module = module
        self._precision = precision
        self._is_frozen = False
        self._is_last = True
        self._is_sharded = strategy == "fsdp" and processes.size > 1
        if processes.size > 1:
            from spectralnorm.gan.shared_batch_norm import share_batch_norm  # not for a run of one process

            share_batch_norm(module)
        if self._is_sharded:
            if compile:
                raise UserError("A network that is held in parts is not compiled; leave out compile or strategy fsdp.")
            if precision.dtype == torch.float16:
                raise UserError("strategy fsdp has no scaling of float16 gradients; use precision bf16-mixed or fp32.")
            for part in module.modules():
                if isinstance(part, SpectralNorm) and (part.strict or part.follows_map or part.scale is not None):
                    raise UserError(
                        "strategy fsdp has no normalization by strict, norm=operator or mode=learnable; leave it out, "
                        "or use strategy ddp."
                    )
            for name, parameter in module.named_parameters():
                if parameter.dim() == 0:
                    raise UserError(
                        f"The parameter '{name}' is a single number, of which strategy fsdp can make no parts; use "
                        "strategy ddp, or in a network of your own the shape (1,)."
                    )
            _shard(module, processes.size)
        # Static shapes: the loop knows two or three of them. One graph or an error, never a silent return to slow code.
        self._bare = compiled(module, fullgraph=True, dynamic=False) if compile else module
        self._called = self._bare
        if processes.size > 1 and not self._is_sharded:
            # The buffers are the same everywhere: statistics are shared, tracked vectors follow from the weight.
            known = inspect.signature(DistributedDataParallel).parameters
            name = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )  # before torch 2.13
            options: Any = {name: False}
            self._called = DistributedDataParallel(self._bare, **options)
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """What the network makes of its inputs, in float32; inputs that are None are left out."""
        network = self._bare if self._is_frozen else self._called
        return self._precision.forward(network, *(each for each in inputs if each is not None))

    def exactly(self, *inputs: Tensor | None) -> Tensor:
        """The same in full precision and as written, so that it can be differentiated twice: compiled code cannot."""
        return self.module(*(each for each in inputs if each is not None))

    def penalty(self, compute: Callable[[], Tensor], *, share: float = 1.0) -> Tensor:
        """A loss that is made of gradients of `exactly`, to be added to that of the same pass, before its backward.

        FSDP2 frees the weights of a layer once a gradient has passed it, which the second derivatives still need. So
        they stay whole meanwhile, the loss is differentiated here, and what comes back has no graph any more.

        Args:
            compute: gives the loss, a scalar.
            share: of the pass in the step, by which its backward multiplies.
        """
        if not self._is_sharded:
            return compute()
        module: Any = self.module
        module.set_requires_gradient_sync(False)
        module.set_reshard_after_backward(False)
        loss = compute()
        (share * loss).backward()
        module.set_reshard_after_backward(True)
        module.set_requires_gradient_sync(self._is_last)
        return loss.detach()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A context in which the network passes gradients on, but its weights get none."""
        self._is_frozen = True
        # FSDP2 computes and sums the gradients of all parameters that it was given as trainable ones.
        kept = [parameter.grad for parameter in self._parameters] if self._is_sharded else []
        for parameter in self._parameters:
            if self._is_sharded:
                parameter.grad = None
            else:
                parameter.requires_grad_(False)
        try:
            yield
        finally:
            self._is_frozen = False
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            for parameter, gradient in zip(self._parameters, kept, strict=False):
                parameter.grad = gradient

    def summing(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """A context for one of the passes, forward and then backward, whose gradients make a step.

        Args:
            is_last: whether this is the last of them, in which the processes share the sum.
        """
        if self._is_sharded:
            self._is_last = is_last
            self.module.set_requires_gradient_sync(is_last)  # pyright: ignore[reportCallIssue]
        if is_last or not isinstance(self._called, DistributedDataParallel):
            return nullcontext()
        return self._called.no_sync()


def _shard(module: nn.Module, size: int) -> None:
    """Split the weights between processes: each large layer is gathered by itself when it is used, the rest at once."""
    # They take a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(module.parameters()).device.type, (size,))
    for layer in module.modules():
        if layer is not module and isinstance(layer, _LAYERS) and sum(p.numel() for p in layer.parameters()) >= _LARGE:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
