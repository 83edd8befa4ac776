"""The division by sigma, and its gradient in one piece.

Written out, ``weight / (u @ weight @ v)`` costs autograd about twenty small operations per use. Here the value is
computed once per change of the weight, and each use under grad is one node whose backward is the closed formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, compute_dtype

__all__ = ["NormalizedWeight", "divisor_of"]


def divisor_of(sigma: Tensor, coefficient: float, *, cap: bool, eps: float) -> tuple[Tensor, Tensor]:
    """What the weight is divided by, and where that depends on sigma.

    Args:
        sigma: the weight's norm, a scalar.
        coefficient: the norm that is wanted.
        cap: leave a weight alone whose norm is below ``coefficient``.
        eps: a norm up to here counts as zero: dividing by it would blow up the gradient of a zero weight by 1/eps. Such
            a weight, and one that has no norm because it is not finite, is not divided.

    Returns:
        The divisor, and whether it is ``sigma / coefficient``: else it is a constant.
    """
    divisible = sigma > (max(coefficient, eps) if cap else eps)  # false for NaN
    constant = 1.0 if cap else 1 / coefficient
    return torch.where(divisible, sigma / coefficient, constant), divisible


class NormalizedWeight(torch.autograd.Function):
    """A kept value as a differentiable function of the weight it was computed from.

    With W' = W / d(sigma), sigma = u^H W v and u, v held constant (Miyato et al. 2018, eq. 12),

        dL/dW = G / d - active <G, W'> / sigma u v^H,        G = dL/dW'.

    Both outputs are saved, W' and sigma, not W: an old graph stays usable after the optimizer has changed W in place.
    Being outputs they are themselves differentiable functions of W, so the second backward (a gradient penalty) goes
    through this same node again and needs no formula of its own.
    """

    # The context comes in as an argument, not through `setup_context`: torch binds the arguments of that style by
    # `inspect` at every call, which takes longer than everything else here. Transforms of `torch.func`, which would
    # need the other style, never come here.
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        value: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        view: MatrixView,
        coefficient: float,
        cap: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Hand out ``value`` and ``sigma``, which share their memory with the kept ones."""
        outputs = value.detach(), sigma.detach()
        ctx.save_for_backward(*outputs, u, v)
        ctx.view, ctx.coefficient, ctx.cap, ctx.eps = view, coefficient, cap, eps
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_value, grad_sigma = grads
        value, sigma, u, v = ctx.saved_tensors
        nothing = (None,) * 8
        if grad_value is None and grad_sigma is None:
            return None, *nothing
        along_sigma = grad_sigma  # the coefficient of u v^H
        grad = None
        if grad_value is not None:
            if grad_value.is_sparse:  # of an embedding; the share of sigma fills the gradient anyway
                grad_value = grad_value.to_dense()
            # Half types: the inner product has as many terms as the weight, and would lose all digits.
            wide = grad_value.to(compute_dtype(grad_value.dtype))
            divisor, active = divisor_of(sigma, ctx.coefficient, cap=ctx.cap, eps=ctx.eps)
            # 0 / 0 at a zero weight must not reach the gradient, so what is divided by is replaced, not the quotient.
            through_sigma = -_inner(wide, value.to(wide.dtype)) / torch.where(active, sigma, 1) * active
            along_sigma = through_sigma if along_sigma is None else along_sigma + through_sigma
            grad = wide / divisor
        rows, columns = ctx.view.outer_factors(u, v, value.shape)
        rows = rows * along_sigma
        # addcmul_ takes any layout without a copy; the quotient it writes into is nobody else's.
        grad = rows * columns if grad is None else grad.addcmul_(rows, columns)
        return grad.to(value.dtype), *nothing


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Re <left, right> over all entries, without a temporary for weights that lie densely in memory."""
    order = sorted(range(right.ndim), key=lambda dim: -right.stride(dim))
    left, right = left.permute(order).reshape(-1), right.permute(order).reshape(-1)
    return torch.vdot(left, right).real if left.is_complex() else torch.dot(left, right)
