"""Kernels under autocast: to float16, to which the interpreter rounds as a GPU does."""

import copy

import pytest
import torch
from tests.parametrizations.kernel_runs import TRITON, assert_equal_runs, trained, without_kernels
from torch import nn

import spectralnorm as sn

pytestmark = [pytest.mark.usefixtures("with_kernels"), pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)]


def test_training_is_that_of_the_plain_engine(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).to(device)
    runs, num_steps = [], 4
    for is_plain in (False, True):
        if is_plain:
            without_kernels(monkeypatch, TRITON)
        model = sn.add_spectral_norm(copy.deepcopy(plain))
        forward = model.forward
        model.forward = lambda x, forward=forward: _under_autocast(forward, x).float().sum(1)
        runs.append(trained(model, num_steps, device))
    # Torch rounds the sum of two gradients and the kernels do not: at each step an entry of float16 may come out a
    # unit further. Vectors stay in float32.
    unit = torch.finfo(torch.float16).eps
    assert_equal_runs(*runs, tolerance=num_steps * unit, of_vectors=unit)


def test_values_are_rounded_once_and_from_then_on_with_the_division(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounded_apart = []
    copied = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, _: rounded_apart.append(to[0].dtype) or copied(to, _))
    x = torch.randn(3, 12, device=device)
    model(x).sum().backward()
    optimizer.step()
    for _ in range(3):
        optimizer.zero_grad()
        outputs = [_under_autocast(lambda each: each.weight, layer) for layer in (*model, *model)]
        for output, layer in zip(outputs, (*model, *model), strict=True):
            assert output.dtype == torch.float16
            assert torch.equal(output, layer.weight.half())
            assert layer.parametrizations.weight[0]._kept.rounded.outputs is not None  # rounded with the others
        sum(_under_autocast(model, x).float().square().sum() for _ in range(3)).backward()
        assert all(layer.parametrizations.weight.original.grad.dtype == torch.float32 for layer in model)
        optimizer.step()
    assert rounded_apart.count(torch.float16) == 1
    held = _under_autocast(lambda each: each.weight, model[0])
    before = held.clone()
    optimizer.step()
    assert not torch.equal(_under_autocast(lambda each: each.weight, model[0]), before)
    assert torch.equal(held, before)


def test_a_write_into_a_rounded_value_becomes_the_weight(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(6, 5))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(3, 6, device=device)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            _under_autocast(lambda each: each.weight, model[0]).copy_(torch.full((5, 6), 2.0))
        torch.testing.assert_close(model[0].weight, torch.full((5, 6), 1 / 30**0.5, device=device))


def _under_autocast(function, argument):
    device = next(argument.parameters()).device if isinstance(argument, nn.Module) else argument.device
    with torch.autocast(device.type, torch.float16):
        return function(argument)
