"""Attention by distance: what it computes, and how far its Jacobian gets towards the constant."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import spectralnorm as sn
from spectralnorm.errors import UserError
from spectralnorm.layers import L2Attention, l2_attention_bound


def _slopes(layer: L2Attention, samples: Tensor) -> Tensor:
    """Norms of the Jacobians at each of (samples, tokens, features)."""
    num = samples[0].numel()
    jacobians = torch.func.vmap(torch.func.jacrev(lambda tokens: layer(tokens[None])[0]))(samples)
    return torch.linalg.matrix_norm(jacobians.reshape(-1, num, num), 2)


def _star(num_tokens: int, radius: float, device: torch.device) -> Tensor:
    """One token in the middle of others that are far from one another: all of them listen to it."""
    around = radius * torch.eye(num_tokens - 1, dtype=torch.float64, device=device)
    return torch.cat([torch.zeros_like(around[:1]), around])


def test_a_token_becomes_the_mean_of_its_neighbours(device: torch.device):
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, device=device)
    expected = torch.zeros_like(tokens)
    for sample in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            for token in range(5):
                squares = [(tokens[sample, token, head] - other[head]).square().sum() for other in tokens[sample]]
                shares = [math.exp(-float(square) / 1.5) for square in squares]
                for share, other in zip(shares, tokens[sample], strict=True):
                    expected[sample, token, head] += share / sum(shares) * other[head]
    torch.testing.assert_close(L2Attention(2, temperature=1.5)(tokens), expected)
    bounded = L2Attention(2, temperature=1.5, bounded=True)(tokens)
    torch.testing.assert_close(bounded * l2_attention_bound(5), expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6, 10])
def test_no_jacobian_exceeds_the_constant(num_tokens: int, device: torch.device):
    layer, bound = L2Attention(), l2_attention_bound(num_tokens)
    for num_features in (1, 2, num_tokens):
        for scale in (0.1, 1.0, 2.0, 4.0):
            samples = scale * torch.randn(30, num_tokens, num_features, dtype=torch.float64, device=device)
            assert _slopes(layer, samples).max() <= bound


@pytest.mark.parametrize("num_tokens", [2, 4, 9])
def test_nor_does_the_steepest_that_is_sought(num_tokens: int, device: torch.device):
    layer, bound = L2Attention(temperature=1.0), l2_attention_bound(num_tokens)
    scales = torch.tensor([0.3, 1.0, 1.5, 2.5], dtype=torch.float64, device=device).repeat_interleave(3)[:, None, None]
    tokens = (scales * torch.randn(12, num_tokens, 1, dtype=torch.float64, device=device)).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=0.05, maximize=True)
    steepest = 0.0
    for _ in range(120):
        optimizer.zero_grad()
        slopes = _slopes(layer, tokens)
        steepest = max(steepest, float(slopes.detach().max()))
        slopes.sum().backward()
        optimizer.step()
    assert 0.25 * bound < steepest <= bound  # found: 0.52, 0.39, 0.28


def test_the_slope_grows_with_the_number_of_tokens(device: torch.device):
    found = []
    for num_tokens in (2, 5, 17):
        radii = torch.linspace(0.8, 2.5, 30).tolist()
        stars = torch.stack([_star(num_tokens, radius, device) for radius in radii])
        found.append(float(_slopes(L2Attention(temperature=1.0), stars).max()))
    assert 1 < found[0] < found[1] < found[2]


def test_the_bound_is_below_the_papers_and_increases():
    bounds = [l2_attention_bound(num_tokens) for num_tokens in range(1, 2000)]
    assert bounds[0] == 1
    assert all(later > earlier for earlier, later in pairwise(bounds))
    for num_tokens in (4, 64, 1024):
        # Kim et al. 2021, Theorem 3.2, of one head: w is what solves w e^(w + 1) = N - 1.
        low, high = 0.0, 20.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.exp(middle + 1) < num_tokens - 1 else (low, middle)
        assert bounds[num_tokens - 1] < math.sqrt(num_tokens) * (4 * high + 1)


def test_a_certificate_reads_the_constant():
    torch.manual_seed(0)
    attention = torch.nn.Sequential(torch.nn.Linear(4, 6), L2Attention(2), torch.nn.Linear(6, 4))
    certificate = sn.certify(attention, (7, 4))
    norms = [torch.linalg.matrix_norm(attention[place].weight.detach().double(), 2).item() for place in (0, 2)]
    assert certificate.upper_bound == pytest.approx(norms[0] * norms[1] * l2_attention_bound(7), rel=1e-5)
    assert 0 < certificate.lower_bound <= certificate.upper_bound
    assert sn.certify(L2Attention(bounded=True), (7, 4)).upper_bound == 1.0


def test_a_temperature_that_was_set_to_what_has_no_bound_is_refused():
    attention = L2Attention()
    attention.temperature = -1.0  # each token becomes the mean of those far from it, and jumps between them

    with pytest.raises(UserError, match=r"temperature -1\.0 it has no bound; use a positive"):
        sn.certify(attention, (3, 2))


def test_it_has_the_second_derivative_that_gradient_penalties_need(device: torch.device):
    tokens = torch.randn(1, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(L2Attention(), (tokens,))


def test_slips_are_told_in_one_sentence():
    with pytest.raises(UserError, match="num_heads must be positive, got 0"):
        L2Attention(0)
    with pytest.raises(UserError, match="temperature must be a positive number or None, got -1"):
        L2Attention(temperature=-1.0)
    with pytest.raises(UserError, match=r"multiple of 4 features, got \(2, 3, 6\)"):
        L2Attention(4)(torch.zeros(2, 3, 6))
    with pytest.raises(UserError, match=r"tokens of shape \(batch, tokens, features\)"):
        L2Attention()(torch.zeros(2, 3))
    with pytest.raises(UserError, match="num_tokens must be positive, got 0"):
        l2_attention_bound(0)
