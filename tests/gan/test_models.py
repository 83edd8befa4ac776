import pytest
import torch
from torch import nn

from spectralnorm import add_spectral_norm
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from spectralnorm.gan.models.sncnn import SNCNNDiscriminator, SNCNNGenerator, SNDCGANDiscriminator


def _channels(network: nn.Module) -> list[int]:
    return [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "image_size", "channels"),
    [
        (name, size, channels)
        for name, each in ARCHITECTURES.items()
        for size in each.image_sizes
        for channels in each.channels
    ],
)
def test_every_architecture_maps_latents_to_images_to_logits(
    name: str, image_size: int, channels: int, device: torch.device
):
    sizes = {"image_size": image_size, "channels": channels, "width": 2}
    generator = ARCHITECTURES[name].generator(**sizes, latent_dim=8).to(device)
    discriminator = ARCHITECTURES[name].discriminator(**sizes).to(device)
    images = generator(torch.randn(3, 8, device=device))
    assert images.shape == (3, channels, image_size, image_size)
    assert ARCHITECTURES[name].makes_points or images.abs().max() <= 1
    assert discriminator(images).shape == (3,)


# StyleGAN2's first map, which nothing goes into, and R3GAN's, which each channel of the latent scales.
NO_WEIGHTS = {"constant", "basis"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_spectral_norm_takes_every_weight_of_every_network(name: str):
    architecture = ARCHITECTURES[name]
    sizes = {"image_size": 32, "channels": 1, "width": 2}
    for network in (architecture.generator(**sizes, latent_dim=8), architecture.discriminator(**sizes)):
        add_spectral_norm(network)
        weights = [name for name, each in network.named_parameters() if each.dim() > 1 and name not in NO_WEIGHTS]
        assert weights == [name for name, _ in network.named_parameters() if name.endswith(".original")]


def test_dcgan_has_the_channels_of_its_paper_at_64_px():
    assert _channels(DCGANGenerator()) == [512, 256, 128, 64, 3]
    assert _channels(DCGANDiscriminator()) == [64, 128, 256, 512, 1]


def test_dcgan_has_the_parameters_of_the_public_implementation():
    # The PyTorch example's netG and netD (nz=100, ngf=ndf=64, nc=3) have 3,576,704 and 2,765,568; ours has a bias on
    # the image layer and on each discriminator convolution, and no batch normalization in the discriminator.
    assert _num_parameters(DCGANGenerator()) == 3_576_704 + 3
    batch_norm, biases = 2 * (128 + 256 + 512), 64 + 128 + 256 + 512 + 1
    assert _num_parameters(DCGANDiscriminator()) == 2_765_568 - batch_norm + biases


def test_sncnn_has_the_channels_of_table_3():
    assert _channels(SNCNNGenerator()) == [256, 128, 64, 3]
    assert _channels(SNCNNDiscriminator()) == [64, 64, 128, 128, 256, 256, 512]


def test_sndcgan_has_the_channels_of_the_public_code():
    assert _channels(SNDCGANDiscriminator()) == [64, 128, 128, 256, 256, 512, 512]


@pytest.mark.parametrize(("image_size", "first"), [(32, 4), (48, 6), (64, 8)])
def test_sncnn_starts_from_an_eighth_of_the_image(image_size: int, first: int):
    generator = SNCNNGenerator(image_size=image_size)
    assert generator.dense.out_features == first**2 * 512
    assert SNCNNDiscriminator(image_size=image_size).dense.in_features == first**2 * 512


@pytest.mark.parametrize("build", [DCGANDiscriminator, SNCNNDiscriminator, SNDCGANDiscriminator, SNCNNGenerator])
def test_weights_begin_normal_with_deviation_two_hundredths(build: type[nn.Module]):
    for module in build(image_size=32).modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 10_000:
            assert 0.0195 < module.weight.std().item() < 0.0205
            assert abs(module.weight.mean().item()) < 1e-3
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_discriminator_mixes_the_images_of_a_batch_only_if_it_says_so(name: str):
    discriminator = ARCHITECTURES[name].discriminator(image_size=32, channels=1, width=4)
    images = torch.randn(4, 1, 32, 32)
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    if any(getattr(module, "mixes_images", False) for module in discriminator.modules()):
        assert not torch.allclose(together, alone)
    else:
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("build", [SNCNNGenerator, SNCNNDiscriminator, DCGANGenerator, DCGANDiscriminator])
def test_a_size_that_does_not_halve_is_refused(build: type[nn.Module]):
    with pytest.raises(ValueError, match="image_size"):
        build(image_size=35)
