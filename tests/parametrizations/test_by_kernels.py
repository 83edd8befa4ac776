"""Kernels give the numbers of the plain engine: in C on the CPU; Triton's on the GPU, or in its interpreter."""

import copy

import pytest
import torch
from tests.parametrizations.kernel_runs import (
    COMPILED,
    TRITON,
    Mixed,
    are_kept_by_kernels,
    assert_equal_runs,
    normalizations,
    trained,
    without_kernels,
)
from torch import nn

import spectralnorm as sn
from spectralnorm.parametrizations import engine


@pytest.mark.usefixtures("whole_float32")
@pytest.mark.parametrize("mode", ["normalize", "cap"])
def test_training_gives_the_numbers_of_the_plain_engine(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = Mixed().to(device)
    model.convolution.to(memory_format=torch.channels_last)
    coefficient = {"linear": 0.5, "last": 3.0} if mode == "normalize" else 0.7
    sn.add_spectral_norm(model, mode=mode, coefficient=coefficient)
    plain = copy.deepcopy(model)
    steps = 3 if mode == "normalize" else 2
    mine = trained(model, steps, device)
    assert all(are_kept_by_kernels(model))
    without_kernels(monkeypatch, with_kernels)
    theirs = trained(plain, steps, device)
    assert not any(are_kept_by_kernels(plain))
    # The plain engine's small algebra is in single precision, the compiled one's in double: a vector is known to the
    # rounding divided by the gap to the next value. Triton's does as the engine.
    assert_equal_runs(mine, theirs, 2e-4, of_vectors=2e-3 if with_kernels == COMPILED else 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)
def test_half_types_are_followed_in_float32(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 1))).to(device, dtype)
    plain = copy.deepcopy(model)
    x = torch.randn(7, 12, device=device, dtype=dtype)
    found = []
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).sum().backward()
            optimizer.step()
        found.append([each[0].weight, each[2].weight, normalizations(each)["0.parametrizations.weight.0"]._u])
        assert all(are_kept_by_kernels(each)) is (each is model)
        without_kernels(monkeypatch, with_kernels)
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3 * torch.finfo(dtype).eps)


def test_what_the_kernels_cannot_read_goes_the_plain_way_beside_them(device: torch.device, with_kernels: str) -> None:
    model = Mixed().to(device)
    sn.add_spectral_norm(model, include=["linear", "narrow"])
    sn.add_spectral_norm(model, include=["same"], norm="bidirectional")
    sn.add_spectral_norm(model, include=["convolution"], strict=True)
    sn.add_spectral_norm(model, include=["last"], norm="operator", input_size=(6, 6))
    trained(model, 3, device)
    found = dict(zip(normalizations(model), are_kept_by_kernels(model), strict=True))
    # Triton's kernels leave strict weights to the engine.
    strict = {"convolution"} if with_kernels == COMPILED else set()
    assert {name.split(".")[0] for name, is_by_kernels in found.items() if is_by_kernels} == {
        "linear",
        "narrow",
    } | strict
    assert {name.split(".")[0] for name, is_by in found.items() if not is_by} == {
        "same",
        "convolution",
        "last",
    } - strict
    for name in ("linear", "narrow", "same"):
        norm = torch.linalg.matrix_norm(getattr(model, name).weight, 2)
        assert abs(float(norm.detach()) - 1) < 0.1


def test_a_backward_through_some_of_the_layers_gives_their_gradients_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10, bias=False) for _ in range(4))).to(device)
    plain, x = copy.deepcopy(model), torch.randn(4, 9, device=device)
    gradients = []
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        sum(layer(x).square().sum() for layer in each).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in each:
            layer(x)
        (each[1](x).square().sum() + each[3](x).square().sum()).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
        without_kernels(monkeypatch, with_kernels)
    assert gradients[0][0] is gradients[0][2] is None
    for place in (1, 3):
        torch.testing.assert_close(gradients[0][place], gradients[1][place], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("with_kernels")
def test_second_derivatives_and_separate_backwards_work(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 1))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        real = torch.randn(4, 9, device=device, requires_grad=True)
        score = model(real).sum()
        (slope,) = torch.autograd.grad(score, real, create_graph=True)
        slope.square().sum().backward(retain_graph=True)
        first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert sum(float(each.abs().sum()) for each in first) > 0
        score.backward()
        model(torch.randn(4, 9, device=device)).sum().backward()
        optimizer.step()
    assert all(are_kept_by_kernels(model))


@pytest.mark.usefixtures("with_kernels")
def test_weights_with_nodes_of_their_own_get_the_same_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    alone = copy.deepcopy(model)
    together = trained(model, 3, device)
    nodes = []
    apply = engine.NormalizedWeights.apply
    monkeypatch.setattr(
        engine.NormalizedWeights, "apply", lambda quotients, *w: nodes.append(len(w)) or apply(quotients, *w)
    )
    monkeypatch.setattr(engine, "_sends_gradients", lambda: True)
    monkeypatch.setattr(engine, "_SMALL", 0)
    for mine, its in zip(together, trained(alone, 3, device), strict=True):
        for name, each in mine.items():
            assert torch.equal(each, its[name]), name
    assert set(nodes) == {1}
