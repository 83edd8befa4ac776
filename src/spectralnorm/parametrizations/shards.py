"""Weights of which a process holds a part (DTensor): by tensor parallelism, and by FSDP2 outside of forward.

The norm is that of the whole weight. It is found on every process alike, from the weight gathered for a moment; what
stays, and what goes through autograd, is this process's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectralnorm.linalg import MatrixView

__all__ = ["distributed_as", "is_distributed", "local_part", "scaled_part", "whole"]


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; without importing them."""
    return type(tensor).__name__ == "DTensor" and hasattr(tensor, "_local_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``, sharing its memory; an ordinary tensor is all there."""
    part: Any = tensor
    return part._local_tensor if is_distributed(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, without a gradient. A collective where it is distributed: every process must call it."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if is_distributed(tensor) else detached


def distributed_as(like: Tensor, entries: Tensor) -> Tensor:
    """``entries``, which every process has, distributed as ``like`` is; no communication."""
    if not is_distributed(like):
        return entries
    from torch.distributed.tensor import DTensor, Replicate

    distributed: Any = like
    mesh = distributed.device_mesh
    copied = DTensor.from_local(entries, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copied.redistribute(mesh, distributed.placements)


def scaled_part(
    weight: Tensor,
    sigma: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    views: Sequence[MatrixView],
    quotient: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The normalized weight, distributed as ``weight`` is, and differentiable in it.

    Args:
        weight: a DTensor.
        sigma: the norm of the whole, an ordinary scalar.
        pairs: for each view the vectors u and v of the whole.
        views: how the weight is read as a matrix.
        quotient: the normalized weight of (weight, sigma), entry by entry.
    """
    from torch.distributed.tensor import DTensor

    distributed: Any = weight
    part = distributed.to_local()
    if torch.is_grad_enabled() and weight.requires_grad:
        gradients = [
            _part_of_product(*view.outer_factors(u, v, weight.shape), distributed)
            for view, (u, v) in zip(views, pairs, strict=True)
        ]
        mean = gradients[0] if len(gradients) == 1 else torch.stack(gradients).mean(0)
        sigma = _Sigma.apply(part, sigma, mean, _splitting_groups(distributed))
    return DTensor.from_local(
        quotient(part, sigma),
        distributed.device_mesh,
        distributed.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


class _Sigma(torch.autograd.Function):
    """sigma = u^H W v, known already, as a function of this process's part of W: its gradient is that part of u v^H.

    Each process computes with its own part of W / sigma, so each knows a part of dL/dsigma; they are added up.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, sigma: Tensor, gradient: Tensor, groups: list[Any]) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.groups, ctx.dtype = groups, part.dtype
        return sigma.detach()

    # Torch's own passage from a DTensor to its part and back can be differentiated once only.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        total = grads[0].clone()
        for group in ctx.groups:
            torch.distributed.all_reduce(total, group=group)
        return (total * gradient).to(ctx.dtype), None, None, None


def _splitting_groups(weight: Any) -> list[Any]:
    """The groups over which the weight is split; along the mesh's other dimensions all hold the same."""
    return [
        weight.device_mesh.get_group(dim)
        for dim, placement in enumerate(weight.placements)
        if not placement.is_replicate()
    ]


def _part_of_product(rows: Tensor, columns: Tensor, weight: Any) -> Tensor:
    """This process's entries of ``rows * columns``, which has the shape of the whole ``weight``."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        # Interleaved, where FSDP2 splits what is split already. Cutting a copy that all have takes no communication.
        return local_part(distributed_as(weight, rows * columns))
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        # A factor has size 1 along the dimensions of the other.
        rows, columns = (
            factor.narrow(dim, start, size) if factor.shape[dim] == weight.shape[dim] else factor
            for factor in (rows, columns)
        )
    return rows * columns
