"""Bounds from reshaped kernels, against the explicit operator's norm."""

import itertools

import pytest
import torch
from torch import nn

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel
from spectralnorm.linalg.patches import copies_by_padding, reads_per_pixel
from spectralnorm.linalg.reshapings import patches_bound, reshapings_bound

from .operators import LAYERS, explicit


@pytest.mark.parametrize(("kind", "options", "size"), LAYERS)
def test_both_bound_the_operator_and_the_reshapings_are_no_looser(kind, options, size, device):
    layer = kind(4, 8, **options, bias=False, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(layer)
    kernels = (layer.weight.detach(), torch.ones_like(layer.weight), torch.randn_like(layer.weight).sign())
    for weight in kernels:
        exact = torch.linalg.matrix_norm(explicit(geometry, weight, size), 2)
        patches, reshapings = patches_bound(weight, geometry), reshapings_bound(weight, geometry)
        assert exact <= reshapings * (1 + 1e-12)
        assert reshapings <= patches * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_a_pixel_is_read_no_more_often_than_told_at_any_size(mode):
    for k, s, d, p in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2, 3), (0, 1, 2, 4)):
        layer = nn.Conv1d(1, 1, k, stride=s, dilation=d, padding=p, padding_mode=mode)
        geometry = ConvolutionGeometry.of(layer)
        (reads,) = reads_per_pixel(geometry)
        sizes = [n for n in range(1, 40) if n > p and geometry.output_size((n,))[0] > 0]
        largest = max(max_patches_per_pixel(geometry, (n,)) for n in sizes)
        assert largest <= reads * copies_by_padding(geometry)
        if mode == "zeros":
            assert largest == reads


def test_two_dimensions_give_the_four_reshapings_of_the_paper(device):
    weight = torch.randn(5, 4, 3, 2, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(nn.Conv2d(4, 5, (3, 2), padding="same"))
    matrices = [
        weight.permute(0, 2, 1, 3).reshape(15, 8),
        weight.permute(0, 3, 1, 2).reshape(10, 12),
        weight.reshape(5, 24),
        weight.permute(0, 2, 3, 1).reshape(30, 4),
    ]
    expected = 6**0.5 * min(torch.linalg.matrix_norm(matrix, 2) for matrix in matrices)
    # Five squarings leave a Gaussian matrix's bound a few thousandths above its norm.
    assert expected <= reshapings_bound(weight, geometry) <= 1.02 * expected


def test_a_kernel_as_large_as_its_stride_is_bounded_by_its_matrix_alone(device):
    layer = nn.Conv2d(3, 8, 4, stride=4, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(layer)
    exact = torch.linalg.matrix_norm(explicit(geometry, layer.weight.detach(), (8, 8)), 2)
    assert exact <= patches_bound(layer.weight, geometry) <= 1.02 * exact
