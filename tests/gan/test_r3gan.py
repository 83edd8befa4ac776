import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.models.r3gan import R3GANDiscriminator, R3GANGenerator
from spectralnorm.gan.penalties import PENALTIES
from spectralnorm.gan.trainer import Trainer


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _residuals(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__ == "_Residual"]


# By hand, at 32 px with 64, 128, 256, 512 channels. A residual block of width w has 2 w^2 + 2 w, in its groups of 16
# 9 * 16 * 2 w + 2 w, and 2 w^2 parameters: 4 w^2 + 292 w. Between the sizes there are 64 * 128 + 128 * 256 + 256 * 512.
def test_the_networks_have_the_parameters_of_their_description():
    blocks = 2 * sum(4 * width**2 + 292 * width for width in (64, 128, 256, 512))
    changes = 64 * 128 + 128 * 256 + 256 * 512
    generator = R3GANGenerator(image_size=32, latent_dim=64)
    assert _num_parameters(generator) == 512 * 16 + 64 * 512 + blocks + changes + 3 * 64
    assert _num_parameters(R3GANDiscriminator(image_size=32)) == 3 * 64 + blocks + changes + 16 * 512 + 512


def test_every_residual_block_begins_as_the_identity(device: torch.device):
    for network in (R3GANGenerator(image_size=32, width=8), R3GANDiscriminator(image_size=32, width=8)):
        blocks = _residuals(network.to(device))
        assert len(blocks) == 8
        for block in blocks:
            features = torch.randn(2, block.layers[0].in_channels, 4, 4, device=device)
            assert torch.equal(block(features), features)


def test_the_layers_of_a_block_begin_with_the_deviation_of_fixup():
    block = _residuals(R3GANDiscriminator(image_size=32, width=64))[-1]  # 512 channels, 8 blocks
    gain = math.sqrt(2 / 1.04) * 8**-0.25
    for layer, fan_in in ((block.layers[0], 512), (block.layers[2], 9 * 16)):
        # Over 100,000 normal numbers: their deviation is known to 0.2 %; four times that is allowed.
        assert layer.weight.std().item() == pytest.approx(gain / math.sqrt(fan_in), rel=0.01)
        assert not layer.bias.any()


def test_nothing_is_normalized_and_no_image_sees_another():
    for network in (R3GANGenerator(image_size=32, width=4), R3GANDiscriminator(image_size=32, width=4)):
        kinds = {type(module).__name__ for module in network.modules()}
        assert not any("Norm" in kind or "Stddev" in kind for kind in kinds)


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_the_penalties_reach_every_weight_that_has_begun(name: str, device: torch.device):
    discriminator = R3GANDiscriminator(image_size=8, channels=2, width=4).to(device, torch.float64)
    for parameter in discriminator.parameters():  # away from the zeros of the start
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64, device=device)
    kernel = _residuals(discriminator)[0].layers[2].weight
    (gradient,) = torch.autograd.grad(PENALTIES[name](discriminator, images, images), kernel)
    direction, step, values = torch.randn_like(kernel), 1e-6, []
    for sign in (1, -1):
        kernel.data.add_(sign * step * direction)
        values.append(PENALTIES[name](discriminator, images, images).item())
        kernel.data.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope != 0
    assert_close((gradient * direction).sum().item(), slope, rtol=1e-5, atol=1e-8)


def test_it_trains_with_its_own_loss_and_penalty(device: torch.device):
    torch.manual_seed(0)
    settings = {"architecture": "r3gan", "normalization": "none", "loss": "relativistic", "penalty": "r1-r2"}
    config = Config(steps=3, batch_size=4, latent_dim=6, penalty_weight=0.1, device=device.type, **settings)
    generator = R3GANGenerator(image_size=8, channels=1, width=4, latent_dim=6)
    discriminator = R3GANDiscriminator(image_size=8, channels=1, width=4)
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    before = [
        parameter.clone().to(device) for network in (generator, discriminator) for parameter in network.parameters()
    ]
    trainer = Trainer(config, generator=generator, discriminator=discriminator, images=images, device=device)
    trainer.run([])
    after = [*trainer.generator.parameters(), *trainer.discriminator.parameters()]
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert trainer.means.pop()["penalty/discriminator"] > 0


@pytest.mark.parametrize("build", [R3GANGenerator, R3GANDiscriminator])
def test_a_size_that_does_not_halve_evenly_is_refused(build: type[nn.Module]):
    with pytest.raises(UserError, match="image_size must halve evenly"):
        build(image_size=35)


def test_the_form_with_a_constant_has_the_parameters_of_the_published_one_and_no_block_that_begins_at_zero():
    published, bounded = (
        R3GANDiscriminator(image_size=32, width=4),
        R3GANDiscriminator(image_size=32, width=4, lipschitz=3.0),
    )
    assert {n: p.shape for n, p in published.named_parameters()} == {n: p.shape for n, p in bounded.named_parameters()}
    for block in _residuals(bounded):
        assert all(layer.weight.any() for layer in block.layers if isinstance(layer, nn.Conv2d))
        features = torch.randn(2, block.layers[0].in_channels, 4, 4)
        assert_close(block(features), (features + block.layers(features)) / 2)
