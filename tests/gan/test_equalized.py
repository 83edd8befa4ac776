import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spectralnorm import add_spectral_norm, remove_spectral_norm
from spectralnorm.gan.initialization import INITIALIZATIONS
from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear, ScaledLeakyReLU


def _layers(device: torch.device) -> list[tuple[nn.Module, torch.Tensor]]:
    return [
        (EqualizedConv2d(5, 6, 3, padding=1).to(device), torch.randn(2, 5, 8, 8, device=device)),
        (EqualizedLinear(40, 30).to(device), torch.randn(2, 40, device=device)),
        (EqualizedLinear(40, 30, learning_rate=0.01).to(device), torch.randn(2, 40, device=device)),
    ]


def _linear_part(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return layer(inputs) - layer(torch.zeros_like(inputs))


def _apply(layer: nn.Module, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim == 2:
        return inputs @ weight.T
    return nn.functional.conv2d(inputs, weight, padding=layer.padding)


def test_a_layer_computes_with_its_weight_times_one_over_the_root_of_its_fan_in(device: torch.device):
    for layer, inputs in _layers(device):
        fan_in = layer.weight[0].numel()
        rate = getattr(layer, "bias_gain", 1.0)
        expected = _apply(layer, inputs, layer.weight * rate / math.sqrt(fan_in))
        assert_close(_linear_part(layer, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning_rate", [1.0, 0.01])
def test_raw_weights_begin_normal_with_deviation_one_over_the_learning_rate(learning_rate: float):
    layer = EqualizedLinear(200, 300, learning_rate=learning_rate, bias=1.0)
    # 60,000 normal numbers: their deviation is known to 1 / sqrt(120,000) = 0.3 %; four times that is allowed.
    assert layer.weight.std().item() * learning_rate == pytest.approx(1, rel=0.0116)
    assert (layer.bias == 1).all()
    inputs = torch.randn(1000, 200)
    layer.bias.data.zero_()
    assert layer(inputs).square().mean().item() == pytest.approx(1, rel=0.05)


def test_the_scaled_leaky_relu_keeps_the_mean_square_nearly(device: torch.device):
    inputs = torch.randn(200_000, device=device)
    # E = 2 * (1 + 0.2^2) / 2 = 1.04
    assert ScaledLeakyReLU()(inputs).square().mean().item() == pytest.approx(1.04, rel=0.02)


def test_a_normalized_layer_uses_the_normalized_weight_alone(device: torch.device):
    for layer, inputs in _layers(device):
        weight = layer.weight.detach().clone()
        add_spectral_norm(layer, n_power_iterations=200)
        sigma = torch.linalg.matrix_norm(weight.flatten(1), 2)
        # Normalizing the weight times its gain is the same: any factor of W divides out of W / sigma(W).
        assert_close(_linear_part(layer, inputs), _apply(layer, inputs, weight / sigma), rtol=1e-3, atol=1e-4)


def test_removing_the_normalization_leaves_the_function(device: torch.device):
    for layer, inputs in _layers(device):
        add_spectral_norm(layer)
        before = layer(inputs)
        remove_spectral_norm(layer)
        assert torch.equal(layer(inputs), before)


def test_baked_weights_are_loaded_with_the_gain_they_were_saved_with(device: torch.device):
    for layer, inputs in _layers(device):
        fresh = copy.deepcopy(layer)
        add_spectral_norm(layer)
        expected = layer(inputs)
        fresh.load_state_dict(remove_spectral_norm(layer).state_dict())
        assert torch.equal(fresh(inputs), expected)


def test_a_training_step_of_a_normalized_layer_does_not_depend_on_the_gain(device: torch.device):
    layer = EqualizedConv2d(5, 6, 3, padding=1).to(device)
    plain = nn.Conv2d(5, 6, 3, padding=1).to(device)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name != "_extra_state"})
    inputs = torch.randn(2, 5, 8, 8, device=device)
    for each in (layer, plain):
        add_spectral_norm(each)
        each(inputs).square().sum().backward()
    first, second = (each.parametrizations.weight.original.grad for each in (layer, plain))
    assert first.abs().max() > 0
    assert_close(first, second)


def test_orthogonal_initialization_makes_the_effective_weight_orthogonal_and_keeps_the_bias():
    layer = EqualizedLinear(40, 30, bias=1.0)
    INITIALIZATIONS["orthogonal"](layer)
    effective = (layer(torch.eye(40)) - layer(torch.zeros(40))).T
    assert_close(effective @ effective.T, torch.eye(30), rtol=0, atol=1e-5)
    assert (layer.bias == 1).all()
