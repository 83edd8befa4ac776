"""Strict weights by the compiled kernels, among others."""

import copy

import pytest
import torch
from tests.parametrizations.kernel_runs import (
    COMPILED,
    Mixed,
    are_kept_by_kernels,
    assert_equal_runs,
    normalizations,
    trained,
    without_kernels,
)
from torch import Tensor, nn

import spectralnorm as sn


@pytest.mark.parametrize("mode", ["normalize", "cap"])
@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
def test_strict_weights_are_renewed_among_others_as_by_the_plain_engine(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = Mixed().to(device)
    sn.add_spectral_norm(model, include=["linear", "narrow", "convolution", "last"], strict=True, mode=mode)
    sn.add_spectral_norm(model, include=["transposed", "grouped"], strict=True, input_size=(4, 4), coefficient=2.0)
    sn.add_spectral_norm(model, include=["same", "grouped_transposed"], mode=mode, coefficient=0.7)
    plain = copy.deepcopy(model)
    mine = trained(model, 4, device)
    assert all(are_kept_by_kernels(model))
    uppers = [each.sigma_upper(_raw_weight(model, name)) for name, each in _strict(model)]
    without_kernels(monkeypatch, with_kernels)
    theirs = trained(plain, 4, device)
    assert not any(are_kept_by_kernels(plain))
    assert_equal_runs(mine, theirs, 5e-4, of_vectors=2e-3)
    assert len(uppers) == 6
    for mine_upper, (name, its) in zip(uppers, _strict(plain), strict=True):
        assert float(mine_upper) == pytest.approx(float(its.sigma_upper(_raw_weight(plain, name))), rel=1e-3)
    # Second derivatives are those of the bound.
    x = torch.randn(3, 12, device=device)
    for each in (model, plain):
        each.zero_grad()
        (slope,) = torch.autograd.grad(each(x.requires_grad_()).sum(), x, create_graph=True)
        slope.square().sum().backward()
    for (name, mine_parameter), its in zip(model.named_parameters(), plain.parameters(), strict=True):
        if its.grad is not None:
            scale = float(its.grad.abs().max()) + 1e-6
            assert float((mine_parameter.grad - its.grad).abs().max()) <= 2e-3 * scale, name


def _strict(model: nn.Module) -> list[tuple[str, sn.SpectralNorm]]:
    return [(name, each) for name, each in normalizations(model).items() if each.strict]


def _raw_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name.split(".")[0]).parametrizations.weight.original


@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
@pytest.mark.usefixtures("with_kernels")
def test_the_graph_of_a_strict_value_keeps_what_it_was_divided_by(device: torch.device) -> None:
    layer = sn.spectral_norm(nn.Linear(9, 7, bias=False), strict=True).to(device)
    raw = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD([raw], lr=1.0)
    x, direction = torch.randn(4, 9, device=device), torch.randn(7, 9, device=device)
    layer(x).sum().backward()
    optimizer.step()
    value = layer.weight
    expected, _ = torch.autograd.grad(value, raw, direction, retain_graph=True)[0], raw.grad.fill_(0.3)
    optimizer.step()
    layer(x).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, value)
    assert torch.equal(torch.autograd.grad(value, raw, direction)[0], expected)


@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.usefixtures("with_kernels")
def test_a_strict_weight_without_a_norm_leaves_the_others_alone_and_recovers(bad: float, device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(3)), strict=True).to(device)
    x = torch.randn(4, 9, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sum(layer(x).sum() for layer in model).backward()
    weights = [layer.parametrizations.weight.original for layer in model]
    for weight in weights:
        weight.grad.zero_()
    weights[1].grad = weights[1].detach().clone() if bad == 0 else torch.full_like(weights[1], bad)
    optimizer.step()
    for layer in (model[0], model[2]):
        assert 0.999 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) <= 1
        assert layer(x).isfinite().all()
    if bad == 0:
        assert not model[1].weight.any()
    with torch.no_grad():
        weights[1].normal_()
    optimizer.zero_grad()
    sum(layer(x).sum() for layer in model).backward()
    optimizer.step()
    for layer in model:
        assert 0.999 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) <= 1
