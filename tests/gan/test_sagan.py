import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.testing import assert_close

from spectralnorm import add_spectral_norm
from spectralnorm.errors import UserError
from spectralnorm.gan.models.resnet import ResNetGenerator, UpBlock
from spectralnorm.gan.models.sagan import LipschitzSelfAttention2d, SAGANDiscriminator, SAGANGenerator, SelfAttention2d
from spectralnorm.layers import l2_attention_bound


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _attention_parameters(channels: int) -> int:
    # Four 1x1 convolutions without biases: to an eighth twice, to a half and back; and the scale.
    return 2 * channels * (channels // 8) + 2 * channels * (channels // 2) + 1


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs


def test_the_small_networks_have_the_parameters_of_the_public_implementation():
    # Counted in torch-mimicry 0.1.16: SAGANGenerator32 and SAGANDiscriminator32 with ten classes.
    with torch.device("meta"):
        assert _num_parameters(SAGANGenerator(image_size=32, num_classes=10)) == 4_386_308
        assert _num_parameters(SAGANDiscriminator(image_size=32, num_classes=10)) == 1_075_586


def test_the_networks_of_the_paper_are_the_residual_ones_with_attention_and_wider_convolutions():
    with torch.device("meta"):
        generator, plain_generator = SAGANGenerator(num_classes=1000), ResNetGenerator(image_size=128, num_classes=1000)
        discriminator = SAGANDiscriminator(num_classes=1000)
    # In torch-mimicry 0.1.16, SAGANGenerator128 has 42,078,852 and CGANPDGenerator128 41,996,931.
    assert _num_parameters(generator) == 42_078_852
    assert _num_parameters(generator) - _num_parameters(plain_generator) == _attention_parameters(256)
    # The authors' discriminator.py: 64, 128, 256, 512, 1024, 1024, both convolutions of a block to its own channels, a
    # 1x1 shortcut except in the last; attention on 128 channels; dense logit; embedding of 1000 classes.
    widths = [3, 64, 128, 256, 512, 1024]
    expected = sum(_conv(a, b, 3) + _conv(b, b, 3) + _conv(a, b, 1) for a, b in pairwise(widths))
    expected += 2 * _conv(1024, 1024, 3) + _attention_parameters(128) + 1025 + 1000 * 1024
    assert _num_parameters(discriminator) == expected


@pytest.mark.parametrize(
    ("image_size", "in_generator", "in_discriminator"), [(32, 16, 8), (64, 32, 16), (128, 32, 32), (256, 32, 32)]
)
def test_attention_stands_where_the_paper_puts_it(image_size: int, in_generator: int, in_discriminator: int):
    generator = SAGANGenerator(image_size=image_size, width=1)
    discriminator = SAGANDiscriminator(image_size=image_size, width=1)
    seen: list[torch.Size] = []
    for network in (generator, discriminator):
        for module in network.modules():
            if isinstance(module, SelfAttention2d):
                module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    images = generator(torch.randn(2, 128))
    assert images.shape == (2, 3, image_size, image_size)
    assert discriminator(images).shape == (2,)
    assert [shape[2:] for shape in seen] == [(in_generator, in_generator), (in_discriminator, in_discriminator)]


def test_at_128_px_attention_follows_the_third_block_up_and_the_second_down():
    with torch.device("meta"):
        generator, discriminator = SAGANGenerator(), SAGANDiscriminator()
    assert generator.attention.query.in_channels == generator.blocks[2].conv2.out_channels == 256
    assert [type(block).__name__ for block in discriminator.blocks][:3] == ["DownBlock", "DownBlock", "SelfAttention2d"]
    assert isinstance(generator.blocks[0], UpBlock)


def test_attention_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    layer = SelfAttention2d(16).double()
    maps = torch.randn(1, 16, 4, 6, dtype=torch.float64)
    assert torch.equal(layer(maps), maps), "the scale begins at zero"
    with torch.no_grad():
        layer.scale.fill_(0.7)
    queries, keys, values = layer.query(maps)[0], max_pool2d(layer.key(maps), 2)[0], max_pool2d(layer.value(maps), 2)[0]
    answers = torch.zeros(8, 4, 6, dtype=torch.float64)
    for row in range(4):
        for column in range(6):
            energies = {(i, j): (queries[:, row, column] @ keys[:, i, j]).item() for i in range(2) for j in range(3)}
            total = sum(math.exp(energy) for energy in energies.values())
            for (i, j), energy in energies.items():
                answers[:, row, column] += math.exp(energy) / total * values[:, i, j]
    assert_close(layer(maps), maps + 0.7 * layer.output(answers[None]))


def test_attention_has_the_second_derivative_that_gradient_penalties_need():
    layer = SelfAttention2d(8).double()
    with torch.no_grad():
        layer.scale.fill_(1.0)
    maps = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (maps,))


