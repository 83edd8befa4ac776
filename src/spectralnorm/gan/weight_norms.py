"""Singular values of a discriminator's weights, normalized or not: what a run without normalization is watched by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralnorm.gan.parts import whole
from spectralnorm.linalg import compute_dtype, refine, view_of
from spectralnorm.parametrizations import normalization_of
from spectralnorm.transform import monitor
from spectralnorm.transform.selection import Candidate, candidates

__all__ = ["LargestSingularValues", "matrix_of", "spectra", "weights_of"]


class LargestSingularValues:
    """Sigma of each raw weight of a model by its layer's name: as the layer divides by it, or to 1e-3 where none does.

    Args:
        model: looked through once; which of its weights are normalized must not change afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plain = [
            (name, candidate)
            for name, candidate in weights_of(model)
            if normalization_of(candidate.module, candidate.tensor_name) is None
        ]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        plain = {}
        for name, candidate in self._plain:
            matrix = matrix_of(candidate, whole(candidate.weight))
            plain[name] = float(refine(matrix, _direction(matrix), rtol=1e-3).sigma.max())
        return monitor(self._model) | plain


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]]:
    """All singular values of each weight matrix as its layer uses it, largest first, by the layer's name."""
    found = {}
    for name, candidate in weights_of(model):
        matrix = matrix_of(candidate, whole(getattr(candidate.module, candidate.tensor_name)))
        found[name] = torch.linalg.svdvals(matrix.double()).flatten().sort(descending=True).values.tolist()
    return found


def weights_of(model: nn.Module) -> list[tuple[str, Candidate]]:
    """The weights that are normalized, or would be, each with its layer's name."""
    return [
        (candidate.label, candidate)
        for candidate in candidates(model)
        if (candidate.obstacle is None and candidate.reason is None)
        or normalization_of(candidate.module, candidate.tensor_name) is not None
    ]


def matrix_of(candidate: Candidate, weight: Tensor) -> Tensor:
    """A weight of `weights_of`, raw or as it is used, in the view in which it is normalized, or would be: (m, n)."""
    normalization = normalization_of(candidate.module, candidate.tensor_name)
    view = view_of(candidate.module, weight) if normalization is None else normalization.view
    matrix = view.matrix(weight)
    return matrix.to(compute_dtype(matrix.dtype))


def _direction(matrix: Tensor) -> Tensor:
    # Seeded: watching must not touch the run's random numbers.
    random = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[-1], generator=random, dtype=torch.float64).to(matrix)
