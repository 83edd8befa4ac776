"""A weight normalized at every use, where nothing can be kept: free of branches on values, in torch's own operations.

So it is where something traces, compiles or transforms what is done, where the update rule is not ``"step"``, and for a
tensor that somebody has put in a parameter's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg import MatrixView, chirp, compute_dtype, power_iteration, power_vectors
from spectralnorm.parametrizations import norm_alone
from spectralnorm.parametrizations.arithmetic import is_eager, without_autocast
from spectralnorm.parametrizations.quotient import divided
from spectralnorm.parametrizations.shards import is_distributed, scaled_part, whole
from spectralnorm.parametrizations.strict import autocast_dtype, careful_divisor

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["iterated", "rayleigh", "turned", "use", "use_map", "use_strict"]

# Warm vectors of one block say nothing about another that has become the largest; without kept vectors each call
# starts the other blocks afresh. As many iterations as torch gives to a new layer.
_COLD_ITERATIONS = 15
_NO_GRAPH = (
    'norm="operator" of a convolution needs ordinary execution, not a graph by torch.compile, vmap or export; bake its '
    "weight by remove_spectral_norm first."
)


def use(normalization: SpectralNorm, weight: Tensor) -> Tensor:
    """The normalized ``weight``, differentiable in it."""
    normalization.require_all_of(weight)
    full = whole(weight) if is_distributed(weight) else weight
    pairs = _pairs_for_use(normalization, full)
    sigma = rayleigh(normalization.views, full, pairs)
    if is_distributed(weight):
        pairs = turned(normalization.views, full, pairs)
        return scaled_part(weight, sigma, pairs, normalization.views, normalization.quotient)
    return normalization.quotient(weight, sigma)


def use_map(normalization: SpectralNorm, weight: Tensor) -> Tensor:
    """As `use`, for ``norm="operator"``; uncompiled where torch.compile may break its graph."""
    if torch.compiler.is_dynamo_compiling() and not _is_exporting():
        return _divided_uncompiled(normalization, weight)
    norm_alone.refuse_sharded(weight, 'norm="operator"')
    if not is_eager(weight):
        _refuse_graph()
    if weight.numel() == 0:
        return weight
    found = normalization.map_of(weight)
    sigma = (found.direction * weight.to(found.direction.dtype)).sum()
    return normalization.quotient(weight, sigma)


def _is_exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()  # torch 2.6 cannot tell


def _refuse_graph() -> NoReturn:
    raise UserError(_NO_GRAPH)


# What torch.compiler.assume_constant_result does, which would import the whole compiler: Dynamo calls the functions
# instead of tracing them. So the answer is true (traced, it would be yes up to 2.11), and the error comes out as it is.
_is_exporting._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_refuse_graph._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _divided_in_eager(normalization: SpectralNorm, weight: Tensor) -> Tensor:
    return normalization._divided(weight)


# What torch.compiler.disable does, likewise: it breaks the graph, or ends the compilation where there may be only one,
# for the reason that torch then tells.
_divided_in_eager._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
_divided_in_eager._torchdynamo_disable_msg = _NO_GRAPH  # pyright: ignore[reportFunctionMemberAccess]
_divided_uncompiled = torch._disable_dynamo(_divided_in_eager)  # type: ignore[attr-defined]


def use_strict(normalization: SpectralNorm, weight: Tensor) -> Tensor:
    """As `use`, for ``strict=True``. The bound is that of the weight that came, whoever put it there."""
    if torch._C._get_tracing_state() is not None:
        raise UserError(
            "strict=True cannot be traced by torch.jit.trace or exported to ONNX, which have no operation for the "
            "rounding of its bound; bake the weight by remove_spectral_norm first."
        )
    if weight.numel() == 0:
        return weight
    norm_alone.refuse_sharded(weight, "strict=True")
    if normalization._is_vector:
        sigma = torch.linalg.vector_norm(weight.to(compute_dtype(weight.dtype)))
    else:
        normalization.require_all_of(weight)
        sigma = rayleigh(normalization.views, weight, _pairs_for_use(normalization, weight))
    target = normalization.target(autocast_dtype(weight) or weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        detached = weight.detach()
        divisor, active = careful_divisor(detached, normalization.upper_bound(detached), target)
        divisor = divisor.to(sigma.dtype)
        ratio = torch.where(active & (sigma != 0), divisor / sigma, 0)
    # Its value is the divisor, its gradient sigma's times the ratio.
    sigma = torch.where(active, sigma, 0)
    divisor = divisor + (sigma - sigma.detach()) * ratio
    value = divided(weight, divisor)
    return value if target.dtype == weight.dtype else value.to(target.dtype).to(weight.dtype)


def iterated(
    normalization: SpectralNorm,
    weight: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    num_iterations: int,
    *,
    stays: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """New whole vectors of each view after ``num_iterations``; ``stays`` is that of `power_iteration`."""
    with without_autocast(weight):
        return [
            _iterated_view(normalization.eps, view, weight, u, v, num_iterations, stays=stays)
            for view, (u, v) in zip(normalization.views, pairs, strict=True)
        ]


def _pairs_for_use(normalization: SpectralNorm, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """u and v of each view for one use of the whole ``weight``, advanced where the update rule says so."""
    normalization.require_vectors(weight)
    pairs = normalization.pairs()
    if normalization.training and (
        normalization.update == "forward" or (normalization.update == "step" and torch.is_grad_enabled())
    ):
        with torch.no_grad():
            # The backward of compiled code computes again what depends on its inputs entry by entry. Buffers are such
            # inputs, in which another use has written since: so there nothing depends on them but through products.
            stays = not torch.compiler.is_compiling()
            found = iterated(normalization, weight.detach(), pairs, normalization.n_power_iterations, stays=stays)
            if not torch._C._are_functorch_transforms_active():  # a transform allows no writing outside of it
                normalization.write_vectors(*(found if stays else _or_old(found, pairs)))
        return found
    # The graph must not see a later write to the buffers.
    return [(u.clone(), v.clone()) for u, v in pairs]


def _or_old(
    found: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """``found``, and the old vectors where a new one is zero."""
    return [
        (torch.where((u != 0).any(), u, old_u), torch.where((v != 0).any(), v, old_v))
        for (u, v), (old_u, old_v) in zip(found, pairs, strict=True)
    ]


def _iterated_view(
    eps: float, view: MatrixView, weight: Tensor, u: Tensor, v: Tensor, num_iterations: int, *, stays: bool
) -> tuple[Tensor, Tensor]:
    matrix = view.matrix(weight)
    matrix = matrix.to(compute_dtype(matrix.dtype))
    if view.groups == 1:
        return power_vectors(matrix, u.to(matrix), v.to(matrix), num_iterations, eps=eps, stays=stays)
    _, rows, columns = matrix.shape
    # The block that the vectors are of goes on from them.
    left, right, is_theirs = view.block_vectors(u.to(matrix), v.to(matrix))
    left = torch.where(is_theirs[:, None], left, chirp(rows, matrix))
    right = torch.where(is_theirs[:, None], right, chirp(columns, matrix))
    found = power_iteration(matrix, left, right, num_iterations + _COLD_ITERATIONS, eps=eps, stays=stays)
    return view.vectors_of_largest(*found)[:2]


def rayleigh(views: Sequence[MatrixView], weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """|u^H W v|, differentiable in the weight; the mean over the views.

    A norm is not negative, but u^H W v is where the vectors stayed and the weight's sign did not.
    """
    found = [_product(view, weight, u, v).abs() for view, (u, v) in zip(views, pairs, strict=True)]
    return found[0] if len(found) == 1 else torch.stack(found).mean()


def turned(
    views: Sequence[MatrixView], weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """The same u and v, each u with the sign (of a complex weight, the phase) for which u^H W v is not negative."""
    signs = [_product(view, weight, u, v).sgn() for view, (u, v) in zip(views, pairs, strict=True)]
    return [(u * torch.where(sign == 0, 1, sign).to(u.dtype), v) for sign, (u, v) in zip(signs, pairs, strict=True)]


def _product(view: MatrixView, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    matrix = view.whole_matrix(weight)
    matrix = matrix.to(compute_dtype(matrix.dtype))
    with without_autocast(weight):
        u, image = u.to(matrix), torch.mv(matrix, v.to(matrix))
        return torch.vdot(u, image) if matrix.is_complex() else torch.dot(u, image)
