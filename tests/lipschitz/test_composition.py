"""Neighbouring linear maps as one: the same map as the two, and never a bound below the norm of what is computed."""

import itertools
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from tests.references.upfirdn import explicit_matrix
from torch import nn
from torch.testing import assert_close

import spectralnorm as sn
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.lipschitz import maps
from spectralnorm.lipschitz.bounds import frobenius, largest_frobenius
from spectralnorm.lipschitz.composition import compose_convolutions
from spectralnorm.lipschitz.maps import ConvolutionMap, ScaleMap

CPU = torch.device("cpu")


def _layer(draw: random.Random, channels: int, axes: int, *, last: bool) -> Any:
    kernel, stride, dilation = draw.choice((1, 2, 3)), draw.choice((1, 1, 2)), draw.choice((1, 1, 2))
    groups = draw.choice((1, 2, channels))
    kinds = (nn.Conv1d, nn.Conv2d) if draw.random() < 0.5 else (nn.ConvTranspose1d, nn.ConvTranspose2d)
    padding = draw.choice((0, 0, 1, 2)) if draw.random() < 0.5 else 0
    options: dict = {"stride": stride, "dilation": dilation, "groups": groups}
    if kinds[0] is nn.Conv1d:
        options["padding_mode"] = draw.choice(("zeros", "zeros", "circular", "reflect"))
    elif stride == 2:
        options["output_padding"] = draw.choice((0, 1))
    out = channels if groups == channels else draw.choice((2, 4)) * (1 if last else channels // 2)
    return kinds[axes - 1](channels, max(out, groups), kernel, padding=padding, **options)


def test_composition_is_the_same_map_and_is_refused_where_the_border_would_count():
    draw, composed, kinds = random.Random(0), 0, set()
    torch.manual_seed(0)
    for _ in range(400):
        axes = draw.choice((1, 1, 2))
        first = _layer(draw, draw.choice((2, 4)), axes, last=False).double()
        second = _layer(draw, first.out_channels, axes, last=True).double()
        size = (draw.choice((5, 6, 7)),) * axes
        both = nn.Sequential(first, second)
        geometries = [ConvolutionGeometry.of(layer) for layer in (first, second)]
        found = compose_convolutions(second.weight.data, geometries[1], first.weight.data, geometries[0])
        if found is None:
            continue
        for layer in (first, second):
            nn.init.zeros_(layer.bias)
        images = torch.randn(3, first.in_channels, *size, dtype=torch.float64)
        try:
            expected = both(images)
        except RuntimeError:
            continue  # nothing comes out of the first, or its padding is larger than the image
        assert_close(found.geometry.apply(images, found.weight), expected, rtol=1e-12, atol=1e-12)
        composed += 1
        kinds.add((geometries[0].transposed, geometries[1].transposed))
    assert composed > 80
    assert kinds == {(False, False), (True, False), (True, True)}


def test_two_convolutions_that_pad_are_not_bounded_by_their_composed_kernel():
    kernels = torch.tensor([[0.8352, -1.3594, 0.6555], [0.2087, 0.5730, 0.7200]])
    geometry = ConvolutionGeometry((3,), (1,), (1,), ((1, 1),))
    layers = [nn.Conv1d(1, 1, 3, padding=1) for _ in kernels]
    for layer, kernel in zip(layers, kernels, strict=True):
        layer.weight.data = kernel[None, None]
    both = nn.Sequential(*layers).double()

    # What is cut off between them cancels in the composed filter, whose norm on all of the lattice is this.
    turned = [torch.fft.fft(layer.weight.data[0, 0], 4096) for layer in layers]
    composed = (turned[0] * turned[1]).abs().max()
    norm = torch.linalg.matrix_norm(explicit_matrix(lambda x: both(x) - both(0 * x), (1, 6), CPU), 2)
    assert norm > 1.06 * composed

    weights = [layer.weight.data for layer in layers]
    assert compose_convolutions(weights[1], geometry, weights[0], geometry) is None
    assert norm <= sn.certify(both, (1, 6), ascent_steps=0).upper_bound


MERGED = {
    "convolution and average": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)),
    "blur and stride": lambda: nn.Sequential(nn.Conv2d(2, 2, 4, padding=2, groups=2), nn.Conv2d(2, 3, 3, stride=2)),
    "doubling and 3x3": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3, padding=1)),
    "1x1 and 3x3": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1)),
    "transposed twice": lambda: nn.Sequential(
        nn.ConvTranspose2d(2, 3, 2, stride=2), nn.ConvTranspose2d(3, 2, 3, padding=1)
    ),
    "three in a row": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2), nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("sizes", ["given", "all"])
