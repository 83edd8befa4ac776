"""The norm of a convolution for a certificate: float64, each rounding error bounded, tight to what a torus allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.patches import as_patches
from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.rigorous import rigorous_matrix_bound
from spectralnorm.linalg.symbol import largest_symbol_above
from spectralnorm.linalg.torus import OnTorus, on_torus

__all__ = ["rigorous_convolution_bound"]

_LAYER_EXCESS = 0.04
"""Of `convolution_upper_bound` as a strict layer calls it: a certificate must not be looser."""


@torch.no_grad()
def rigorous_convolution_bound(
    weight: Tensor,
    geometry: ConvolutionGeometry,
    input_size: Sequence[int] | None = None,
    *,
    max_excess: float = 0.01,
) -> float:
    """An upper bound of the 2-norm of a convolution with the weight as stored, rounded upward.

    Args:
        weight: as in `ConvolutionGeometry.apply`, real or complex; read exactly.
        geometry: of the convolution.
        input_size: of the images along each axis; None: the bound holds for all sizes.
        max_excess: what a bound for all sizes may lose by looking at a finite number of frequencies, relative; a
            quarter of it for a given size. The rest is within 1e-8 of what the torus allows.

    Returns:
        Zero for a zero weight, infinity for one that is not finite.

    Raises:
        UserError: ``input_size`` does not fit, or ``max_excess`` is not positive.
    """
    double = weight.detach().to(torch.promote_types(weight.dtype, torch.float64))
    excesses = sorted({max_excess, _LAYER_EXCESS})
    problems = [on_torus(double, geometry, input_size, max_excess=excess) for excess in excesses]
    # On the torus itself, and on no grid in its place, there is nothing that the other grid could do better.
    if problems[0].sizes in (problems[-1].sizes, _torus_alone(double, geometry, input_size)):
        problems = problems[:1]
    with full_precision(weight.device):
        bounds: list[float] = []
        # The finer grid first: usually its bound is the smaller one, and the other grid soon shows that it is.
        for problem in problems:
            bounds.append(_bound(problem, enough=min(bounds, default=math.inf)))
        patches = as_patches(double, geometry, input_size)
        if patches is not None:
            norm = max(map(rigorous_matrix_bound, patches.matrices))
            bounds.append(math.nextafter(norm * patches.factor, math.inf))
        return min(bounds)


def _torus_alone(
    weight: Tensor, geometry: ConvolutionGeometry, input_size: Sequence[int] | None
) -> tuple[int, ...] | None:
    """The sizes of the torus, with no grid in its place."""
    if input_size is None:
        return None
    return on_torus(weight[:1, :1], replace(geometry, groups=1), input_size, max_excess=1e-12).sizes


def _bound(problem: OnTorus, *, enough: float) -> float:
    if math.prod(problem.sizes) == 1:  # a matrix for each group
        matrices = problem.kernel.flatten(2)
        norm = max(map(rigorous_matrix_bound, matrices)) + problem.moved
        return math.nextafter(norm * problem.factor * (1 + 2.0**-50), math.inf) if norm > 0 else 0.0
    return float(largest_symbol_above(problem, margin=1e-9, enough=enough))
