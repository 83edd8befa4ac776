"""Bounds of convolutions, against the singular values of the explicit operator and known norms."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import convolution_lower_bound, convolution_upper_bound, rigorous_convolution_bound
from spectralnorm.linalg.convolution import PADDING_MODES, ConvolutionGeometry


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


@pytest.mark.parametrize(("phase", "at_most"), [(0.0, 1.0098), (0.5, 1.0001), (0.25, 1.0098)])
def test_the_better_grid_of_frequencies_is_the_one_that_counts(phase, at_most, device):
    # The symbol is cos cos, moved by a share of the step of a strict layer's grid, 16 x 16, which may miss 4%. Moved
    # by half of it the peak is on the finer grid, and the layer's misses just that.
    turn = torch.polar(torch.tensor(0.5), torch.tensor(-phase * 2 * math.pi / 16))
    axis = torch.stack([turn.conj(), torch.zeros_like(turn), turn])
    weight = torch.outer(axis, axis)[None, None].to(device)
    geometry = ConvolutionGeometry.of(nn.Conv2d(1, 1, 3))
    bound = rigorous_convolution_bound(weight.to(torch.complex128), geometry)
    assert 1 - 1e-6 <= bound <= at_most
    assert bound <= float(convolution_upper_bound(weight.to(torch.complex128), geometry))


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


def explicit_norm(geometry, weight, size):
    channels, _ = geometry.channels(weight)
    double = weight.to(torch.promote_types(weight.dtype, torch.float64))
    basis = torch.eye(channels * math.prod(size), dtype=double.dtype, device=weight.device)
    matrix = geometry.apply(basis.view(-1, channels, *size), double).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("taps", "size"), [((1, 2.0**-60, -1), 1), ((1, 0, 2.0**-60, 0, -1), 2)])
def test_taps_that_cancel_on_a_small_torus_leave_a_bound_of_what_is_left(taps, size, dtype, device):
    # All taps of one parity read the same pixel; added in float64 the large ones take the small one along.
    layer = nn.Conv1d(1, 1, len(taps), padding=len(taps) // 2, padding_mode="circular", device=device)
    weight = torch.tensor(taps, dtype=dtype, device=device).view(1, 1, -1)
    geometry = ConvolutionGeometry.of(layer)
    assert 2.0**-60 <= float(convolution_upper_bound(weight, geometry, (size,))) <= 1e-14
    assert 2.0**-60 <= rigorous_convolution_bound(weight, geometry, (size,)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("seed", range(40))
def test_no_bound_of_a_complex_weight_is_below_its_norm(seed, dtype, device):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups, stride, padding = draw.choice([1, 2]), draw.randint(1, 3), draw.randint(0, 2)
    options = {"stride": stride, "padding": padding, "groups": groups, "dilation": draw.randint(1, 2), "device": device}
    if draw.random() < 0.3:
        layer = nn.ConvTranspose2d(2 * groups, 3 * groups, draw.randint(2, 4), **options)
    else:
        mode: Any = draw.choice(PADDING_MODES)
        layer = nn.Conv2d(2 * groups, 3 * groups, draw.randint(1, 3), padding_mode=mode, **options)
    geometry, size = ConvolutionGeometry.of(layer), (5, 6)
    weight = torch.complex(torch.randn_like(layer.weight), torch.randn_like(layer.weight)).detach().to(dtype)
    exact = explicit_norm(geometry, weight, size) * (1 - 1e-12)
    rigorous = rigorous_convolution_bound(weight, geometry, size)
    fast = float(convolution_upper_bound(weight, geometry, size))
    assert exact <= rigorous <= fast * (1 + 1e-8)
    assert exact <= float(convolution_upper_bound(weight, geometry))


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_a_complex_circular_convolution_is_bounded_by_its_own_norm(num_axes, device):
    torch.manual_seed(num_axes)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_axes - 1]
    layer = kind(2, 3, 3, padding=1, padding_mode="circular", device=device)
    weight = torch.randn_like(layer.weight, dtype=torch.complex128)
    geometry, size = ConvolutionGeometry.of(layer), (4,) * num_axes
    exact = explicit_norm(geometry, weight, size)
    assert rigorous_convolution_bound(weight, geometry, size) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(("outputs", "size"), [(1, (4, 4)), (16, (4, 4)), (16, (5, 5))])
def test_a_kernel_that_covers_the_image_is_bounded_like_its_matrix(outputs, size, device):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, outputs, 4, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    patches = math.prod(n - 3 for n in size)
    matrix = float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))
    exact = explicit_norm(geometry, layer.weight.detach(), size)
    rigorous = rigorous_convolution_bound(layer.weight, geometry, size)
    assert exact * (1 - 1e-12) <= rigorous <= matrix * patches**0.5 * (1 + 1e-9)
    assert rigorous <= float(convolution_upper_bound(layer.weight, geometry, size)) * (1 + 1e-8)
    if patches == 1:
        assert rigorous == pytest.approx(exact, rel=1e-9)


def test_an_excess_below_the_rounding_is_no_obstacle_where_the_size_is_given(device):
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    exact = explicit_norm(geometry, layer.weight.detach(), (4, 4))
    assert exact <= rigorous_convolution_bound(layer.weight, geometry, (4, 4), max_excess=1e-17) <= 1.5 * exact


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
