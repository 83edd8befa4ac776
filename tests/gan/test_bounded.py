"""Discriminators with a known Lipschitz constant, by brute force: explicit matrices, singular values, gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from spectralnorm.errors import UserError
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.models.bounded import UnitGlobalPool, UnitPool2d
from spectralnorm.gan.models.dcgan import DCGANDiscriminator
from spectralnorm.gan.models.filters import Downsample
from spectralnorm.gan.models.mlp import MLPDiscriminator
from spectralnorm.gan.models.r3gan import R3GANDiscriminator
from spectralnorm.gan.models.resnet import DownBlock, GlobalSumPool, ResNetDiscriminator
from spectralnorm.gan.models.sagan import SAGANDiscriminator
from spectralnorm.gan.models.sncnn import SNCNNDiscriminator, SNDCGANDiscriminator
from spectralnorm.gan.normalizations import normalize
from spectralnorm.layers import L2Attention
from spectralnorm.lipschitz import certify

# stylegan2 has tests of its own. Those of sagan and r3gan have other weights, or other initial ones.
_SAME_WEIGHTS = [name for name in ARCHITECTURES if name not in ("sagan", "stylegan2", "r3gan")]
_BOUNDED = [*_SAME_WEIGHTS, "sagan", "r3gan"]


def _norm(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Norm of a linear map of tensors of one shape, by the SVD of its matrix."""
    num = torch.Size(shape).numel()
    columns = linear(torch.eye(num, dtype=torch.float64).unflatten(1, shape)).flatten(1)
    return torch.linalg.matrix_norm(columns, 2).item()


@pytest.mark.parametrize(
    ("pool", "norm"),
    [
        (UnitPool2d(2), 1.0),
        (UnitPool2d(3), 1.0),
        (UnitGlobalPool(), 1.0),
        (nn.AvgPool2d(2), 1 / 2),
        (GlobalSumPool(), 6.0),
        (nn.AdaptiveAvgPool2d(1), 1 / 6),
        (nn.UpsamplingNearest2d(scale_factor=2), 2.0),
    ],
)
def test_the_norm_of_an_operation_without_weights_is_the_one_that_is_told(pool: nn.Module, norm: float):
    assert _norm(pool, (2, 6, 6)) == pytest.approx(norm, rel=1e-12)


def test_the_scaled_pools_are_the_plain_ones_times_a_constant():
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert_close(UnitPool2d(2)(maps), 2 * nn.functional.avg_pool2d(maps, 2))
    assert_close(UnitGlobalPool()(maps), maps.mean((2, 3)) * 24**0.5)


@torch.no_grad()
def _normalize_exactly(network: nn.Module, inputs: Tensor, labels: Tensor | None) -> None:
    """Divide each weight by the norm of its layer's own map, at the size of the maps that it gets."""
    handles = []

    def divide(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Embedding):
            layer.weight /= torch.linalg.matrix_norm(layer.weight, 2)
            return
        bias, layer.bias = layer.bias, None
        layer.weight /= _norm(layer.forward, tuple(arguments[0].shape[1:]))
        layer.bias = bias

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            handles.append(layer.register_forward_pre_hook(divide))
    network(*((inputs,) if labels is None else (inputs, labels)))
    for handle in handles:
        handle.remove()


