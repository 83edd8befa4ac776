"""Models that kernels renew, restored from files and copied."""

import copy

import pytest
import torch
from tests.parametrizations.kernel_runs import trained
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.transform import load_tracking_state, tracking_state


@pytest.mark.usefixtures("with_kernels")
def test_a_restored_model_and_a_copy_go_on_to_the_last_bit(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    trained(model, 3, device)
    weights, tracked = copy.deepcopy(model.state_dict()), tracking_state(model)
    restored = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    restored.load_state_dict(weights)
    load_tracking_state(restored, {name: part.clone() for name, part in tracked.items()})
    copied = copy.deepcopy(model)
    first, *others = (trained(each, 2, device) for each in (model, restored, copied))
    for other in others:
        for of_first, of_other in zip(first, other, strict=True):
            for name, each in of_first.items():
                assert torch.equal(each, of_other[name]), name


@pytest.mark.usefixtures("with_kernels")
def test_a_copy_keeps_its_gradient_when_the_original_goes_on(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 1))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(4, 9, device=device)

    def gradients(of: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(of(x).square().sum(), list(of.parameters())))

    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    before = gradients(model)
    copied = copy.deepcopy(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model(x)
    for mine, its in zip(gradients(copied), before, strict=True):
        assert torch.equal(mine, its)
