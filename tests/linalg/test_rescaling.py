"""AOL's rescaling and the row sums behind it, against the explicit operator."""

import math

import pytest
import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rescaling import almost_orthogonal, gram_row_sums

from .operators import LAYERS, explicit

# SVD in float64 of the stored numbers, of matrices of some hundred rows.
SVD = 1e-12


def _norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 50), (50, 1), (64, 64)])
def test_a_rescaled_matrix_has_norm_one_at_most_as_stored(shape, dtype, device):
    gaussian = torch.randn(shape, device=device)
    low_rank = torch.randn(shape[0], 1, device=device) @ torch.randn(1, shape[1], device=device)
    uneven = gaussian * torch.logspace(-30, 30, shape[1], device=device).clamp(1e-3, 50)
    for matrix in (gaussian, low_rank, uneven, torch.ones_like(gaussian)):
        for scale in (1.0, 1e-3, 1e2):
            found = almost_orthogonal((matrix * scale).to(dtype))
            assert found.dtype == dtype
            assert _norm(found) <= 1 + SVD


def test_orthogonal_columns_come_out_with_norm_one(device):
    matrix = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64, device=device)).Q * torch.arange(
        1, 21, device=device
    )
    found = almost_orthogonal(matrix)
    torch.testing.assert_close(found, matrix / torch.arange(1, 21, device=device))


def test_a_matrix_is_rescaled_as_in_the_paper(device):
    matrix = torch.randn(7, 5, dtype=torch.float64, device=device)
    expected = matrix @ torch.diag((matrix.mT @ matrix).abs().sum(1) ** -0.5)
    torch.testing.assert_close(almost_orthogonal(matrix), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "options", "size"), LAYERS)
def test_a_rescaled_convolution_has_norm_one_at_most(kind, options, size, dtype, device):
    layer = kind(4, 8, **options, bias=False, device=device)
    geometry = ConvolutionGeometry.of(layer)
    random = layer.weight.detach()
    # Smooth kernels are those where patches add up, alternating ones those where they cancel.
    for weight in (random, random.abs(), torch.ones_like(random), torch.randn_like(random).sign()):
        found = almost_orthogonal(weight.to(dtype), geometry)
        assert _norm(explicit(geometry, found, size)) <= 1 + SVD


def test_the_bound_of_a_constant_kernel_is_attained(device):
    geometry = ConvolutionGeometry.of(nn.Conv1d(1, 1, 3, padding=1))
    found = almost_orthogonal(torch.ones(1, 1, 3, dtype=torch.float64, device=device), geometry)
    norm = _norm(explicit(geometry, found, (400,)))
    assert 0.9999 < norm <= 1


@pytest.mark.parametrize(
    "options", [options for kind, options, _ in LAYERS if kind is nn.Conv1d and "padding_mode" not in options]
)
def test_the_sums_are_those_of_the_operators_rows_in_the_middle_of_a_large_image(options, device):
    layer = nn.Conv1d(4, 8, **options, bias=False, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(layer)
    weight, large = layer.weight.detach(), (60,)
    matrix = explicit(geometry, weight, large)
    rows = (matrix.mT @ matrix).abs().sum(1).reshape(4, *large)[:, 20:40].amax(1)
    step = [geometry.stride[0] // math.gcd(geometry.stride[0], geometry.dilation[0])]
    torch.testing.assert_close(gram_row_sums(weight, step=step), rows)


def test_shares_weight_the_rows_and_keep_the_bound(device):
    matrix = torch.randn(9, 6, dtype=torch.float64, device=device)
    shares = torch.rand(6, dtype=torch.float64, device=device) + 0.1
    gram = matrix.mT @ matrix
    found = gram_row_sums(matrix, shares=shares)
    torch.testing.assert_close(found, (gram.abs() * shares / shares[:, None]).sum(1))
    assert torch.linalg.eigvalsh(torch.diag(found) - gram).amin() >= -1e-12


def test_gradients_are_the_functions(device):
    dense = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(almost_orthogonal, dense)
    layer = nn.Conv2d(4, 4, 3, stride=(1, 2), groups=2, dtype=torch.float64, device=device)
    geometry = ConvolutionGeometry.of(layer)
    assert torch.autograd.gradcheck(lambda weight: almost_orthogonal(weight, geometry), layer.weight)
    assert torch.autograd.gradcheck(lambda weight: gram_row_sums(weight, groups=2), layer.weight)


def test_zero_channels_stay_zero_with_finite_gradients(device):
    weight = torch.randn(5, 4, device=device)
    weight[:, 1] = 0
    for each in (weight, torch.zeros_like(weight)):
        each = each.requires_grad_()
        found = almost_orthogonal(each)
        assert (found[:, 1] == 0).all()
        found.sum().backward()
        assert each.grad.isfinite().all()


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 3, dtype=torch.complex64), torch.ones(3, 3).int()])
def test_what_has_no_channels_to_rescale_is_refused(weight):
    with pytest.raises(UserError, match="real floating weights"):
        almost_orthogonal(weight)
    with pytest.raises(UserError, match="real floating weights"):
        gram_row_sums(weight)