def test_spectral_norm_takes_the_convolutions_of_the_attention_along_in_both_networks():
    for network in (SAGANGenerator(image_size=32, width=8), SAGANDiscriminator(image_size=32, width=8)):
        add_spectral_norm(network)
        normalized = [name for name, _ in network.named_parameters() if name.endswith(".original")]
        attention = [name for name in normalized if ".query." in name or ".key." in name or ".value." in name]
        assert len(attention) == 3
        weights = [name for name, tensor in network.named_parameters() if tensor.dim() > 1]
        assert sorted(weights) == sorted(normalized)


def test_attention_begins_glorot_uniform():
    weight = SelfAttention2d(256).query.weight
    deviation = math.sqrt(2 / (256 + 32))
    assert weight.abs().max() <= math.sqrt(3) * deviation * 1.000001
    assert weight.std().item() == pytest.approx(deviation, rel=4 * 0.45 / math.sqrt(weight.numel()))


def test_attention_by_distance_is_the_formula_of_its_docstring(device: torch.device):
    layer = LipschitzSelfAttention2d(16).double().to(device)
    maps = torch.randn(1, 16, 4, 6, dtype=torch.float64, device=device)
    queries = layer.query(2 * avg_pool2d(maps, 2))[0]
    answers = torch.zeros_like(layer.output(queries[None]))
    for row in range(2):
        for column in range(3):
            squares = (queries - queries[:, row : row + 1, column : column + 1]).square().sum(0)
            shares = torch.softmax(-squares.flatten() / math.sqrt(2), 0).unflatten(0, (2, 3))
            mean = (shares * queries).sum((1, 2)) / l2_attention_bound(6)
            answers[0, :, row, column] = layer.output(mean[None, :, None, None])[0, :, 0, 0]
    repeated = answers.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(layer(maps), (maps + repeated / 2) / 2)


def test_attention_by_distance_stretches_nothing_if_its_convolutions_do_not(device: torch.device):
    for scale in (0.1, 1.0, 10.0):
        layer = LipschitzSelfAttention2d(8).double().to(device)
        with torch.no_grad():
            for convolution in (layer.query, layer.output):
                convolution.weight /= torch.linalg.matrix_norm(convolution.weight[..., 0, 0], 2)
        maps = scale * torch.randn(8, 4, 4, dtype=torch.float64, device=device)
        jacobian = torch.autograd.functional.jacobian(lambda x, layer=layer: layer(x[None])[0], maps)
        assert torch.linalg.matrix_norm(jacobian.reshape(128, 128), 2) <= 1 + 1e-12


def test_the_slope_of_attention_grows_with_its_input_at_the_same_weights():
    # Why it has no certificate. Kim et al. 2021, proof of Theorem 3.1: where what is asked for is zero, the answers are
    # plain means, and their derivative is the covariance of keys and values, which grows as the square of the features.
    torch.manual_seed(0)
    layer = SelfAttention2d(8).double()
    with torch.no_grad():
        layer.scale.fill_(1.0)
    maps = torch.randn(8, 8, 8, dtype=torch.float64)
    query = layer.query.weight[0, :, 0, 0].detach()
    maps[:, 0, 0] -= query * (query @ maps[:, 0, 0]) / (query @ query)  # this pixel asks for nothing

    def slope(size: float) -> float:
        jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0, :, 0, 0], size * maps)
        return float(torch.linalg.matrix_norm(jacobian.flatten(1), 2))

    # Ten times the features, a hundred times the slope, but for what the identity and the means add.
    assert slope(1000.0) == pytest.approx(100 * slope(100.0), rel=0.01)


@pytest.mark.parametrize("image_size", [16, 48, 96])
@pytest.mark.parametrize("build", [SAGANGenerator, SAGANDiscriminator])
def test_a_size_that_is_no_power_of_two_is_refused(build: type[nn.Module], image_size: int):
    with pytest.raises(UserError, match=f"a power of two, at least 32, for SAGAN, got {image_size}"):
        build(image_size=image_size)


def test_labels_are_used_and_asked_for():
    generator = SAGANGenerator(image_size=32, width=1, num_classes=2).eval()
    discriminator = SAGANDiscriminator(image_size=32, width=1, num_classes=2)
    latents = torch.randn(1, 128)
    with torch.no_grad():
        generator.blocks[0].norm1.shifts[1] = 1.0
        images = [generator(latents, torch.tensor([label])) for label in (0, 1)]
        logits = [discriminator(images[0], torch.tensor([label])) for label in (0, 1)]
    assert not torch.equal(*images)
    assert not torch.equal(*logits)
    with pytest.raises(UserError, match="call it with labels"):
        discriminator(images[0])
