"""``strict=True`` through what a bound that starts from the last one might not survive."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import spectralnorm as sn
from spectralnorm import spectral_norm
from spectralnorm.linalg import convolution_upper_bound
from spectralnorm.parametrizations.strict import Target, careful_divisor, frobenius_above, rounded_within
from spectralnorm.transform import load_tracking_state, tracking_state

LAYERS = {
    "dense": (lambda: nn.Linear(20, 30), None),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, padding=1), None),
    "few frequencies": (lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 4)),
    "stride": (lambda: nn.Conv2d(3, 4, 4, stride=2, padding=1), (6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 3)),
}
SIZE = (6, 6)


def raw(layer):
    return layer.parametrizations.weight.original


def exact_norm(layer, weight, size):
    """By SVD in float64 of the matrix, or of what the layer does to every unit image; less what it may be off by."""
    weight = weight.detach().double().cpu()
    if weight.ndim == 2:
        return torch.linalg.svdvals(weight)[0].item() * (1 - 1e-14)
    plain = sn.remove_spectral_norm(copy.deepcopy(layer)).double().cpu()
    size = size or SIZE
    units = torch.eye(plain.in_channels * math.prod(size), dtype=torch.float64).view(-1, plain.in_channels, *size)
    outputs = functional_call(plain, {"weight": weight, "bias": None}, units).detach()
    return torch.linalg.svdvals(outputs.flatten(1))[0].item() * (1 - 1e-13)


def one_direction(weight):
    """A kernel of rank one that is the same at all taps: the norm of its map is as large as it can be."""
    return torch.ones_like(weight) * 3


def sequence(layer, optimizer):
    """Changes of the weight, each by an optimizer's step or by a write, that leave nothing as it was."""

    def step(direction, size):
        weight = raw(layer)
        for group in optimizer.param_groups:
            group["lr"] = size
        weight.grad = direction.to(weight)
        optimizer.step()

    def write(change):
        with torch.no_grad():
            raw(layer).copy_(change(raw(layer)))

    weight = raw(layer)
    kept = copy.deepcopy(layer.state_dict())
    yield "small step", lambda: step(torch.randn_like(weight), 1e-4)
    yield "huge step", lambda: step(torch.randn_like(weight), 100.0)
    yield "step to another direction", lambda: step(raw(layer).detach() - one_direction(weight), 1.0)
    yield "step that flips the sign", lambda: step(2 * raw(layer).detach(), 1.0)
    yield "step to nearly nothing", lambda: step(raw(layer).detach() * (1 - 1e-4), 1.0)
    yield "step out of it", lambda: step(one_direction(weight), 1e3)
    yield "not a number", lambda: write(lambda w: w * math.nan)
    yield "step from there", lambda: step(torch.randn_like(weight), 1e-2)
    yield "recovery", lambda: write(torch.randn_like)
    yield "step after it", lambda: step(torch.randn_like(weight), 1e-2)
    yield "zero", lambda: write(torch.zeros_like)
    yield "step from zero", lambda: step(torch.randn_like(weight), 1e-3)
    yield "load", lambda: layer.load_state_dict(kept)
    yield "step after the load", lambda: step(torch.randn_like(weight), 1e-2)
    yield "write between steps", lambda: write(lambda w: w.flip(0) + one_direction(w))
    yield "two steps at once", lambda: [step(torch.randn_like(weight), 0.3) for _ in range(2)]
    yield (
        "one entry",
        lambda: write(lambda w: torch.zeros_like(w).index_fill_(0, torch.tensor([1], device=w.device), 7.0)),
    )
    yield "step that adds to all taps", lambda: step(-one_direction(weight), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)
def test_no_change_of_the_weight_gets_above_the_coefficient(make, size, dtype, device):
    layer = spectral_norm(make().to(device, dtype), strict=True, coefficient=0.9, input_size=size)
    optimizer = torch.optim.SGD([raw(layer)], lr=1.0)
    for number, (what, change) in enumerate(sequence(layer, optimizer)):
        change()
        layer.train(number % 2 == 0)
        value = layer.weight
        if not bool(raw(layer).isfinite().all()) or not bool((raw(layer) != 0).any()):
            continue
        assert 0.3 < exact_norm(layer, value, size) <= 0.9, what
        with torch.autocast(device.type, torch.bfloat16):
            assert exact_norm(layer, layer.weight, size) <= 0.9, what
        assert exact_norm(layer, copy.deepcopy(layer).weight, size) <= 0.9, what


