"""Batch normalization by the statistics of the images of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectralnorm.errors import UserError

__all__ = ["SharedBatchNorm", "share_batch_norm"]


class SharedBatchNorm(_BatchNorm):
    """A batch normalization whose mean and variance in training are those of all processes' inputs together.

    `torch.nn.SyncBatchNorm` does the same on CUDA devices, once differentiable. This one is made of differentiable
    operations and one collective, so that it works on every device and under a penalty of gradients. The parameters,
    buffers and their names are those of the layer that it replaces. All processes must have equally many images.

    Args:
        layer: what it replaces.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        self.affine = layer.affine
        self.track_running_stats = layer.track_running_stats
        self._parameters = layer._parameters
        self._buffers = layer._buffers
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set
        self._check = type(layer)._check_input_dim
        self.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:
        self._check(self, input)  # pyright: ignore[reportArgumentType]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        values = input if input.dtype == torch.float64 else input.float()
        dims = [dim for dim in range(values.ndim) if dim != 1]
        mean, variance = _over_processes(values.mean(dims), values.var(dims, unbiased=False))
        if self.training and self.running_mean is not None:
            self._follow(mean, variance, dist.get_world_size() * values.numel() // values.shape[1])
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        shape = [1, -1] + [1] * (values.ndim - 2)
        outputs = (values - mean.view(shape)) * scale.view(shape)
        return (outputs + self.bias.view(shape) if self.affine else outputs).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, as torch does: the variance without bias."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (count / max(count - 1, 1))).to(self.running_var.dtype), share)


def _over_processes(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all processes' values from those of each process's, which are equally many.

    The variance is the mean of the variances and the variance of the means; the difference of two large sums, which
    would need only one number for each, loses digits.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.stack([mean, variance])
    # Each process fills its row; the sum has all rows. Its derivative is a sum too, and can be derived again.
    empty = torch.zeros_like(own)
    means, variances = _Sum.apply(torch.stack([own if place == rank else empty for place in range(size)])).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose losses count together: the derivative is the sum of the derivatives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(gradient)


def share_batch_norm(network: nn.Module) -> None:
    """Replace the batch normalizations of a network by such as look at the images of all processes.

    Raises:
        UserError: one has a class of its own, whose forward is unknown here.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, SharedBatchNorm | nn.SyncBatchNorm) or not isinstance(layer, _BatchNorm):
                continue
            if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                raise UserError(
                    f"{type(layer).__name__} is a batch normalization of its own kind, whose statistics cannot be "
                    "shared by several processes; use torch.nn.BatchNorm2d, or train in one process."
                )
            setattr(parent, name, SharedBatchNorm(layer))
