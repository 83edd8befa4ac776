"""Attention with a Lipschitz constant: by distance instead of by inner product (Kim, Papamakarios and Mnih 2021).

Dot-product attention has no Lipschitz constant: its logits are products of two values that grow with the input. Here
the logits are squared distances, one projection gives queries, keys and values, and what a token receives is a mean of
its neighbours: of N tokens q_i,

    y_i = sum_j P_ij q_j,        P_ij = exp(-t_ij) / sum_k exp(-t_ik),        t_ij = |q_i - q_j|^2 / tau.

Its Lipschitz constant in the 2-norm is at most `l2_attention_bound`, whatever tau, the features and tokens are: with
w e^(w + 1) = N - 1 and k e^(k + 1) = 1,

    L <= 1 + 2 w + sqrt(N) (1/2 + 2 sqrt(w min(w, k (1 + sqrt(w)))))    for N > 1.

The proof is in the documentation of the other Lipschitz layers. Theorem 3.2 of the paper has sqrt(N) (4 w + 1) for one
head. Both are loose: gradient ascent over tokens finds slopes up to 1.6, 2.1, 2.7 and 3.7 for N = 2, 4, 9 and 32, where
this is 3.1, 5.4, 9.2 and 19.9.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg.rounding import round_up

__all__ = ["L2Attention", "l2_attention_bound"]


class L2Attention(nn.Module):
    """Each token becomes the mean of all tokens, weighted by how near they are; without parameters.

    The queries are keys and values at the same time, which is what makes it Lipschitz: put a linear layer before it and
    one behind it. `l2_attention_bound` is its constant, and `spectralnorm.certify` knows it.

    Args:
        num_heads: the features fall into as many equal parts, each of which has weights of its own.
        temperature: tau, what squared distances are divided by; None: the root of a head's number of features.
        bounded: divide the result by the constant, so that the layer is 1-Lipschitz.

    Raises:
        UserError: ``num_heads`` or ``temperature`` is not positive; in the forward: the number of features is not a
            multiple of ``num_heads``, or the tokens have another number of dimensions than three.

    >>> tokens = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [30.0, 40.0]]])
    >>> L2Attention()(tokens)
    tensor([[[ 0.,  0.],
             [ 0.,  0.],
             [30., 40.]]])
    """

    def __init__(self, num_heads: int = 1, *, temperature: float | None = None, bounded: bool = False) -> None:
        super().__init__()
        if num_heads < 1:
            raise UserError(f"num_heads must be positive, got {num_heads}.")
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"temperature must be a positive number or None, got {temperature}.")
        self.num_heads = num_heads
        self.temperature = temperature
        self.bounded = bounded

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, tokens, features)``; the result has the same shape."""
        if tokens.ndim != 3 or tokens.shape[2] % self.num_heads:
            raise UserError(
                f"L2Attention takes tokens of shape (batch, tokens, features) with a multiple of {self.num_heads} "
                f"features, got {tuple(tokens.shape)}."
            )
        heads = tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        temperature = math.sqrt(heads.shape[-1]) if self.temperature is None else self.temperature
        # What is common to a row does nothing: |q_i|^2.
        squares = heads.square().sum(-1, keepdim=True).mT
        # Written out: torch's fused attention has no second derivative, which gradient penalties need.
        shares = torch.softmax((2 * heads @ heads.mT - squares) / temperature, dim=-1)
        means = (shares @ heads).transpose(1, 2).flatten(2)
        return means / l2_attention_bound(tokens.shape[1]) if self.bounded else means

    def extra_repr(self) -> str:
        bounded = ", bounded=True" if self.bounded else ""
        return f"num_heads={self.num_heads}, temperature={self.temperature}{bounded}"


@lru_cache(maxsize=256)
def l2_attention_bound(num_tokens: int) -> float:
    """A number that the Lipschitz constant of `L2Attention` in the 2-norm does not exceed: see the head of this file.

    Args:
        num_tokens: N, at least 1; the bound grows with it.

    Returns:
        The bound, rounded up to a float32, so that dividing by it is the same in all types.

    Raises:
        UserError: there is no token.

    >>> round(l2_attention_bound(1), 6), round(l2_attention_bound(64), 1), round(l2_attention_bound(256), 1)
    (1.0, 30.0, 67.5)
    """
    if num_tokens < 1:
        raise UserError(f"num_tokens must be positive, got {num_tokens}.")
    if num_tokens == 1:
        return 1.0
    most, single = _root_of_product(num_tokens - 1), _root_of_product(1)
    length = math.sqrt(most * min(most, single * (1 + math.sqrt(most))))
    bound = 1 + 2 * most + math.sqrt(num_tokens) * (0.5 + 2 * length)
    # Sixteen roundings up to here, each of half a unit in the last place.
    return float(round_up(torch.tensor(bound * (1 + 2.0**-48), dtype=torch.float64, device="cpu"), torch.float32))


def _root_of_product(product: float) -> float:
    """The w with ``w e^(w + 1) = product``, rounded up."""
    low, high = 0.0, 1.0 + math.log(product)  # at the latter, w >= 1 and e^(w + 1) >= product
    for _ in range(100):
        middle = (low + high) / 2
        if middle * math.exp(middle + 1) < product * (1 + 2.0**-48):
            low = middle
        else:
            high = middle
    return high
