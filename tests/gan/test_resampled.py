"""Convolutions that are one with a change of resolution: the same numbers as the two steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import spectralnorm as sn
from spectralnorm.gan.models.resampled import DoubledConv2d, HalvedConv2d


def _steps(layer: nn.Conv2d) -> nn.Module:
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1).to(layer.weight)
    plain.load_state_dict(layer.state_dict())
    if isinstance(layer, DoubledConv2d):
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), plain)
    return nn.Sequential(plain, nn.AvgPool2d(2))


@pytest.mark.parametrize("size", [(2, 2), (4, 10)])
@pytest.mark.parametrize("kind", [DoubledConv2d, HalvedConv2d])
def test_values_and_gradients_of_both_orders_are_those_of_the_two_steps(kind, size, device: torch.device):
    layer = kind(3, 5).double().to(device)
    steps = _steps(layer)
    images = torch.randn(2, 3, *size, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for network, weight in ((layer, layer.weight), (steps, next(p for p in steps.parameters() if p.ndim == 4))):
        outputs = network(images)
        (of_images,) = torch.autograd.grad(outputs.square().sum(), images, create_graph=True)
        results.append((outputs, of_images, *torch.autograd.grad(of_images.square().sum(), (images, weight))))
    assert_close(results[0], results[1])


@pytest.mark.parametrize("training", [True, False])
def test_halving_is_the_same_in_training_and_evaluation(training: bool):
    layer = HalvedConv2d(2, 3).train(training)
    images = torch.randn(1, 2, 6, 6)
    assert_close(layer(images), _steps(layer)(images))


def test_a_certificate_finds_the_layer_and_the_average():
    layer = sn.spectral_norm(HalvedConv2d(2, 3), norm="operator", strict=True, input_size=(8, 8)).eval()
    found = sn.certify(nn.Sequential(layer), (2, 8, 8))
    assert 0.3 < found.upper_bound <= 0.5  # an average of 2x2 pixels has norm 1/2


@pytest.mark.parametrize("kind", [DoubledConv2d, HalvedConv2d])
def test_normalizing_it_normalizes_its_own_kernel(kind):
    layer = kind(4, 6)
    plain = nn.Conv2d(4, 6, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    for each in (layer, plain):
        sn.spectral_norm(each, norm="operator", input_size=(8, 8))
    assert_close(layer.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [DoubledConv2d, HalvedConv2d])
def test_under_autocast_the_summed_kernel_is_rounded_once(kind, dtype, device: torch.device):
    layer = sn.spectral_norm(kind(4, 4)).to(device)
    with torch.no_grad():
        layer.bias.zero_()
        kernel = functional.avg_pool2d(layer.weight, 2, stride=1, padding=1).flip(2, 3)
    # Of an image with one pixel that is 1, each output is one entry of the kernel: nothing else is rounded.
    expected, place = (4 * kernel, slice(3, 7)) if kind is DoubledConv2d else (kernel[:, :, ::2, ::2], slice(0, 2))
    for channel in range(4):
        image = torch.zeros(1, 4, 6, 6, device=device)
        image[0, channel, 2, 2] = 1
        with torch.no_grad(), torch.autocast(device.type, dtype):
            assert layer.weight.dtype == torch.float32
            response = layer(image)
        assert torch.equal(response[0, :, place, place], expected[:, channel].to(dtype))
