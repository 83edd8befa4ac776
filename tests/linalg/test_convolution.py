"""A convolution's linear map and its adjoint, against torch's own layers and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from spectralnorm.linalg.convolution import ConvolutionGeometry, max_patches_per_pixel

_LAYERS = [
    *(
        (nn.Conv1d, {"kernel_size": k, "stride": s, "dilation": d, "padding": p, "padding_mode": mode}, (9,))
        for k, s, d, p, mode in itertools.product(
            (1, 2, 3, 4), (1, 2, 3), (1, 2), (0, 1, 2), ("zeros", "circular", "reflect", "replicate")
        )
    ),
    *(
        (nn.ConvTranspose1d, {"kernel_size": k, "stride": s, "dilation": d, "padding": p, "output_padding": o}, (7,))
        for k, s, d, p, o in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 4), (0, 1), (0, 1, 2))
        if o < max(s, d) and 6 * s - 2 * p + d * (k - 1) + 1 + o > 0
    ),
    (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same", "groups": 2}, (6, 5)),
    (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"}, (6, 5)),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": "valid", "stride": (1, 3)}, (6, 8)),
    (nn.Conv3d, {"kernel_size": (3, 2, 1), "padding": (1, 0, 2), "stride": (2, 1, 1), "groups": 4}, (5, 4, 3)),
    (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2}, (4, 5)),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2, "output_padding": 1}, (2, 3, 2)),
]


@pytest.mark.parametrize(("kind", "options", "size"), _LAYERS)
def test_the_map_is_the_layers_and_its_adjoint_and_derivative_are_autograds(kind, options, size, device):
    layer = kind(4, 8, **options, bias=False, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(layer)
    images = torch.randn(2, 4, *size, dtype=torch.float64, device=device, requires_grad=True)
    expected = layer(images)
    torch.testing.assert_close(geometry.apply(images, layer.weight), expected)
    assert geometry.output_size(size) == tuple(expected.shape[2:])
    assert geometry.channels(layer.weight) == (4, 8)
    outputs = torch.randn_like(expected)
    gradient, derivative = torch.autograd.grad(expected, (images, layer.weight), outputs)
    torch.testing.assert_close(geometry.adjoint(outputs, layer.weight, size), gradient)
    with torch.no_grad():
        torch.testing.assert_close(geometry.derivative(images, outputs, layer.weight), derivative)


def test_the_adjoint_of_a_complex_weight_conjugates_it(device):
    layer = nn.Conv1d(2, 3, 3, padding=1, bias=False, dtype=torch.complex128, device=device)
    geometry = ConvolutionGeometry.of(layer)
    images = torch.randn(1, 2, 5, dtype=torch.complex128, device=device)
    outputs = torch.randn(1, 3, 5, dtype=torch.complex128, device=device)
    left = torch.vdot(geometry.apply(images, layer.weight).flatten(), outputs.flatten())
    right = torch.vdot(images.flatten(), geometry.adjoint(outputs, layer.weight, (5,)).flatten())
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize(("kind", "options", "size"), _LAYERS)
def test_the_patches_that_read_a_pixel_bound_the_map(kind, options, size):
    layer = kind(4, 4, **options, bias=False, dtype=torch.float64)
    geometry = ConvolutionGeometry.of(layer)
    # With every entry one, the most often read pixel of the map of ones is read by this many taps.
    ones = torch.ones(1, 4, *(geometry.output_size(size) if not geometry.transposed else size), dtype=torch.float64)
    weight = torch.ones_like(layer.weight)
    if geometry.transposed:
        counts = geometry.apply(ones, weight)
    else:
        counts = geometry.adjoint(ones, weight, size)
    per_group = 4 // geometry.groups
    assert max_patches_per_pixel(geometry, size) == round(counts.max().item() / per_group)
