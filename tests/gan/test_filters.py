import pytest
import torch
from tests.references.upfirdn import explicit_matrix, upfirdn
from torch import nn
from torch.testing import assert_close

from spectralnorm.gan.models.filters import Blur, Downsample, Upsample

TAPS = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
FILTERS = [
    # The padding of the public code's upsample2d, downsample2d, and before and after its resampling convolutions.
    (Upsample(), {"up": 2, "down": 1, "before": 2, "after": 1, "gain": 4.0}),
    (Downsample(gain=2.0), {"up": 1, "down": 2, "before": 1, "after": 1, "gain": 2.0}),
    (Blur(padding=2), {"up": 1, "down": 1, "before": 2, "after": 2, "gain": 1.0}),
    (Blur(padding=1, gain=4.0), {"up": 1, "down": 1, "before": 1, "after": 1, "gain": 4.0}),
]


@pytest.mark.parametrize(("layer", "settings"), FILTERS)
def test_a_filter_is_the_slow_one(layer: nn.Module, settings: dict, device: torch.device):
    images = torch.randn(2, 3, 6, 8, dtype=torch.float64, device=device)
    assert_close(layer.to(device)(images), upfirdn(images, TAPS, **settings))


def test_a_filter_keeps_images_constant_away_from_the_border(device: torch.device):
    images = torch.ones(1, 2, 16, 16, dtype=torch.float64, device=device)
    for layer in (Upsample(), Downsample(), Blur(padding=2)):
        inner = layer.to(device)(images)[:, :, 2:-2, 2:-2]
        assert inner.numel() > 0
        assert_close(inner, torch.ones_like(inner), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [layer for layer, _ in FILTERS])
def test_a_filter_commutes_with_mirroring(layer: nn.Module, device: torch.device):
    images = torch.randn(1, 2, 6, 6, dtype=torch.float64, device=device)
    layer = layer.to(device)
    assert_close(layer(images.flip(3)), layer(images).flip(3))


@pytest.mark.parametrize(("layer", "bound"), [(Blur(padding=2), 1), (Downsample(gain=2.0), 1), (Upsample(), 2)])
def test_the_norm_of_a_filter_is_what_its_page_says(layer: nn.Module, bound: float, device: torch.device):
    matrix = explicit_matrix(layer.to(device), (1, 16, 16), device)
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    assert norm <= bound * (1 + 1e-12)
    assert norm > 0.9 * bound  # as an image of 16 px comes near the bound for all sizes


def test_upsampling_is_four_times_the_adjoint_of_downsampling(device: torch.device):
    down = explicit_matrix(Downsample().to(device), (1, 8, 8), device)
    up = explicit_matrix(Upsample().to(device), (1, 4, 4), device)
    assert_close(up, 4 * down.T)


@pytest.mark.parametrize("layer", [layer for layer, _ in FILTERS])
def test_a_filter_can_be_differentiated_twice(layer: nn.Module, device: torch.device):
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    layer = layer.to(device)
    assert torch.autograd.gradgradcheck(lambda images: layer(images).square(), images)
