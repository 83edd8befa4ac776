import math

import pytest
import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.gan.models.mlp import ImageMLPDiscriminator, ImageMLPGenerator, MLPDiscriminator, MLPGenerator


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(2,), (7,), (1, 4, 4)])
def test_latents_become_samples_and_samples_logits(shape: tuple[int, ...], device: torch.device):
    generator = MLPGenerator(shape=shape, width=8, latent_dim=3).to(device)
    discriminator = MLPDiscriminator(shape=shape, width=8).to(device)
    samples = generator(torch.randn(5, 3, device=device))
    assert samples.shape == (5, *shape)
    assert discriminator(samples).shape == (5,)


def test_points_are_unbounded_unless_asked():
    latents = 100 * torch.randn(50, 2)
    torch.manual_seed(0)
    assert MLPGenerator()(latents).abs().max() > 1
    assert MLPGenerator(bounded=True)(latents).abs().max() <= 1


def test_the_parameters_are_those_of_dense_layers():
    assert _num_parameters(MLPGenerator(width=10, num_hidden=3, latent_dim=4)) == 4 * 10 + 10 + 2 * (110) + 10 * 2 + 2
    assert _num_parameters(MLPDiscriminator(width=10, num_hidden=1)) == 2 * 10 + 10 + 10 + 1
    assert _num_parameters(ImageMLPGenerator()) == 101 * 512 + 513 * 512 + 513 * 1024
    assert _num_parameters(ImageMLPDiscriminator()) == 1025 * 512 + 513 * 512 + 513


@pytest.mark.parametrize(("build", "slope"), [(ImageMLPGenerator, 0.0), (ImageMLPDiscriminator, 0.2)])
def test_weights_begin_normal_with_the_deviation_of_he(build: type[nn.Module], slope: float):
    dense = [module for module in build().modules() if isinstance(module, nn.Linear)]
    for layer in dense:
        gain = 1.0 if layer is dense[-1] else math.sqrt(2 / (1 + slope**2))
        # The deviation of n normal numbers varies by 1 / sqrt(2 n): four of those.
        tolerance = 4 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(gain / math.sqrt(layer.in_features), rel=tolerance)
        assert layer.bias.abs().max() <= 1 / math.sqrt(layer.in_features)
        assert layer.out_features == 1 or layer.bias.any()


def test_no_hidden_layer_is_refused():
    for build in (MLPGenerator, MLPDiscriminator):
        with pytest.raises(UserError, match="num_hidden must be at least 1, got 0"):
            build(num_hidden=0)
