"""Brute force: with every weight of norm 1 as an operator, no Jacobian of the discriminator exceeds the constant."""

import math

import pytest
import torch
from tests.references.upfirdn import explicit_matrix
from torch import Tensor, nn
from torch.testing import assert_close

import spectralnorm as sn
from spectralnorm.errors import UserError
from spectralnorm.gan.models.equalized import EqualizedConv2d, EqualizedLinear
from spectralnorm.gan.models.filters import Blur, Downsample
from spectralnorm.gan.models.stylegan2_discriminator import MinibatchStddev, StyleGAN2Discriminator

# Jacobians and norms are exact to float64's rounding, some 1e-13 for these sizes.
TOLERANCE = 1e-11


def _discriminator(device: torch.device, **settings) -> StyleGAN2Discriminator:
    return StyleGAN2Discriminator(image_size=16, channels=2, width=2, **settings).to(device, torch.float64)


def _normalize_operators(network: nn.Module, images: Tensor) -> None:
    """Divide each effective weight by the norm of the layer's own linear map, from the SVD of its explicit matrix."""
    shapes: dict[nn.Module, torch.Size] = {}
    layers = [module for module in network.modules() if isinstance(module, EqualizedConv2d | EqualizedLinear)]
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: shapes.update({layer: inputs[0].shape[1:]}))
        for layer in layers
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    assert len(shapes) == len(layers)
    with torch.no_grad():
        for layer, shape in shapes.items():
            offset = layer(torch.zeros(1, *shape, dtype=images.dtype, device=images.device))
            matrix = explicit_matrix(lambda inputs: layer(inputs) - offset, tuple(shape), images.device)  # noqa: B023
            layer.weight.div_(torch.linalg.matrix_norm(matrix, 2))


def _jacobian_norm(function, images: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(function, images)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, images.numel()), 2).item()


def _images(device: torch.device, num: int = 4) -> Tensor:
    return torch.randn(num, 2, 16, 16, dtype=torch.float64, device=device)


def _positive(network: nn.Module) -> None:
    """Weights that all work together: the largest norms that a network of a kind reaches are of this sort."""
    for module in network.modules():
        if isinstance(module, EqualizedConv2d | EqualizedLinear):
            nn.init.ones_(module.weight)


@pytest.mark.parametrize("stddev_group", [0, 2, 4])
@pytest.mark.parametrize("lipschitz", [1.0, 2.5])
@pytest.mark.parametrize("prepare", [None, _positive])
def test_no_jacobian_exceeds_the_constant(prepare, lipschitz: float, stddev_group: int, device: torch.device):
    discriminator = _discriminator(device, lipschitz=lipschitz, stddev_group=stddev_group)
    if prepare is not None:
        prepare(discriminator)
    _normalize_operators(discriminator, _images(device))
    for scale in (0.01, 1.0, 100.0):
        # The whole batch at once: with minibatch stddev a logit depends on the other images too.
        norm = _jacobian_norm(discriminator, scale * _images(device))
        assert 0 < norm <= lipschitz * (1 + TOLERANCE)


