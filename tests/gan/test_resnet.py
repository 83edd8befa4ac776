import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from spectralnorm import add_spectral_norm, summary
from spectralnorm.errors import UserError
from spectralnorm.gan.models.resnet import (
    ClassBatchNorm2d,
    DownBlock,
    ResNetDiscriminator,
    ResNetGenerator,
    UpBlock,
)

_SIZES = (32, 48, 64, 128)


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("image_size", "generator", "discriminator"),
    # Counted in torch-mimicry 0.1.16: SNGANGenerator32, SNGANDiscriminator32 and so on. By hand at 32 px: dense
    # 129 * 4096; three blocks of two 3x3 convolutions (256 * 2304 + 256), a 1x1 (256 * 256 + 256) and two norms (512);
    # norm 512; to the image 27 * 256 + 3.
    [
        (32, 4_276_739, 1_053_825),
        (48, 4_878_083, 10_141_441),
        (64, 12_220_675, 10_141_441),
        (128, 32_150_787, 29_017_857),
    ],
)
def test_the_networks_have_the_parameters_of_the_public_implementation(
    image_size: int, generator: int, discriminator: int
):
    with torch.device("meta"):
        assert _num_parameters(ResNetGenerator(image_size=image_size)) == generator
        assert _num_parameters(ResNetDiscriminator(image_size=image_size)) == discriminator


def test_the_conditional_networks_have_the_parameters_of_the_public_implementation():
    # Counted in torch-mimicry 0.1.16: CGANPDGenerator32 and CGANPDDiscriminator32 with ten classes.
    with torch.device("meta"):
        assert _num_parameters(ResNetGenerator(image_size=32, num_classes=10)) == 4_304_387
        assert _num_parameters(ResNetDiscriminator(image_size=32, num_classes=10)) == 1_055_105


@pytest.mark.parametrize(
    ("image_size", "start", "up", "down", "halves"),
    [
        (32, 4, (256, 256, 256), (128, 128, 128, 128), (True, True, False, False)),
        (48, 6, (256, 128, 64), (64, 128, 256, 512, 1024), (True, True, True, True, False)),
        (64, 4, (512, 256, 128, 64), (64, 128, 256, 512, 1024), (True,) * 5),
        (128, 4, (1024, 512, 256, 128, 64), (64, 128, 256, 512, 1024, 1024), (True,) * 5 + (False,)),
    ],
)
def test_the_channels_are_those_of_the_tables(
    image_size: int, start: int, up: tuple[int, ...], down: tuple[int, ...], halves: tuple[bool, ...]
):
    with torch.device("meta"):
        generator, discriminator = ResNetGenerator(image_size=image_size), ResNetDiscriminator(image_size=image_size)
    assert generator.first_map[1:] == (start, start)
    assert start * 2 ** len(generator.blocks) == image_size
    assert tuple(block.conv2.out_channels for block in generator.blocks) == up
    assert tuple(block.conv2.out_channels for block in discriminator.blocks) == down
    assert tuple(isinstance(block.pool, nn.AvgPool2d) for block in discriminator.blocks) == halves


@pytest.mark.parametrize("image_size", _SIZES)
def test_labels_go_in_and_images_and_logits_come_out(image_size: int, device: torch.device):
    sizes = {"image_size": image_size, "channels": 1, "width": 2, "num_classes": 3}
    generator = ResNetGenerator(**sizes, latent_dim=5).to(device)
    discriminator = ResNetDiscriminator(**sizes).to(device)
    labels = torch.tensor([0, 2], device=device)
    images = generator(torch.randn(2, 5, device=device), labels)
    assert images.shape == (2, 1, image_size, image_size)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


def _plain(layer: nn.Conv2d) -> nn.Module:
    """The layer's own 3x3 convolution, without the change of resolution beside it."""
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1).to(layer.weight)
    plain.load_state_dict(layer.state_dict())
    return plain


def test_an_up_block_is_its_definition():
    block = UpBlock(3, 4).double().eval()
    maps = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    upsample = nn.Upsample(scale_factor=2, mode="nearest")
    conv1 = _plain(block.conv1)
    residual = nn.Sequential(block.norm1, nn.ReLU(), upsample, conv1, block.norm2, nn.ReLU(), block.conv2)
    assert_close(block(maps), residual(maps) + block.shortcut(upsample(maps)))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_down_block_is_its_definition(is_first: bool):
    block = DownBlock(3, 4, is_first=is_first).double()
    maps = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = [] if is_first else [nn.ReLU()]
    residual = nn.Sequential(*before, block.conv1, nn.ReLU(), _plain(block.conv2), nn.AvgPool2d(2))
    assert_close(block(maps), residual(maps) + nn.functional.avg_pool2d(block.shortcut(maps), 2))
    assert block.conv1.out_channels == (4 if is_first else 3)


