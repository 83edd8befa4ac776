"""The division by sigma, and its gradient in one piece.

Written out, ``weight / (u @ weight @ v)`` costs autograd about twenty small operations per use. Here the value is
computed once per change of the weight, and one node of the graph serves all uses until the next change: its backward is
the closed formula, applied once to the sum of what comes from all uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, compute_dtype
from spectralnorm.parametrizations.memory import is_held_once
from spectralnorm.parametrizations.occasions import Occasions
from spectralnorm.parametrizations.threads import one_at_a_time
from spectralnorm.parametrizations.weight_clock import Moment

__all__ = [
    "Batch",
    "CastWeight",
    "NormalizedWeights",
    "Quotient",
    "Quotients",
    "Several",
    "Stack",
    "divided",
    "divisor_of",
    "gradients_of",
    "host_divisor_of",
    "is_batched",
]

# Whether a gradient is several at once, as ``torch.autograd.grad(..., is_grads_batched=True)`` sends them through a
# graph: neither numbers nor an address are to be had of it.
is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


def divisor_of(sigma: Tensor, coefficient: float | Tensor, *, cap: bool, eps: float) -> tuple[Tensor, Tensor]:
    """What a weight is divided by, and where that depends on sigma.

    Args:
        sigma: norms, of any shape.
        coefficient: the norm that is wanted; broadcasts with ``sigma``.
        cap: leave a weight alone whose norm is below ``coefficient``.
        eps: a norm up to here counts as zero: dividing by it would blow up the gradient of a zero weight by 1/eps. Such
            a weight, and one whose norm is not finite, is not divided.

    Returns:
        The divisor, and whether it is ``sigma / coefficient``: else it is a constant.
    """
    divisible = (sigma > eps) & (sigma < math.inf)  # false for NaN
    if cap:
        divisible = divisible & (sigma > coefficient)
    constant = 1.0 if cap else 1 / coefficient
    return torch.where(divisible, sigma / coefficient, constant), divisible


def host_divisor_of(sigma: float, coefficient: float, *, cap: bool, eps: float) -> tuple[float, bool]:
    """As `divisor_of`, of one norm that is known to the host."""
    divisible = (max(coefficient, eps) if cap else eps) < sigma < math.inf
    return (sigma / coefficient if divisible else 1.0 if cap else 1 / coefficient), divisible


def divided(weight: Tensor, divisor: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``weight / divisor`` in the weight's type; of half types the quotient is rounded, and the divisor is not."""
    wide = compute_dtype(weight.dtype)
    if weight.dtype == wide:
        return torch.div(weight, divisor, out=out)
    quotient = weight.to(wide) / divisor
    return quotient.to(weight.dtype) if out is None else out.copy_(quotient)


class Batch(Protocol):
    """Weights that were divided together, whose gradients come together as well."""

    def gradients(self, quotients: Sequence[Quotient], grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor] | None:
        """dL/dW of some of the weights for each G, the sum of one or several, none of them sparse; see `Quotient`.

        None: not of these together; each has to be asked for alone.
        """
        ...


@dataclass(slots=True)
class Stack:
    """Small weights of one shape, divided together: a `Batch`.

    Attributes:
        values: (batch, out, in), all W'.
        u: (batch, out).
        v: (batch, in).
        sigma: (batch,).
        divisor: (batch,).
    """

    values: Tensor
    u: Tensor
    v: Tensor
    sigma: Tensor
    divisor: Tensor

    def gradients(self, quotients: Sequence[Quotient], grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor] | None:
        """As `Batch` has it, of all or none. All divisors depend on sigma."""
        places = [quotient.place for quotient in quotients]
        if places != list(range(len(self.values))):
            return None
        stacked = torch.stack([_sum(of_one) for of_one in grads])
        if not stacked.is_contiguous():
            return None
        matrices = stacked.view_as(self.values)
        along = -torch.linalg.vecdot(matrices.flatten(1), self.values.flatten(1)) / self.sigma
        scaled = matrices / self.divisor[:, None, None]
        return scaled.baddbmm_((self.u * along[:, None])[:, :, None], self.v[:, None]).view_as(stacked).unbind()