def test_every_part_without_weights_has_norm_at_most_one(device: torch.device):
    # Part by part, because the slack of the whole network would hide one that is a little too large.
    discriminator = _discriminator(device, lipschitz=1.0)
    filters = [module for module in discriminator.modules() if isinstance(module, Blur | Downsample)]
    assert len(filters) == 4
    for layer in filters:
        norm = torch.linalg.matrix_norm(explicit_matrix(layer, (1, 8, 8), device), 2).item()
        assert 0.7 < norm <= 1 + TOLERANCE
    activations = [module for module in discriminator.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(activations) == 6
    values = torch.linspace(-3, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    for activation in activations:
        (slopes,) = torch.autograd.grad(activation(values).sum(), values)
        assert slopes.abs().max() <= 1
    assert discriminator.stddev is not None
    features = torch.randn(4, 16, 2, 2, dtype=torch.float64, device=device)
    assert _jacobian_norm(discriminator.stddev, features) <= 1 + TOLERANCE


def test_the_constant_is_not_a_large_multiple_of_what_is_reached(device: torch.device):
    discriminator = _discriminator(device, lipschitz=1.0, stddev_group=0)
    _positive(discriminator)
    _normalize_operators(discriminator, _images(device))
    assert _jacobian_norm(discriminator, _images(device, 1).abs()) > 0.2


def test_the_published_network_exceeds_one_with_the_same_weights(device: torch.device):
    discriminator = _discriminator(device, stddev_group=0)
    _positive(discriminator)
    _normalize_operators(discriminator, _images(device))
    assert _jacobian_norm(discriminator, _images(device, 1).abs()) > 1.5


def test_the_sum_of_a_residual_block_divided_by_the_root_of_two_exceeds_one(device: torch.device):
    block = _discriminator(device, lipschitz=1.0, stddev_group=0).blocks[0]
    images = torch.rand(1, 2, 16, 16, dtype=torch.float64, device=device)
    _positive(block)
    _normalize_operators(block, images)
    norm = _jacobian_norm(block, images)
    assert norm <= 1 + TOLERANCE
    block.scale = math.sqrt(0.5)
    assert _jacobian_norm(block, images) == pytest.approx(norm * math.sqrt(2))
    assert norm * math.sqrt(2) > 1


@pytest.mark.parametrize("group", [2, 3, 6])
def test_minibatch_stddev_has_the_norm_that_its_page_says(group: int, device: torch.device):
    features = torch.randn(6, 3, 2, 2, dtype=torch.float64, device=device)
    norm = _jacobian_norm(MinibatchStddev(group), features)
    bound = math.sqrt(1 + 1 / 3)
    assert norm <= bound * (1 + TOLERANCE)
    assert norm > bound * (1 - 1e-6)  # attained but for the 1e-8 under the root
    assert _jacobian_norm(MinibatchStddev(group, is_bounded=True), features) <= 1 + TOLERANCE


@pytest.mark.parametrize("group", [2, 3])
def test_minibatch_stddev_moves_with_one_image_as_its_page_says(group: int, device: torch.device):
    features = torch.randn(group, 3, 2, 2, dtype=torch.float64, device=device)
    layer = MinibatchStddev(group)

    def own(image: Tensor) -> Tensor:
        return layer(torch.cat([image, features[1:]]))[:1]

    bound = math.sqrt(1 + (group - 1) / (3 * group**2))
    # The most where one image stands out and the others are alike.
    features[1:] = 0
    for image in (features[:1], torch.ones_like(features[:1])):
        assert _jacobian_norm(own, image) <= bound * (1 + TOLERANCE)
    assert _jacobian_norm(own, torch.ones_like(features[:1])) > bound * (1 - 1e-6)


def test_minibatch_stddev_is_the_mean_deviation_of_every_group(device: torch.device):
    features = torch.randn(6, 3, 2, 2, dtype=torch.float64, device=device)
    outputs = MinibatchStddev(3)(features)
    assert outputs.shape == (6, 4, 2, 2)
    assert torch.equal(outputs[:, :3], features)
    for start in (0, 1):  # groups of the public code: every second image
        members = features[start::2]
        expected = members.var(0, correction=0).sqrt().mean()
        assert_close(outputs[start::2, 3], expected.expand(3, 2, 2), rtol=1e-6, atol=0)


def test_a_batch_that_the_group_does_not_divide_falls_into_smaller_ones(device: torch.device):
    features = torch.randn(6, 3, 2, 2, dtype=torch.float64, device=device)
    assert torch.equal(MinibatchStddev(4)(features), MinibatchStddev(3)(features))
    assert MinibatchStddev(4)(features[:1]).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("lipschitz", [0.0, -1.0, math.inf, math.nan])
def test_a_constant_that_is_not_positive_is_refused(lipschitz: float):
    with pytest.raises(UserError, match="lipschitz must be a positive number"):
        StyleGAN2Discriminator(image_size=32, width=2, lipschitz=lipschitz)


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize(("group", "batch"), [(2, 2), (2, 6), (4, 4)])
def test_the_rule_of_minibatch_deviation_is_what_a_batch_of_opposites_attains(group: int, batch: int, is_bounded: bool):
    module = MinibatchStddev(group, is_bounded=is_bounded)
    upper = sn.certify(nn.Sequential(module), (3, 2, 2)).upper_bound
    # Half of a group is the other half turned around, as the derivative wants it.
    halves = torch.randn(batch // 2, 3, 2, 2, dtype=torch.float64).sign()
    norm = _jacobian_norm(module, torch.cat([halves, -halves]))
    assert 0.9999 * upper < norm <= upper * (1 + TOLERANCE)


def test_the_published_discriminator_certifies_as_a_map_of_batches():
    discriminator = StyleGAN2Discriminator(image_size=16, channels=2, width=2, stddev_group=4).double()
    certificate = sn.certify(discriminator, (2, 16, 16))
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    assert 0 < certificate.lower_bound <= certificate.upper_bound
    assert _jacobian_norm(discriminator, images) <= certificate.upper_bound
