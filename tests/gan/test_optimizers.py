"""Optimizers by name."""

import math

import pytest
import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.gan.optimizers import Muon, check_optimizer, make_optimizer, optimizer_names, orthogonalize


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer_lowers_a_loss(name: str, device: torch.device):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    inputs = torch.randn(64, 4, device=device)
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


def test_one_kernel_for_all_weights_is_asked_for_where_torch_has_it():
    def optimizer(name: str, device: str) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.zeros(2, device=device))]
        return make_optimizer("optimizer", name, parameters, lr=0.1, betas=(0.5, 0.9))

    assert optimizer("adagrad", "cpu").defaults["fused"]
    assert optimizer("adam", "cpu").defaults["fused"]
    assert not optimizer("adagrad", "meta").defaults["fused"]
    assert "fused" not in optimizer("rmsprop", "cpu").defaults


def test_settings_reach_the_optimizer():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer("optimizer", "rmsprop:alpha=0.7,momentum=0.5", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert (optimizer.defaults["alpha"], optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.7, 0.5, 0.1)
    optimizer = make_optimizer("optimizer", "Adam", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert optimizer.defaults["betas"] == (0.5, 0.9)
    optimizer = make_optimizer("optimizer", "adam:betas=0/0.95", [parameter], lr=0.1, betas=(0.5, 0.9))
    assert optimizer.defaults["betas"] == (0.0, 0.95)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("adam:differentiable=true", "has no option 'differentiable'; choose among betas, eps"),
        ("rmsprop:capturable=true", "has no option 'capturable'"),
        ("adam:lr=0.1", "the step size is a setting of its own"),
        ("adam:amsgrad=3", "amsgrad must be true or false, got 3"),
        ("sgd:momentum=abc", "momentum must be a number, got 'abc'"),
        ("adam:betas=0.1", "betas must be 2 numbers, such as 0.9/0.999, got 0.1"),
        ("muon:ns_steps=2.5", "ns_steps must be a whole number, got 2.5"),
        ("adam:weight_decay=true", "weight_decay must be a number, got True"),
        ("sgd:nesterov=true", "Nesterov momentum requires a momentum"),
        ("adam:foreach=7,fused=no", "cannot"),
    ],
)
def test_an_option_that_cannot_be_is_told_in_one_sentence(setting: str, says: str):
    with pytest.raises(UserError, match=says) as told:
        check_optimizer("generator_optimizer", setting)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("setting", ["sgd:momentum=0.9,nesterov=true", "adam:amsgrad=true,foreach=true", "adafactor"])
def test_an_option_that_can_be_is_taken(setting: str):
    check_optimizer("generator_optimizer", setting)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
@pytest.mark.parametrize("smallest", [0.0025, 0.1, 1.0])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors(smallest: float, shape: tuple[int, int]):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(math.log(smallest), 0, min(shape), dtype=torch.float64).exp()
    matrix = left @ values.diag() @ right
    assert values[0] >= 0.002 * matrix.norm()
    assert_near_orthogonal(left.T @ orthogonalize(matrix) @ right.T)


def assert_near_orthogonal(diagonal: torch.Tensor, tolerance: float = 1e-9) -> None:
    """What is written in the singular vectors of the matrix that it is made of."""
    values = diagonal.diag()
    torch.testing.assert_close(diagonal, values.diag(), rtol=0, atol=tolerance)
    assert values.min() > 0.68
    assert values.max() < 1.21


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


@pytest.mark.parametrize(("outputs", "size"), [(8, 0.5), (48, 1.0)], ids=["wide", "tall"])
def test_muon_moves_a_kernel_by_an_orthogonal_step_of_its_size(outputs: int, size: float):
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(outputs, 3, 2, 2))
    kernel.grad = torch.randn_like(kernel)
    left, _, right = torch.linalg.svd(kernel.grad.flatten(1), full_matrices=False)
    Muon([kernel], lr=0.1, muon_lr=0.5).step()
    assert_near_orthogonal(left.T @ (-kernel.detach().flatten(1) / size) @ right.T, tolerance=1e-5)