def test_the_shortcut_has_weights_only_where_channels_or_size_change():
    assert isinstance(DownBlock(4, 4, downsample=False).shortcut, nn.Identity)
    assert isinstance(DownBlock(4, 5, downsample=False).shortcut, nn.Conv2d)
    assert isinstance(DownBlock(4, 4, downsample=True).shortcut, nn.Conv2d)


def test_the_projection_is_the_inner_product_of_embedding_and_features():
    discriminator = ResNetDiscriminator(image_size=32, width=2, num_classes=3).double()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    features = discriminator.blocks(images).relu().sum((2, 3))
    embedded = discriminator.head.embedding.weight[labels]
    expected = discriminator.head.dense(features)[:, 0] + torch.einsum("nf,nf->n", embedded, features)
    assert_close(discriminator(images, labels), expected)


def test_batch_normalization_by_class_begins_as_plain_and_then_scales_each_class():
    norm = ClassBatchNorm2d(3, 2).double()
    maps = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    plain = nn.functional.batch_norm(maps, None, None, training=True)
    assert_close(norm(maps, labels), plain)
    with torch.no_grad():
        norm.scales[1], norm.shifts[1] = 2.0, 3.0
    assert_close(norm(maps, labels)[[0, 3]], plain[[0, 3]])
    assert_close(norm(maps, labels)[[1, 2]], 2 * plain[[1, 2]] + 3)


@pytest.mark.parametrize("build", [ResNetGenerator, ResNetDiscriminator])
def test_missing_and_unexpected_labels_are_told(build: type[nn.Module]):
    inputs = torch.randn(2, 128) if build is ResNetGenerator else torch.randn(2, 3, 32, 32)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="call it with labels"):
        build(width=1, num_classes=4)(inputs)
    with pytest.raises(UserError, match="built without classes"):
        build(width=1)(inputs, labels)


def test_another_image_size_is_refused():
    for build in (ResNetGenerator, ResNetDiscriminator):
        with pytest.raises(UserError, match="one of 32, 48, 64, 128 for the residual networks, got 40"):
            build(image_size=40)


def _glorot_deviation(weight: Tensor, gain: float) -> float:
    # Uniform on [-a, a] with a = gain sqrt(6 / (fan_in + fan_out)) has deviation a / sqrt(3) (Glorot & Bengio 2010).
    receptive = weight[0, 0].numel() if weight.dim() > 2 else 1
    return gain * math.sqrt(2 / ((weight.shape[0] + weight.shape[1]) * receptive))


@pytest.mark.parametrize("build", [ResNetGenerator, ResNetDiscriminator])
def test_weights_begin_glorot_uniform_with_a_larger_gain_in_blocks(build: type[nn.Module]):
    seen = 0
    for name, module in build(image_size=32, width=32, num_classes=200).named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            gain = math.sqrt(2) if ".conv" in name else 1.0
            deviation = _glorot_deviation(module.weight, gain)
            assert module.weight.abs().max() <= deviation * math.sqrt(3) * 1.000001
            if module.weight.numel() > 4000:
                # The deviation of n uniform numbers varies by 0.45 / sqrt(n): four of those.
                tolerance = 4 * 0.45 / math.sqrt(module.weight.numel())
                assert module.weight.std().item() == pytest.approx(deviation, rel=tolerance)
                seen += 1
            assert getattr(module, "bias", None) is None or not module.bias.any()
    assert seen >= 7


def test_spectral_norm_takes_the_embedding_of_the_projection_but_no_scale_of_batch_normalization():
    discriminator = add_spectral_norm(ResNetDiscriminator(width=2, num_classes=3))
    generator = add_spectral_norm(ResNetGenerator(width=2, num_classes=3))
    assert "head.embedding" in str(summary(discriminator))
    normalized = [name for name, _ in generator.named_parameters() if name.endswith(".original")]
    assert len(normalized) == 1 + 3 * 3 + 1
    assert generator(torch.randn(2, 128), torch.tensor([0, 2])).shape == (2, 3, 32, 32)
