"""Averages and target networks: weights that no optimizer moves follow another network, by whatever code."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import spectralnorm as sn
from spectralnorm import spectral_norm
from spectralnorm.parametrizations import kept, unseen_writes


def by_parameters(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    def update() -> None:
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.data.copy_(0.5 * slow.data + 0.5 * fast.data)

    return update


def by_parameters_that_are_held(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))

    def update() -> None:
        for slow, fast in pairs:
            slow.data.lerp_(fast.data, 0.5)

    return update


def by_state_dicts_that_are_held(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    slow, fast = average.state_dict(), model.state_dict()

    def update() -> None:
        for name, tensor in slow.items():
            tensor.data.copy_(0.5 * tensor.data + 0.5 * fast[name].data)

    return update


WAYS = {way.__name__: way for way in (by_parameters, by_parameters_that_are_held, by_state_dicts_that_are_held)}
OPTIONS = {
    "default": {},
    "cap": {"mode": "cap", "coefficient": 0.7},
    "strict": {"strict": True},
    "bidirectional": {"norm": "bidirectional"},
    "operator": {"norm": "operator", "input_size": (8, 8)},
}


def a_network(**options: object) -> nn.Sequential:
    linear = {name: value for name, value in options.items() if name != "input_size"}
    first, last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 5)
    sn.add_spectral_norm(nn.Sequential(first), **options)
    sn.add_spectral_norm(nn.Sequential(last), **linear)
    return nn.Sequential(first, nn.LeakyReLU(0.1), nn.Flatten(), last)


def expected(average: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a network computes that knows nothing but the average's weights."""
    fresh = copy.deepcopy(average)
    fresh.load_state_dict(average.state_dict())
    return fresh.eval()(images)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_average_that_is_written_through_data_is_normalized_as_it_is(way, options, device):
    model = a_network(**options).to(device)
    images = torch.randn(2, 3, 8, 8, device=device)
    model(images)
    average = copy.deepcopy(model).eval()
    update, before = way(average, model), average(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        update()
        with torch.no_grad():
            found = average(images)
        assert not torch.allclose(found, before, rtol=1e-2)
        torch.testing.assert_close(found, expected(average, images), rtol=1e-3, atol=1e-4)
        before = found


@pytest.fixture
def comparisons(monkeypatch) -> list[None]:
    """One for each comparison of numbers."""
    made: list[None] = []
    is_same = unseen_writes.is_same
    for module in (kept, unseen_writes):
        monkeypatch.setattr(module, "is_same", lambda *tensors: made.append(None) or is_same(*tensors))
    return made


def steps(number: int) -> None:
    """Steps of an optimizer of something else."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(1)
    for _ in range(number):
        optimizer.step()


def forget_that_it_is_new(layer: nn.Module) -> None:
    """The first looks at the value of a new layer compare it too, in case it is initialized."""
    for _ in range(40):
        layer.weight  # noqa: B018 - a use


def test_a_network_that_stays_the_same_is_not_normalized_again(comparisons, device, monkeypatch):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    forget_that_it_is_new(layer)
    value = layer.weight.detach()
    monkeypatch.setattr(sn.SpectralNorm, "refined", lambda *_: pytest.fail("computed anew"))
    for _ in range(3):
        steps(2)
        comparisons.clear()
        assert layer.weight.data_ptr() == value.data_ptr()
        assert layer.weight.data_ptr() == value.data_ptr()
        if device.type == "cpu":
            assert len(comparisons) == 1


def test_an_update_of_ones_own_counts_as_a_step_beside_an_average(device):
    model = spectral_norm(nn.Linear(40, 30).to(device))
    model.weight.sum().backward()
    average = copy.deepcopy(model)
    with torch.no_grad(), sn.optimizer_step(model):
        model.parametrizations.weight.original.sub_(0.1)
    average.parametrizations.weight.original.data.mul_(3)
    assert torch.linalg.matrix_norm(average.weight, 2).item() == pytest.approx(1, rel=1e-4)


def test_what_is_recorded_depends_on_no_comparison(comparisons, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    images = torch.ones(2, 40, device=device)
    steps(1)
    graph = make_fx(layer)(images)
    assert not comparisons
    torch.testing.assert_close(graph(images), layer(images))


def test_a_network_that_nobody_trains_beside_is_not_looked_at(comparisons, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    forget_that_it_is_new(layer)
    comparisons.clear()
    layer.weight  # noqa: B018
    assert not comparisons


def test_what_an_optimizer_moves_is_not_compared(comparisons, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer.weight.sum().backward()
        optimizer.step()
        layer.weight  # noqa: B018
        comparisons.clear()
        steps(1)
        layer.weight  # noqa: B018
        assert not comparisons


def test_a_gpu_is_waited_for_less_and_less_often(comparisons, device, monkeypatch):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    forget_that_it_is_new(layer)
    monkeypatch.setitem(unseen_writes._LONGEST_WAIT, "cpu", unseen_writes._LONGEST_WAIT["else"])
    numbers = []
    for step in range(1, 200):
        steps(1)
        comparisons.clear()
        layer.weight  # noqa: B018
        numbers += [step] * len(comparisons)
    assert numbers == [1, 3, 7, 15, 31, 63, 127, 191]
    weight = layer.parametrizations.weight.original
    weight.data.mul_(3)
    steps(64)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-4)
