"""GroupSort: activations that keep the length of every gradient.

A strict critic with ReLU loses gradient at each layer: with ReLU even the absolute value is out of reach of a network
whose weights have norm one. One that sorts its features is 1-Lipschitz and loses nothing (Anil, Lucas, Grosse 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError

__all__ = ["GroupSort", "MaxMin"]


class GroupSort(nn.Module):
    """Sorts the features within each group of neighbours, smallest first (Anil et al. 2019, section 4.1).

    1-Lipschitz in every p-norm, because sorting is. Wherever it has a derivative, that is a permutation.

    Args:
        group_size: features to a group; None: all of them together, which is FullSort.
        dim: the dimension that counts features.

    Raises:
        UserError: ``group_size`` is not positive; in the forward: it does not divide the number of features.

    >>> GroupSort(3)(torch.tensor([[3.0, 1.0, 2.0, -1.0, 5.0, 0.0]]))
    tensor([[ 1.,  2.,  3., -1.,  0.,  5.]])
    """

    def __init__(self, group_size: int | None = 2, *, dim: int = 1) -> None:
        super().__init__()
        if group_size is not None and group_size < 1:
            raise UserError(f"group_size must be positive or None, got {group_size}.")
        self.group_size = group_size
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        """Any shape; the result has the same."""
        grouped = _grouped(features, self.group_size, self.dim)
        dim = self.dim if self.dim < 0 else self.dim + 1
        return grouped.sort(dim=dim).values.flatten(dim - 1, dim)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class MaxMin(nn.Module):
    """The larger, then the smaller of each two neighbouring features: `GroupSort` of pairs, the other way round.

    1-Lipschitz and keeps the length of gradients as that does, and is quicker. The usual choice (Anil et al. 2019).

    Args:
        dim: the dimension that counts features.

    Raises:
        UserError: in the forward: the number of features is odd.

    >>> MaxMin()(torch.tensor([[3.0, 1.0, 2.0, 5.0]]))
    tensor([[3., 1., 5., 2.]])
    """

    def __init__(self, *, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        """Any shape; the result has the same."""
        dim = self.dim if self.dim < 0 else self.dim + 1
        first, second = _grouped(features, 2, self.dim).unbind(dim)
        # At a tie max and min would share the gradient between both and so shorten it.
        is_larger = first >= second
        larger, smaller = torch.where(is_larger, first, second), torch.where(is_larger, second, first)
        return torch.stack((larger, smaller), dim=dim).flatten(dim - 1, dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _grouped(features: Tensor, group_size: int | None, dim: int) -> Tensor:
    """With a further dimension after ``dim``, or at -1 for the last, that counts the features of one group."""
    num_features = features.shape[dim]
    if group_size is not None and num_features % group_size:
        raise UserError(
            f"The features of dimension {dim} must fall into groups of {group_size}, but there are {num_features}; "
            "choose a width that is a multiple of it."
        )
    size = num_features if group_size is None else group_size
    return features.unflatten(dim, (-1, size)) if size else features.unsqueeze(dim)
