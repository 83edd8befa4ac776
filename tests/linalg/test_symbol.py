"""Bounds of convolutions, against the singular values of the explicit operator and known norms."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import convolution_lower_bound, convolution_upper_bound, rigorous_convolution_bound
from spectralnorm.linalg.convolution import ConvolutionGeometry


def _sweep():
    path = Path(__file__).parents[2] / "benchmarks" / "soundness.py"
    spec = importlib.util.spec_from_file_location("soundness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(8))
def test_no_bound_is_below_the_norm_of_a_random_layer(seed):
    sweep = _sweep()
    draw = random.Random(1000 + seed)
    torch.manual_seed(seed)
    for _ in range(60):
        case = sweep.random_case(draw)
        assert sweep.violations(case)[0] == [], case


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
def test_the_all_ones_kernel_has_its_known_norm(size, device):
    # Tridiagonal in each axis, so the norm is (1 + 2 cos(pi / (n + 1)))^2, and below 9 for every size.
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, device=device)
    nn.init.ones_(layer.weight)
    geometry = ConvolutionGeometry.of(layer)
    exact = (1 + 2 * math.cos(math.pi / (size + 1))) ** 2
    everywhere = rigorous_convolution_bound(layer.weight, geometry)
    assert exact <= rigorous_convolution_bound(layer.weight, geometry, (size, size)) <= everywhere * (1 + 1e-12)
    assert 9 <= everywhere <= 9 * 1.01
    assert convolution_lower_bound(layer.weight, geometry, (size, size)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_patches_that_do_not_overlap_leave_the_norm_of_the_matrix(kind, device):
    layer = kind(4, 6, 4, stride=4, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    matrix = layer.weight.detach().flatten(1)
    exact = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert exact <= rigorous_convolution_bound(layer.weight, geometry) <= exact * (1 + 1e-9)
    assert exact <= float(convolution_upper_bound(layer.weight, geometry)) <= exact * (1 + 1e-3)


def test_a_circular_convolution_is_bounded_by_its_own_norm(device):
    layer = nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular", bias=False, device=device)
    symbol = torch.fft.fft2(layer.weight.detach().double(), (9, 9)).movedim((0, 1), (2, 3))
    exact = float(torch.linalg.matrix_norm(symbol, 2).amax())
    assert rigorous_convolution_bound(layer.weight, ConvolutionGeometry.of(layer), (9, 9)) == pytest.approx(exact, 1e-8)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_independent_so_the_largest_counts(groups, device):
    layer = nn.Conv1d(4, 8, 3, padding=1, groups=groups, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    single = ConvolutionGeometry.of(nn.Conv1d(4 // groups, 8 // groups, 3, padding=1))
    parts = [rigorous_convolution_bound(part, single, (11,)) for part in layer.weight.chunk(groups)]
    assert rigorous_convolution_bound(layer.weight, geometry, (11,)) == pytest.approx(max(parts), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_bound_is_within_two_percent_for_a_layer_of_usual_size(dtype, device):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False, device=device, dtype=dtype)
    geometry = ConvolutionGeometry.of(layer)
    lower = convolution_lower_bound(layer.weight, geometry, (32, 32))
    assert lower <= float(convolution_upper_bound(layer.weight, geometry, (32, 32))) <= 1.02 * lower


def test_more_frequencies_make_the_bound_for_all_sizes_tighter(device):
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    bounds = [rigorous_convolution_bound(layer.weight, geometry, max_excess=excess) for excess in (0.04, 0.01, 0.0005)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] <= bounds[2] * 1.04


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_has_no_bound(value, device):
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False, device=device)
    layer.weight.data[1, 1, 1, 1] = value
    geometry = ConvolutionGeometry.of(layer)
    assert float(convolution_upper_bound(layer.weight, geometry)) == math.inf
    assert rigorous_convolution_bound(layer.weight, geometry) == math.inf


def test_a_zero_weight_is_bounded_by_zero(device):
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False, device=device)
    nn.init.zeros_(layer.weight)
    geometry = ConvolutionGeometry.of(layer)
    assert float(convolution_upper_bound(layer.weight, geometry)) == 0
    assert rigorous_convolution_bound(layer.weight, geometry) == 0


@pytest.mark.parametrize("size", [(4,), (0, 4), (2, 2)])
def test_an_input_size_that_does_not_fit_is_refused(size, device):
    layer = nn.Conv2d(1, 1, 3, bias=False, device=device)
    with pytest.raises(UserError, match="input_size must be 2 positive whole numbers"):
        convolution_upper_bound(layer.weight, ConvolutionGeometry.of(layer), size)


@pytest.mark.parametrize("excess", [0.0, -1.0, math.nan, math.inf])
def test_an_excess_that_is_not_positive_is_refused(excess, device):
    layer = nn.Conv2d(1, 1, 3, bias=False, device=device)
    with pytest.raises(UserError, match="max_excess must be a positive number"):
        convolution_upper_bound(layer.weight, ConvolutionGeometry.of(layer), max_excess=excess)