def test_neighbours_are_bounded_as_one(name: str, sizes: str):
    torch.manual_seed(0)
    model, shape = MERGED[name]().double(), (2, 6, 6)

    def norm(size: int) -> float:
        matrix = explicit_matrix(lambda x: model(x) - model(torch.zeros_like(x)), (2, size, size), CPU)
        return torch.linalg.matrix_norm(matrix, 2).item()

    certificate = sn.certify(model, shape, input_sizes=sizes, ascent_steps=0)

    alone = [line.upper for line in certificate.layers if line.upper is not None]
    assert norm(6) <= certificate.upper_bound
    if sizes == "all":
        # 4% for the frequencies between those that are looked at; the rest is what an image of 18 pixels lacks.
        assert norm(18) <= certificate.upper_bound <= 1.06 * norm(18)
    else:
        assert certificate.upper_bound <= 1.001 * norm(6)
    product = torch.tensor(alone).prod().item() * (2 if "doubling" in name else 1)
    assert certificate.upper_bound < product * 0.999
    assert certificate.layers[-1].merged_with == "input"


def test_every_second_pixel_of_a_convolution_is_a_convolution_with_a_stride():
    class Every(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, inputs):
            return self.conv(inputs)[:, :, ::2, ::2]

    model = Every()
    strided = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    strided.load_state_dict(model.conv.state_dict())

    found, expected = (sn.certify(each, (2, 7, 7), ascent_steps=0).upper_bound for each in (model, strided))

    assert found == pytest.approx(expected, rel=1e-9)


def test_rounding_of_the_composed_kernel_is_within_its_error():
    torch.manual_seed(0)
    weights = [torch.randn(3, 3, 3, 3, dtype=torch.float64) * 10.0 ** torch.randn(3, 3, 3, 3) for _ in range(2)]
    geometry = ConvolutionGeometry((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))

    found = compose_convolutions(weights[1], geometry, weights[0], geometry)

    assert found is not None
    exact = [weight.tolist() for weight in weights]
    square = Fraction(0)
    for o, i, y, x in itertools.product(range(3), range(3), range(5), range(5)):
        entry = sum(
            Fraction(exact[1][o][h][b][c]) * Fraction(exact[0][h][i][y - b][x - c])
            for h, b, c in itertools.product(range(3), range(3), range(3))
            if 0 <= y - b < 3 and 0 <= x - c < 3
        )
        square += (Fraction(found.weight[o, i, y, x].item()) - entry) ** 2
    assert 0 < square <= Fraction(found.error) ** 2


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_convolution_scaled_by_one_number_is_bounded_by_the_norm_that_is_known(monkeypatch, before, transposed):
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 3, 3, padding=1).double()
    geometry = ConvolutionGeometry.of(layer)
    convolution = ConvolutionMap(layer.weight.detach(), geometry, (6, 6), (6, 6))
    bounds = convolution.bound()
    asked = []
    bound = maps.convolution_bound
    monkeypatch.setattr(maps, "convolution_bound", lambda *args: asked.append(1) or bound(*args))

    def composed(scale):
        scaling = ScaleMap(torch.tensor(scale, dtype=torch.float64))
        return convolution.after(scaling) if before else scaling.after(convolution)

    assert composed([-0.7, 0.7, 0.7]).bound() == pytest.approx(0.7 * bounds, rel=1e-12)
    assert asked == []
    different = composed([0.1, 0.7, 0.2])
    assert different.bound() < 0.69 * bounds
    assert asked == [1]
    alike = composed([0.7, 0.7, 0.7])
    matrix = explicit_matrix(lambda images: alike.geometry.apply(images, alike.weight), (3, 6, 6), CPU)
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= alike.bound()


def _cancelling(count: int) -> tuple[list[float], list[float]]:
    """Two lists of numbers whose products, summed one after the other, lose in every sum what makes up their total.

    The running sum becomes k = 1, 2, ..., ``count``, and falls again; what is below half a last place of it is lost.
    """

    def lost(k: int) -> float:
        return max(0, 2 ** (k.bit_length() - 2) - 1) * 2.0**-52 if k > 1 else 0.0

    rising = [1 + lost(k) for k in range(1, count + 1)]
    falling = [1 - lost(k) for k in range(count - 1, -1, -1)]
    return rising + falling, [1.0] * count + [-1.0] * count


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_rounding_of_a_sum_that_cancels_is_paid_for(kind: type[nn.Module]):
    first, second = _cancelling(199)
    model = nn.Sequential(kind(1, len(first), 1, bias=False), kind(len(first), 1, 1, bias=False)).double()
    axes = model[0].weight.ndim - 2
    for layer, numbers in zip(model, (first, second), strict=True):
        layer.weight.data.copy_(torch.tensor(numbers, dtype=torch.float64).reshape(layer.weight.shape))

    exact = abs(sum(Fraction(one) * Fraction(other) for one, other in zip(first, second, strict=True)))

    assert exact > 0
    assert Fraction(sn.certify(model, (1,) * (1 + axes), ascent_steps=0).upper_bound) >= exact


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_frobenius_norm_of_a_kernel_is_that_of_all_its_taps(axes: int):
    weight = torch.full((16, 4, *[3] * axes), 1e-200, dtype=torch.float64)

    assert frobenius(weight) == pytest.approx((64 * 3**axes) ** 0.5 * 1e-200, rel=1e-12)
    assert largest_frobenius(weight.flatten(2)) == pytest.approx((4 * 3**axes) ** 0.5 * 1e-200, rel=1e-12)