@pytest.mark.parametrize("vectors", ["zero", "not finite", "stranger", "of another shape"])
def test_vectors_that_are_no_use_cost_nothing_but_time(vectors):
    layer = spectral_norm(nn.Conv2d(3, 5, 3, padding=1), strict=True, input_size=(4, 4))
    optimizer = torch.optim.SGD([raw(layer)], lr=0.1)
    part = layer.parametrizations.weight[0]
    changed = {
        "zero": torch.zeros_like,
        "not finite": lambda kept: kept * math.nan,
        "stranger": torch.randn_like,
        "of another shape": lambda kept: kept[1:],
    }[vectors]
    part.symbol_vectors = changed(part.symbol_vectors)
    raw(layer).grad = torch.randn_like(raw(layer))
    optimizer.step()
    assert exact_norm(layer, layer.weight, (4, 4)) <= 1
    cold = convolution_upper_bound(raw(layer), part.geometry, (4, 4)).item()
    assert part.sigma_upper(raw(layer)).item() == pytest.approx(cold, rel=0.02)


@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)
def test_resumed_training_is_the_same_to_the_last_bit(make, size):
    def steps(layer, optimizer, number):
        random = torch.Generator().manual_seed(number)
        for _ in range(number):
            optimizer.zero_grad()
            weight = layer.weight
            (weight * torch.randn(weight.shape, generator=random)).sum().backward()
            optimizer.step()

    def made():
        layer = spectral_norm(make(), strict=True, input_size=size)
        return layer, torch.optim.Adam([raw(layer)], lr=1e-2)

    layer, optimizer = made()
    steps(layer, optimizer, 5)
    value = layer.weight
    again, its_optimizer = made()
    again.load_state_dict(layer.state_dict())
    load_tracking_state(again, copy.deepcopy(tracking_state(layer)))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(value, again.weight)
    steps(layer, optimizer, 4)
    steps(again, its_optimizer, 4)
    assert torch.equal(raw(layer), raw(again))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (600, 500)])
def test_frobenius_norm_of_the_rounding_is_a_bound(shape, scale):
    for weight in (torch.ones(shape) * scale, torch.randn(shape).clamp(-3, 3) * scale):
        exact = weight.double().norm().item()
        assert exact * (1 - 1e-12) <= frobenius_above(weight).item() <= exact * 1.1
    assert frobenius_above(torch.zeros(shape)) == 0
    assert not frobenius_above(torch.full(shape, math.nan)).isfinite()
    assert not frobenius_above(torch.full(shape, math.inf)).isfinite()


@pytest.mark.parametrize("upper", [0.0, 1e-13, 0.3, 1.0, 1.0 + 1e-9, 7.0, math.inf, math.nan])
@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("coefficient", [1.0, 0.25, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_divided_by_as_a_tensor_is(upper, cap, coefficient, dtype) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    target = Target(coefficient, cap, 1e-12, dtype, gain=2.0)
    divisor, active = careful_divisor(weight, torch.tensor(upper, dtype=torch.float64), target)
    found, is_active = careful_divisor(weight, upper, target)
    assert is_active is bool(active)
    assert found == pytest.approx(float(divisor), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_value_keeps_its_bound_in_numbers_of_a_narrower_type(size, dtype):
    coefficient = 0.7025  # the number of bfloat16 that is nearest is above it
    layer = spectral_norm(nn.Linear(size, size), strict=True, coefficient=coefficient)
    target = layer.parametrizations["weight"][0].target(torch.float32)
    rounded = rounded_within(layer.weight.detach(), target, dtype)
    assert torch.equal(rounded, rounded.to(dtype).float())
    assert 0.95 * coefficient < torch.linalg.matrix_norm(rounded.double(), 2) <= coefficient