def _slopes(network: nn.Module, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
    """Lengths of the gradients of each logit by its own image."""
    inputs = inputs.detach().requires_grad_()
    logits = network(*((inputs,) if labels is None else (inputs, labels)))
    (gradients,) = torch.autograd.grad(logits.sum(), inputs)
    return gradients.flatten(1).norm(dim=1)


def _shake(network: nn.Module) -> None:
    """Weights and biases of a size at which both branches of a block and both signs of a unit are seen."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda k: DCGANDiscriminator(image_size=16, channels=1, width=2, lipschitz=k), (1, 16, 16)),
        (lambda k: SNCNNDiscriminator(image_size=16, channels=1, width=1, lipschitz=k), (1, 16, 16)),
        (lambda k: SNDCGANDiscriminator(image_size=16, channels=1, width=1, lipschitz=k), (1, 16, 16)),
        # Residual networks take any size that halves often enough; small ones have small matrices.
        (lambda k: ResNetDiscriminator(image_size=32, channels=2, width=2, lipschitz=k), (2, 8, 8)),
        (lambda k: ResNetDiscriminator(image_size=48, channels=1, width=1, lipschitz=k), (1, 16, 16)),
        (lambda k: ResNetDiscriminator(image_size=32, width=2, num_classes=3, lipschitz=k), (3, 8, 8)),
        (lambda k: SAGANDiscriminator(image_size=32, channels=1, width=1, lipschitz=k), (1, 16, 16)),
        (lambda k: SAGANDiscriminator(image_size=32, width=2, num_classes=3, lipschitz=k), (3, 16, 16)),
        (lambda k: R3GANDiscriminator(image_size=8, channels=2, width=2, lipschitz=k), (2, 8, 8)),
        (lambda k: MLPDiscriminator(shape=(2,), width=8, lipschitz=k), (2,)),
        (lambda k: MLPDiscriminator(shape=(1, 4, 4), width=8, num_hidden=4, lipschitz=k), (1, 4, 4)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_weights_of_norm_one_make_the_constant_a_bound_of_the_slope(
    build: Callable[[float], nn.Module], shape: tuple[int, ...], seed: int
):
    torch.manual_seed(seed)
    network = build(1.0).double()
    _shake(network)
    num = 16
    inputs = 2 * torch.randn(num, *shape, dtype=torch.float64)
    classes = getattr(network, "num_classes", None)
    labels = None if classes is None else torch.randint(classes, (num,))
    _normalize_exactly(network, inputs, labels)
    slopes = _slopes(network, inputs, labels)
    assert slopes.max() <= 1 + 1e-12
    assert slopes.max() > 0
    scaled = build(2.5).double()
    scaled.load_state_dict(network.state_dict())
    assert_close(_slopes(scaled, inputs, labels), 2.5 * slopes)


@torch.no_grad()
def _pass_through(network: nn.Module) -> None:
    """Weights of norm 1 that hand the first channel on, and biases with which no ReLU cuts anything off."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            layer.weight[0, 0, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = 1.0
            nn.init.constant_(layer.bias, 100.0)
        elif isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.zeros_(layer.weight)
            layer.weight[0, 0] = 1.0


@pytest.mark.parametrize(("image_size", "published"), [(32, 32.0), (48, 6.0), (64, 2.0), (128, 8.0)])
def test_a_residual_network_attains_its_constant(image_size: int, published: float):
    # The gradient lies along constant images, on which every pool has its full norm.
    images = torch.rand(1, 3, image_size, image_size, dtype=torch.float64)
    for lipschitz, constant in ((None, published), (1.0, 1.0), (3.0, 3.0)):
        network = ResNetDiscriminator(image_size=image_size, width=1, lipschitz=lipschitz).double()
        _pass_through(network)
        assert _slopes(network, images).item() == pytest.approx(constant, rel=1e-12)


@pytest.mark.parametrize(("lipschitz", "constant"), [(None, 64.0), (1.0, 1.0)])
def test_the_projection_attains_its_constant(lipschitz: float | None, constant: float):
    network = ResNetDiscriminator(width=1, num_classes=2, lipschitz=lipschitz).double()
    _pass_through(network)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert _slopes(network, images, torch.tensor([0])).item() == pytest.approx(constant, rel=1e-12)


@pytest.mark.parametrize("downsample", [False, True])
def test_a_bounded_block_is_half_the_sum_of_its_branches_with_unit_pools(downsample: bool):
    block = DownBlock(3, 4, downsample=downsample, bounded=True).double()
    plain = DownBlock(3, 4, downsample=downsample).double()
    plain.load_state_dict(block.state_dict())
    maps = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    if downsample:
        # Twice the average, and half the sum: as published, but for the bias of the shortcut, which begins at zero.
        assert_close(block(maps), plain(maps))
    else:
        assert_close(block(maps), plain(maps) / 2)


@pytest.mark.parametrize("name", _SAME_WEIGHTS)
def test_the_form_with_a_constant_has_the_weights_of_the_published_one(name: str):
    sizes = {"image_size": 32, "channels": 1, "width": 2}
    torch.manual_seed(0)
    published = ARCHITECTURES[name].discriminator(**sizes)
    torch.manual_seed(0)
    bounded = ARCHITECTURES[name].discriminator(**sizes, lipschitz=2.0)
    assert_close(bounded.state_dict(), published.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in _SAME_WEIGHTS if name != "resnet"])
def test_a_plain_chain_is_as_published_but_for_the_constant(name: str):
    sizes = {"image_size": 32, "channels": 1, "width": 2}
    networks = [ARCHITECTURES[name].discriminator(**sizes, lipschitz=k) for k in (None, 1.0, 4.0)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    images = torch.randn(2, 1, 32, 32)
    published, one, four = (network(images) for network in networks)
    assert torch.equal(one, published)
    assert torch.equal(four, 4 * published)


@pytest.mark.parametrize("lipschitz", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", _BOUNDED)
def test_a_constant_that_is_not_positive_is_refused(name: str, lipschitz: float):
    with pytest.raises(UserError, match="lipschitz must be a positive number, or None for the published network, got"):
        ARCHITECTURES[name].discriminator(image_size=32, channels=1, width=1, lipschitz=lipschitz)


@pytest.mark.parametrize("name", _BOUNDED)
def test_no_part_of_a_bounded_discriminator_is_steeper_than_one(name: str):
    plain = (nn.Conv2d, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten)
    known = (*plain, UnitPool2d, UnitGlobalPool, L2Attention, Downsample)
    for image_size in ARCHITECTURES[name].image_sizes:
        with torch.device("meta"):
            network = ARCHITECTURES[name].discriminator(image_size=image_size, channels=3, width=2, lipschitz=1.0)
        for module in network.modules():
            if not list(module.children()):
                assert isinstance(module, known)
                assert not isinstance(module, nn.LeakyReLU) or 0 <= module.negative_slope <= 1
                assert not isinstance(module, L2Attention) or module.bounded
                assert not isinstance(module, Downsample) or module.gain <= 2  # its norm is half of that


@pytest.mark.parametrize("name", [*_BOUNDED, "stylegan2"])
def test_a_certificate_reads_at_most_the_constant(name: str):
    architecture = ARCHITECTURES[name]
    shape = (architecture.channels[-1], architecture.image_sizes[0], architecture.image_sizes[0])
    for lipschitz in (1.0, 7.3):
        network = architecture.discriminator(image_size=shape[1], channels=shape[0], width=4, lipschitz=lipschitz)
        normalize(network, "strict", input_shape=shape)
        found = certify(network.eval(), shape, ascent_steps=2)
        assert 0 < found.lower_bound <= found.upper_bound <= lipschitz