@dataclass(slots=True, weakref_slot=True)
class Quotient:
    """One weight divided by its norm, with what the derivative needs.

    With W' = W / d(sigma), sigma = mean over views of u^H W v, and the vectors held constant (Miyato et al. 2018,
    eq. 12),

        dL/dW = G / d - active <G, W'> / sigma mean(u v^H),        G = dL/dW'.

    Attributes:
        weight: the raw weight.
        moment: when it was read; only a second derivative needs the weight again.
        value: W'; written again only when nobody else holds its memory.
        sigma: the norm, a scalar.
        divisor: d; a number where the host knows it.
        active: whether d depends on sigma.
        pairs: for each view the whole vectors u and v in torch's order.
        views: how the weight is read as a matrix.
        flat_v: v in the order of ``views[0].memory_matrix``, where that is a view of the weight; else None.
        coefficient: the norm that is wanted.
        cap: whether a smaller norm is left alone.
        eps: a norm up to here counts as zero.
        upper: what the norm is guaranteed not to exceed, float64, if d was made from it; the derivative is that of
            sigma times a constant.
        direction: of the weight's shape, the derivative of the norm where that is not the norm of ``views``: else None.
        batch: the weights that this one was divided with; None if it was alone.
        place: its place there.
        gradient_memory: of the last gradient on the CPU; used again when nobody else holds it any more.
    """

    weight: Tensor
    moment: Moment
    value: Tensor
    sigma: Tensor
    divisor: float | Tensor
    active: bool | Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]
    views: tuple[MatrixView, ...]
    flat_v: Tensor | None
    coefficient: float
    cap: bool
    eps: float
    upper: Tensor | None = None
    direction: Tensor | None = None
    batch: Batch | None = None
    place: int = 0
    gradient_memory: Tensor | None = None

    def gradient(self, grad: Tensor) -> Tensor:
        """dL/dW for G = ``grad``, both of the weight's shape."""
        if grad.is_sparse:  # of an embedding; the share of sigma fills the gradient anyway
            grad = grad.to_dense()
        if torch.is_grad_enabled():
            return self._differentiable_gradient(grad)
        if isinstance(self.divisor, float) and not is_batched(grad):
            if not self.active:
                return divided(grad, self.divisor)
            if self.flat_v is not None and grad.stride() == self.value.stride() and grad.dtype == self.flat_v.dtype:
                return self._gradient_of_dense(grad, self.divisor)
        # Half types: the inner product has as many terms as the weight, and would lose all digits.
        wide = grad.to(compute_dtype(grad.dtype))
        # 0 / 0 at a zero weight must not reach the gradient, so what is divided by is replaced, not the quotient.
        active, sigma = self.active, self.sigma
        length = sigma if isinstance(active, bool) else torch.where(active, sigma, 1)
        along = -_inner(wide, self.value.to(wide.dtype)) / length * active
        result = wide / self.divisor
        for rows, columns in self._outer_factors():
            # addcmul_ takes any layout without a copy; the quotient it writes into is nobody else's.
            result.addcmul_(rows * (along / len(self.pairs)), columns)
        return result.to(self.value.dtype)

    def _gradient_of_dense(self, grad: Tensor, divisor: float) -> Tensor:
        """On the CPU, for a weight and a gradient that lie densely in memory in the same order: two passes."""
        view = self.views[0]
        matrix = view.memory_matrix(grad)
        along = -float(torch.dot(matrix.reshape(-1), view.memory_matrix(self.value).reshape(-1)))
        sigma = divisor * self.coefficient if self.upper is None else float(self.sigma)
        along /= sigma * len(self.pairs)
        u, v = self.pairs[0][0], self.flat_v
        # New memory costs as much as the arithmetic, because the system clears it.
        memory = self.gradient_memory
        if memory is None or memory.shape != matrix.shape or not is_held_once(memory):
            memory = torch.empty_like(matrix)
        result = torch.addr(matrix, u, v, beta=1 / divisor, alpha=along, out=memory)  # type: ignore[arg-type]
        self.gradient_memory = memory
        result = result.as_strided(grad.shape, grad.stride())
        for rows, columns in self._outer_factors()[1:]:
            result.addcmul_(rows, columns, value=along)
        return result

    def _outer_factors(self) -> list[tuple[Tensor, Tensor]]:
        if self.direction is not None:
            return [(self.direction, torch.ones_like(self.sigma))]
        shape = self.value.shape
        return [view.outer_factors(u, v, shape) for view, (u, v) in zip(self.views, self.pairs, strict=True)]

    def _differentiable_gradient(self, grad: Tensor) -> Tensor:
        """The same as a function of the weight as well as of ``grad``, for second derivatives."""
        if not self.moment.is_now():
            raise RuntimeError(
                "The second derivative of a spectrally normalized weight needs the weight, which has been changed "
                "since the forward pass; take the derivative before the optimizer's step."
            )
        wide = compute_dtype(grad.dtype)
        weight, grad = self.weight.to(wide), grad.to(wide)
        outer = [rows * columns for rows, columns in self._outer_factors()]
        mean = torch.stack(outer).mean(0) if len(outer) > 1 else outer[0]
        sigma = (mean.conj() * weight).sum()
        sigma = sigma.real if sigma.is_complex() else sigma
        if self.upper is None:
            divisor, active = divisor_of(sigma, self.coefficient, cap=self.cap, eps=self.eps)
        else:
            active = torch.as_tensor(self.active, device=sigma.device)
            ratio = self.divisor / torch.where(active, self.sigma, 1)
            divisor = torch.where(active, sigma * ratio, self.divisor).to(sigma.dtype)
        inner = (grad.conj() * (weight / divisor)).sum()
        inner = inner.real if inner.is_complex() else inner
        along = -inner / torch.where(active, sigma, 1) * active
        return (grad / divisor + along * mean).to(self.value.dtype)


