"""Optimizers by name."""

import pytest
import torch
from torch import nn

from spectralnorm.gan.optimizers import Muon, make_optimizer, optimizer_names, orthogonalize


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_lowers_a_loss(name: str):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(64, 4)
    targets = inputs.sum(1, keepdim=True).tanh()
    optimizer = make_optimizer("optimizer", name, network.parameters(), lr=0.05, betas=(0.5, 0.9))
    losses = []
    for _ in range(60):
        loss = (network(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_settings_reach_the_optimizer():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer("optimizer", "rmsprop:alpha=0.7,momentum=0.5", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert (optimizer.defaults["alpha"], optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.7, 0.5, 0.1)
    optimizer = make_optimizer("optimizer", "Adam", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert optimizer.defaults["betas"] == (0.5, 0.9)
    optimizer = make_optimizer("optimizer", "adam:betas=0/0.95", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert optimizer.defaults["betas"] == (0.0, 0.95)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_steps_on_vectors_are_adams():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    muon = Muon([ours], lr=0.1, betas=(0.5, 0.9))
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.9))
    for _ in range(10):
        gradient = torch.randn(5)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_moves_a_kernel_by_an_orthogonal_step_of_its_size():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(8, 3, 2, 2))
    kernel.grad = torch.randn_like(kernel)
    Muon([kernel], lr=0.1, muon_lr=0.5).step()
    values = torch.linalg.svdvals(kernel.detach().flatten(1) / 0.5)
    assert values.min() > 0.3
    assert values.max() < 1.3
