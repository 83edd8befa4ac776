"""Two early rivals of spectral normalization, which act on the weights of a discriminator directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralnorm.gan.weight_norms import matrix_of, weights_of

__all__ = ["OrthonormalPenalty", "clip_weights"]


@torch.no_grad()
def clip_weights(parameters: Sequence[Tensor], limit: float) -> None:
    """Bring every entry of every parameter into [-limit, limit], in place (Arjovsky et al. 2017, Algorithm 1)."""
    for parameter in parameters:
        parameter.clamp_(-limit, limit)


class OrthonormalPenalty:
    """``sum |W W' - I|_F^2`` over the weights of a network (Brock et al. 2017, eq. 3; Miyato et al. 2018, section 4).

    A kernel is the matrix of its outputs against all else. Of a matrix with more rows than columns the columns are made
    orthonormal, since its rows cannot be. A last layer with one output is a row, whose length is drawn to 1.

    Args:
        network: looked through once for its weights.
    """

    def __init__(self, network: nn.Module) -> None:
        self._weights = [candidate for _, candidate in weights_of(network)]

    def __call__(self) -> Tensor:
        """The penalty, a scalar, of the weights as they are used now."""
        penalties = []
        for candidate in self._weights:
            matrix = matrix_of(candidate, getattr(candidate.module, candidate.tensor_name))
            gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
            identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
            penalties.append((gram - identity).square().sum())
        return torch.stack(penalties).sum()