def gradients_of(quotients: Sequence[Quotient], grads: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
    """dL/dW of each for the sum of what came from its uses; None where nothing came."""
    results: list[Tensor | None] = [None] * len(quotients)
    batches: dict[int, list[tuple[int, Quotient, Sequence[Tensor]]]] = {}
    for index, (quotient, of_uses) in enumerate(zip(quotients, grads, strict=True)):
        if not of_uses:
            continue
        is_ordinary = not any(grad.is_sparse or is_batched(grad) for grad in of_uses)
        if quotient.batch is None or torch.is_grad_enabled() or not is_ordinary:
            results[index] = quotient.gradient(_sum(of_uses))
        else:
            batches.setdefault(id(quotient.batch), []).append((index, quotient, of_uses))
    for members in batches.values():
        indices, some, of_some = zip(*members, strict=True)
        batch = some[0].batch
        together = None if batch is None else batch.gradients(some, of_some)
        if together is None:
            parts = zip(some, of_some, strict=True)
            together = [quotient.gradient(_sum(of_uses)) for quotient, of_uses in parts]
        for index, result in zip(indices, together, strict=True):
            results[index] = result
    return results


class Quotients(Protocol):
    """Weights that share a node."""

    @property
    def values(self) -> Sequence[Tensor]:
        """The weights divided."""
        ...

    def gradients(self, grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor | None]:
        """As `gradients_of`."""
        ...


class Several:
    """`Quotients` that are known one by one."""

    def __init__(self, quotients: Sequence[Quotient]) -> None:
        self._quotients = quotients

    @property
    def values(self) -> list[Tensor]:
        """As `Quotients` has it."""
        return [quotient.value for quotient in self._quotients]

    def gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        """As `Quotients` has it."""
        return gradients_of(self._quotients, grads)


class NormalizedWeights(torch.autograd.Function):
    """Kept values as differentiable functions of the weights they were computed from.

    One node serves several weights, several uses and any number of backward passes: it frees nothing, because what it
    holds is kept anyway. So separate backwards of real and fake can share it, and an old graph stays usable after the
    optimizer has changed the weights in place.
    """

    # The context comes in as an argument, not through `setup_context`: torch binds the arguments of that style by
    # `inspect` at every call, which takes longer than everything else here. Transforms of `torch.func`, which would
    # need the other style, never come here.
    @staticmethod
    def forward(ctx: Any, quotients: Sequence[Quotient] | Quotients, *weights: Tensor) -> tuple[Tensor, ...]:
        """Hand out the values, sharing their memory: those of all weights, and the same ones once more."""
        some = Several(quotients) if isinstance(quotients, Sequence) else quotients
        ctx.quotients, ctx.num_weights = some, len(weights)
        ctx.set_materialize_grads(False)
        values = some.values
        return tuple([value.detach() for value in values] + [value.detach() for value in values])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(grads[: ctx.num_weights], grads[ctx.num_weights :], strict=True)
        with one_at_a_time:  # the memory of the last gradients may be written again
            Occasions.num += 1
            return None, *ctx.quotients.gradients([[grad for grad in pair if grad is not None] for pair in pairs])


class CastWeight(torch.autograd.Function):
    """A weight rounded to another type beforehand, as a differentiable function of it.

    As torch's own cast of a weight under autocast, which it makes once for all uses: what comes from them is added up
    in the narrower type. Nothing is freed by a backward, because nothing is saved.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        """Hand out ``value``, sharing its memory."""
        ctx.dtype = weight.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


def _sum(grads: Sequence[Tensor]) -> Tensor:
    """Of one or several; dense if any of several is."""
    total, *others = sorted(grads, key=lambda grad: grad.is_sparse)  # sparse ones can only be added to dense ones
    for other in others:
        total = total + other
    return total


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Re <left, right> over all entries, without a temporary for weights that lie densely in memory."""
    order = sorted(range(right.ndim), key=lambda dim: -right.stride(dim))
    left, right = left.permute(order).reshape(-1), right.permute(order).reshape(-1)
    return torch.vdot(left, right).real if left.is_complex() else torch.dot(left, right)
