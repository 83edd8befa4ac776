import math
from itertools import pairwise

import pytest
import torch
from tests.references.upfirdn import upfirdn
from torch import nn
from torch.testing import assert_close

from spectralnorm import add_spectral_norm
from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear
from spectralnorm.gan.models.modulated import ModulatedConv2d, ModulatedConvTranspose2d, modulated_convolution
from spectralnorm.gan.models.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from spectralnorm.gan.normalizations import normalize
from spectralnorm.gan.penalties import PENALTIES, path_length_penalty, path_lengths
from spectralnorm.gan.trainer import Trainer


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _generator(device: torch.device, **settings) -> StyleGAN2Generator:
    sizes = {"image_size": 16, "channels": 2, "width": 3, "latent_dim": 6, "num_mapping_layers": 2, **settings}
    return StyleGAN2Generator(**sizes).to(device, torch.float64)


def _discriminator(device: torch.device, **settings) -> StyleGAN2Discriminator:
    return StyleGAN2Discriminator(image_size=16, channels=2, width=3, **settings).to(device, torch.float64)


# By hand, from the public code (256 px, channel_base 16384, so 512 channels at 4 to 32 px, then 256, 128, 64).
# Mapping, 8 layers of 512: 8 (512^2 + 512) = 2,101,248. Synthesis: a constant of 512 x 4 x 4 = 8,192. A styled 3x3
# convolution i -> o has (512 i + i) + 9 i o + o + 1 parameters (affine, weight, bias, noise strength), a 1x1 one to RGB
# (512 i + i) + 3 i + 3. Convolutions: 512 -> 512 at 4 px (1), 8, 16, 32 px (2 each), then 512 -> 256 -> 256,
# 256 -> 128 -> 128, 128 -> 64 -> 64. The total that the public code prints for this generator is 24,767,458.
def test_the_generator_has_the_parameters_of_the_public_code():
    def styled(narrow: int, wide: int) -> int:
        return 513 * narrow + 9 * narrow * wide + wide + 1

    pairs = [(512, 512)] * 7 + [(512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    to_rgb = sum(513 * width + 3 * width + 3 for width in (512, 512, 512, 512, 256, 128, 64))
    by_hand = 8 * (512**2 + 512) + 512 * 16 + sum(styled(*pair) for pair in pairs) + to_rgb
    with torch.device("meta"):
        generator = StyleGAN2Generator(image_size=256, width=64)
    assert _num_parameters(generator) == by_hand == 24_767_458
    assert generator.num_styles == 14


# A block i -> o of the discriminator has 9 i^2 + i, 9 i o + o and, in its skip without bias, i o parameters; before the
# first one 3 i + i; after the last one 9 * 513 * 512 + 512, then dense 16 * 512 * 512 + 512, then 512 + 1. The total
# that the public code prints at 256 px is 24,001,089, and at 1024 px with channel_base 32768 it is 29,012,513.
@pytest.mark.parametrize(
    ("image_size", "width", "widths", "printed"),
    [
        (256, 64, (64, 128, 256, 512, 512, 512, 512), 24_001_089),
        (1024, 32, (32, 64, 128, 256, 512, 512, 512, 512, 512), 29_012_513),
    ],
)
def test_the_discriminator_has_the_parameters_of_the_public_code(
    image_size: int, width: int, widths: tuple[int, ...], printed: int
):
    blocks = sum(9 * narrow**2 + narrow + 9 * narrow * wide + wide + narrow * wide for narrow, wide in pairwise(widths))
    last = 9 * 513 * 512 + 512 + 16 * 512 * 512 + 512 + 513
    with torch.device("meta"):
        discriminator = StyleGAN2Discriminator(image_size=image_size, width=width, max_width=512)
    assert _num_parameters(discriminator) == 4 * width + blocks + last == printed


@pytest.mark.parametrize(
    ("image_size", "channel_base", "expected"),
    [
        (256, 16384, [64, 128, 256, 512, 512, 512, 512]),
        (256, 32768, [128, 256, 512, 512, 512, 512, 512]),
        (128, 16384, [128, 256, 512, 512, 512, 512]),
        (32, 16384, [512, 512, 512, 512]),
        (32, 2048, [64, 128, 256, 512]),
    ],
)
def test_the_channels_are_those_of_the_public_code(image_size: int, channel_base: int, expected: list[int]):
    with torch.device("meta"):
        discriminator = StyleGAN2Discriminator(
            image_size=image_size, width=min(512, channel_base // image_size), max_width=512
        )
    skips = [
        module for module in discriminator.modules() if isinstance(module, EqualizedConv2d) and module.bias is None
    ]
    assert [skips[0].in_channels, *(skip.out_channels for skip in skips)] == expected


@pytest.mark.parametrize("up", [False, True])
def test_the_modulated_convolution_is_one_with_modulated_weights(up: bool, device: torch.device):
    features, style = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    features, style, weight = features.to(device), style.to(device), weight.to(device)
    outputs = modulated_convolution(features, weight, style, up=up)
    for image, scale, output in zip(features, style, outputs, strict=True):
        modulated = weight * scale[None, :, None, None]
        modulated = modulated / (modulated.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            # Zeros between the pixels, then the convolution in the mathematical sense, with the kernel turned round.
            spread = upfirdn(image[None], [1.0], up=2, down=1, before=0, after=0, gain=1.0)[:, :, :-1, :-1]
            expected = nn.functional.conv2d(spread, modulated.flip(2, 3), padding=2)
        else:
            expected = nn.functional.conv2d(image[None], modulated, padding=1)
        assert_close(output, expected[0])


def _modulated(device: torch.device) -> list[tuple[nn.Module, bool]]:
    layers = [
        (ModulatedConv2d(4, 6, 3), True),
        (ModulatedConvTranspose2d(4, 6), True),
        (ModulatedConv2d(4, 6, 1, demodulate=False), False),
    ]
    return [(layer.to(device, torch.float64), is_demodulated) for layer, is_demodulated in layers]


def test_a_normalized_kernel_counts_where_it_is_not_demodulated(device: torch.device):
    features, style = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    features, style = features.to(device), style.to(device)
    for layer, is_demodulated in _modulated(device):
        weight, before = layer.weight.detach().clone(), layer(features, style)
        add_spectral_norm(layer, n_power_iterations=200)
        after = layer(features, style)
        if is_demodulated:
            assert_close(after, before, rtol=1e-6, atol=1e-6)
        else:
            normalized = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
            assert_close(after, modulated_convolution(features, normalized, style, demodulate=False))


def test_the_strict_bound_of_a_kernel_holds_for_the_map_it_makes(device: torch.device):
    for layer, _ in _modulated(device):
        add_spectral_norm(layer, strict=True, input_size=(4, 4))
        columns = torch.eye(64, dtype=torch.float64, device=device).unflatten(1, (4, 4, 4))
        weight = layer.weight.detach()
        if isinstance(layer, ModulatedConvTranspose2d):
            images = nn.functional.conv_transpose2d(columns, weight, stride=2)
        else:
            images = nn.functional.conv2d(columns, weight, padding=weight.shape[-1] // 2)
        assert 0.5 < torch.linalg.matrix_norm(images.flatten(1), 2).item() <= 1


def test_demodulation_gives_independent_inputs_of_variance_one_outputs_of_variance_one(device: torch.device):
    style = 10 ** torch.randn(2, 8, device=device)
    features = torch.randn(2, 8, 100, 100, device=device)
    outputs = modulated_convolution(features, torch.randn(16, 8, 3, 3, device=device), style)[:, :, 1:-1, 1:-1]
    # About 10,000 pixels per channel, correlated over 3x3 neighbourhoods: the variance is known to some 5 %.
    assert_close(outputs.var((2, 3)), torch.ones(2, 16, device=device), rtol=0, atol=0.2)


def test_no_map_of_the_generator_fades_or_grows_at_the_start(device: torch.device):
    generator = StyleGAN2Generator(image_size=32, width=16, latent_dim=64).to(device)
    seen = []
    for module in generator.modules():
        if type(module).__name__ == "_StyledConvolution":
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.square().mean().item()))
    styles = generator.styles(torch.randn(16, 64, device=device))
    generator.synthesize(styles)
    assert len(seen) == 7
    # Below 1, as each filter and each border takes something away; without the gains it would be 1e-3 and less.
    assert all(0.05 < mean_square < 1.2 for mean_square in seen)
    assert 0.5 < styles.square().mean().item() < 2


def test_no_map_of_the_discriminator_fades_or_grows_at_the_start(device: torch.device):
    discriminator = StyleGAN2Discriminator(image_size=32, width=32).to(device)
    seen = []
    for block in discriminator.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.square().mean().item()))
    discriminator(torch.randn(8, 3, 32, 32, device=device))
    assert len(seen) == 3
    assert all(0.05 < mean_square < 1.2 for mean_square in seen)


def _make_symmetric(network: nn.Module) -> None:
    """Mirror every kernel onto itself, so that the network commutes with mirroring the image."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.copy_((parameter + parameter.flip(3)) / 2)


@pytest.mark.parametrize("lipschitz", [None, 1.0])
def test_a_discriminator_of_symmetric_kernels_does_not_see_a_mirrored_image(
    lipschitz: float | None, device: torch.device
):
    # A resampling that is off by a pixel, or padded on one side only, would show here.
    discriminator = _discriminator(device, lipschitz=lipschitz)
    _make_symmetric(discriminator)
    with torch.no_grad():
        weight = discriminator.dense.weight.unflatten(1, (-1, 4, 4))
        discriminator.dense.weight.copy_(((weight + weight.flip(3)) / 2).flatten(1))
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64, device=device)
    assert_close(discriminator(images.flip(3)), discriminator(images))
    assert not torch.allclose(discriminator(images.flip(2)), discriminator(images))


def test_a_generator_of_symmetric_kernels_makes_symmetric_images(device: torch.device):
    generator = _generator(device).eval()
    _make_symmetric(generator)
    with torch.no_grad():
        generator.constant.copy_((generator.constant + generator.constant.flip(2)) / 2)
    images = generator(torch.randn(2, 6, dtype=torch.float64, device=device))
    assert_close(images, images.flip(3))
    assert not torch.allclose(images, images.flip(2))


def test_noise_is_drawn_in_training_and_fixed_in_eval_mode(device: torch.device):
    generator = _generator(device, style_mixing=0.0)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.ones_(parameter)
    latents = torch.randn(2, 6, dtype=torch.float64, device=device)
    assert not torch.equal(generator(latents), generator(latents))
    generator.eval()
    assert torch.equal(generator(latents), generator(latents))


def test_noise_has_no_strength_at_the_start(device: torch.device):
    generator = _generator(device, style_mixing=0.0)
    latents = torch.randn(2, 6, dtype=torch.float64, device=device)
    assert torch.equal(generator(latents), generator(latents))


def test_mixed_styles_change_from_one_latent_to_another_at_one_layer(device: torch.device):
    generator = _generator(device, style_mixing=1.0)
    styles = generator.styles(torch.randn(64, 6, dtype=torch.float64, device=device))
    changes = (styles[:, 1:] != styles[:, :-1]).any(2)
    assert (changes.sum(1) == 1).all()
    assert set(changes.int().argmax(1).tolist()) == set(range(generator.num_styles - 1))  # each place comes up
    generator.eval()
    styles = generator.styles(torch.randn(4, 6, dtype=torch.float64, device=device))
    assert (styles == styles[:, :1]).all()


def test_styles_are_mixed_as_often_as_asked(device: torch.device):
    generator = _generator(device, style_mixing=0.25)
    styles = generator.styles(torch.randn(4000, 6, dtype=torch.float64, device=device))
    share = (styles != styles[:, :1]).any(2).any(1).double().mean().item()
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


def test_truncation_moves_styles_towards_their_mean(device: torch.device):
    generator = _generator(device, style_mixing=0.0)
    latents = torch.randn(256, 6, dtype=torch.float64, device=device)
    for _ in range(500):
        generator.styles(latents)
    generator.eval()
    styles = generator.styles(latents)
    assert_close(generator.style_average, (1 - 0.998**500) * styles[:, 0].mean(0))
    assert_close(
        generator.styles(latents, truncation=0.7), generator.style_average + 0.7 * (styles - generator.style_average)
    )
    flat = generator(latents[:3], truncation=0.0)
    assert_close(flat, flat[:1].expand_as(flat))


def test_the_end_of_the_generator_is_tanh_unless_it_is_asked_to_be_the_published_one(device: torch.device):
    bounded = _generator(device).eval()
    latents = torch.randn(2, 6, dtype=torch.float64, device=device)
    images = bounded(latents)
    bounded.bounded = False
    assert_close(images, torch.tanh(bounded(latents)))


def _check_slope(value, parameter: torch.Tensor) -> None:
    """Compare the gradient of a value, itself made of gradients, with a central difference along a random direction."""
    (gradient,) = torch.autograd.grad(value(), parameter)
    direction, step, values = torch.randn_like(parameter), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
        values.append(value().item())
        with torch.no_grad():
            parameter.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope != 0
    assert_close((gradient * direction).sum().item(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("lipschitz", [None, 1.0])
def test_r1_of_the_discriminator_can_be_differentiated(lipschitz: float | None, device: torch.device):
    discriminator = _discriminator(device, lipschitz=lipschitz)
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64, device=device)
    layers = [module for module in discriminator.modules() if isinstance(module, EqualizedConv2d | EqualizedLinear)]
    for layer in (layers[0], layers[1], layers[-2]):
        _check_slope(lambda: PENALTIES["r1"](discriminator, images, images), layer.weight)


def test_path_lengths_of_the_generator_can_be_differentiated(device: torch.device):
    generator = _generator(device, style_mixing=0.0).eval()
    latents = torch.randn(2, 6, dtype=torch.float64, device=device)

    def penalty() -> torch.Tensor:
        styles = generator.styles(latents)
        random = torch.Generator(device).manual_seed(1)
        lengths = path_lengths(generator.synthesize(styles), styles, random=random)
        return path_length_penalty(lengths, torch.full_like(lengths[0], 0.5).detach(), decay=0.0)[0]

    for name in (
        "mapping.0.weight",
        "blocks.0.convolutions.0.convolution.weight",
        "blocks.1.convolutions.0.style.weight",
    ):
        _check_slope(penalty, generator.get_parameter(name))


@pytest.mark.parametrize("image_size", [4, 35, 100])
@pytest.mark.parametrize("build", [StyleGAN2Generator, StyleGAN2Discriminator])
def test_a_size_that_does_not_halve_evenly_is_refused(build: type[nn.Module], image_size: int):
    with pytest.raises(UserError, match="image_size must halve evenly"):
        build(image_size=image_size)


@pytest.mark.parametrize("normalization", ["spectral", "none"])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(normalization: str, device: torch.device):
    config = Config(
        steps=4,
        batch_size=4,
        latent_dim=6,
        architecture="stylegan2",
        normalization=normalization,
        loss="nonsaturating",
        penalty="r1",
        penalty_interval=2,
        device=device.type,
    )

    def trainer() -> Trainer:
        torch.manual_seed(0)
        generator = StyleGAN2Generator(image_size=16, channels=1, width=2, latent_dim=6)
        discriminator = normalize(StyleGAN2Discriminator(image_size=16, channels=1, width=2), normalization)
        images = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8)
        return Trainer(config, generator=generator, discriminator=discriminator, images=images, device=device)

    def stop_after_one(trainer: Trainer) -> None:
        trainer.stop_reason = "interrupted" if trainer.step == 1 else None

    whole = trainer()
    whole.run([])
    first = trainer()  # seeds the global random state, which noise and mixing draw from
    first.run([stop_after_one])
    tensors, numbers = first.state()
    tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    second = trainer()
    second.load_state(tensors, numbers)
    second.run([])
    expected, _ = whole.state()
    for name, tensor in second.state()[0].items():
        assert torch.equal(tensor, expected[name]), name
