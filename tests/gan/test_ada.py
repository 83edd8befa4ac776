import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spectralnorm.errors import UserError
from spectralnorm.gan import ada
from spectralnorm.gan.penalties import PENALTIES


def _random(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _p(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, device=device)


def _identity(batch: int, device: torch.device) -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64, device=device)[:2].repeat(batch, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_leaks_at_probability_zero(channels: int, dtype: torch.dtype, device: torch.device):
    images = (torch.rand(32, channels, 16, 16, device=device) * 2 - 1).to(dtype).requires_grad_(True)
    augmented = ada.transform(images, _p(0.0, device), _random(device))
    cotangent = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(augmented, images, cotangent)
    assert torch.equal(augmented, images)
    assert torch.equal(gradient, cotangent)


def test_the_share_of_untouched_images_is_the_product_of_the_shares_of_each_part(device: torch.device):
    p, batch = 0.1, 3000
    images = torch.rand(batch, 3, 8, 8, device=device)
    augmented = ada.transform(images, _p(p, device), _random(device))
    untouched = (augmented == images).flatten(1).all(1).float().mean().item()
    # A half of the mirrorings, a quarter of the turns and of the roundings of U(-1, 1) axes leave an image.
    blits = (1 - p / 2) * (1 - 3 * p / 4) * (1 - p * 3 / 4)
    warps = (1 - p) ** 4  # scale, rotations together, stretch, shift
    colors = (1 - p) ** 4 * (1 - p / 2)
    expected = blits * warps * colors
    assert abs(untouched - expected) < 6 * math.sqrt(expected * (1 - expected) / batch)


def test_blitting_makes_the_eight_symmetries_of_the_square_and_whole_moves(device: torch.device):
    image = torch.rand(1, 1, 9, 9, device=device)
    blitted = ada.blit(image.expand(3000, -1, -1, -1), _p(1.0, device), _random(device))
    padded = nn.functional.pad(image, (1, 1, 1, 1), mode="reflect")
    kinds = []
    for mirror in (False, True):
        for turns in range(4):
            for down in (0, 1, 2):
                for right in (0, 1, 2):
                    view = torch.rot90(padded.flip(3) if mirror else padded, turns, (2, 3))
                    kinds.append((blitted == view[:, :, down : down + 9, right : right + 9]).flatten(1).all(1))
    counts = torch.stack(kinds).float().sum(1)
    assert counts.sum() == 3000
    # Moves of U(-1.125, 1.125) round to 0 in 4 of 9 cases.
    stays = torch.tensor([5 / 18, 4 / 9, 5 / 18], device=device)
    expected = 3000 * (torch.outer(stays, stays).flatten() / 8).repeat(8)
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_the_lowpass_filter_is_orthogonal_to_its_even_shifts():
    taps = torch.tensor(ada._SYM6, dtype=torch.float64)
    products = torch.stack([taps[: 12 - 2 * shift] @ taps[2 * shift :] for shift in range(6)])
    expected = torch.eye(6, dtype=torch.float64)[0]
    assert_close(products, expected, rtol=0, atol=1e-11)
    assert_close(taps.sum().square(), torch.tensor(2.0, dtype=torch.float64))


def test_a_warp_that_moves_nothing_gives_the_image_back(device: torch.device):
    images = torch.rand(2, 3, 12, 17, dtype=torch.float64, device=device)
    # The taps are known to twelve digits.
    assert_close(ada.warp(images, _identity(2, device)), images, rtol=0, atol=1e-10)


def test_a_warp_by_whole_pixels_copies_them(device: torch.device):
    images = torch.rand(1, 2, 24, 24, dtype=torch.float64, device=device)
    matrices = _identity(1, device)
    matrices[0, :, 2] = torch.tensor([-3.0, 2.0])  # read from 3 pixels to the left and 2 below
    warped = ada.warp(images, matrices)
    inner = slice(8, 16)
    assert_close(warped[:, :, inner, inner], images[:, :, 10:18, 5:13], rtol=0, atol=1e-10)


def test_a_warp_takes_a_blob_where_its_matrix_says(device: torch.device):
    size, angle, scale = 32, 0.7, 1.25
    axis = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2

    def blob(x: float, y: float, width: float) -> torch.Tensor:
        return torch.exp(-((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * width**2))[None, None]

    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    matrices = _identity(1, device)
    matrices[0, :, :2] = turn / scale
    x, y = (scale * torch.linalg.solve(turn, torch.tensor([4.0, -2.5], dtype=torch.float64))).tolist()
    warped = ada.warp(blob(4.0, -2.5, 2.5), matrices)
    # Bilinear sampling at half a pixel: an error of at most 1/8 of the curvature 1/2.5^2, over 2^2, on two axes.
    assert_close(warped, blob(x, y, 2.5 * scale), rtol=0, atol=0.02)


def test_what_lies_beyond_the_edges_is_the_mirrored_image(device: torch.device):
    images = torch.rand(1, 1, 12, 12, dtype=torch.float64, device=device)
    matrices = _identity(1, device)
    matrices[0, 0, 2] = 24.0  # twice the width: the mirror image of the mirror image
    assert_close(ada.warp(images, matrices)[..., 3:-3], images[..., 3:-3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_flat_images_stay_flat_under_any_warp(scale: float, device: torch.device):
    matrices = scale * _identity(1, device)
    flat = torch.full((1, 3, 10, 10), 0.3, dtype=torch.float64, device=device)
    assert_close(ada.warp(flat, matrices), flat, rtol=0, atol=1e-10)


def test_colors_of_a_gray_image_stay_gray(device: torch.device):
    gray = torch.rand(64, 1, 8, 8, dtype=torch.float64, device=device).expand(-1, 3, -1, -1)
    recolored = ada.recolor(gray, _p(1.0, device), _random(device))
    assert_close(recolored, recolored.mean(1, keepdim=True).expand_as(gray), rtol=0, atol=1e-5)
    assert (recolored - gray).abs().mean() > 0.1


def test_a_gray_image_in_one_channel_or_three_is_recolored_alike(device: torch.device):
    gray = torch.rand(64, 1, 8, 8, dtype=torch.float64, device=device)
    one = ada.recolor(gray, _p(1.0, device), _random(device))
    three = ada.recolor(gray.expand(-1, 3, -1, -1), _p(1.0, device), _random(device))
    # The chances are drawn in the same order, those of hue and saturation last.
    assert_close(one, three.mean(1, keepdim=True), rtol=0, atol=1e-5)


def test_hue_turns_and_saturation_stretches_around_gray(device: torch.device):
    colors = torch.rand(500, 3, 2, 1, dtype=torch.float64, device=device)
    changed = ada.recolor(colors, _p(1.0, device), _random(device))
    before, after = (images[:, :, 0, 0] - images[:, :, 1, 0] for images in (colors, changed))
    matrices = torch.stack([before, after])
    gray = matrices.mean(2)  # along the gray axis: contrast and luma flip alone, 2^N(0, 1/2) with either sign
    ratios = gray[1] / gray[0]
    assert 0.4 < (ratios < 0).double().mean() < 0.6
    assert abs(ratios.abs().log2().std().item() - 0.5) < 0.1
    across = (matrices - gray[:, :, None]).norm(dim=2)
    saturations = (across[1] / across[0]) / ratios.abs()
    assert abs(saturations.log2().std().item() - 1.0) < 0.2


def test_the_pipeline_is_differentiable_twice(device: torch.device):
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64, device=device, requires_grad=True)

    def pipeline(images: torch.Tensor) -> torch.Tensor:
        return ada.transform(images, _p(0.7, device), _random(device, 1)).tanh()

    # On a GPU the gradients that meet in a pixel, hundreds at most and of a size near one, are added up in any order.
    rounding = 0.0 if device.type == "cpu" else 1e-12
    assert torch.autograd.gradcheck(pipeline, images, fast_mode=True, nondet_tol=rounding)
    assert torch.autograd.gradgradcheck(pipeline, images, fast_mode=True, nondet_tol=rounding)


def test_r1_goes_through_the_pipeline_into_the_discriminator(device: torch.device):
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0))
    discriminator.to(device)
    real = torch.rand(4, 3, 16, 16, device=device)
    random = _random(device)

    def judge(images: torch.Tensor) -> torch.Tensor:
        return discriminator(ada.transform(images, _p(1.0, device), random))

    PENALTIES["r1"](judge, real, real, random=random).backward()
    gradients = [parameter.grad for parameter in discriminator.parameters()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_mean_gradients_of_augmented_images_are_those_of_the_share_left_alone(device: torch.device):
    # The gradient of an image's own mean is 1/pixels everywhere for each image that is let alone.
    images = torch.rand(2000, 1, 8, 8, device=device, requires_grad=True)
    augmented = ada.transform(images, _p(0.05, device), _random(device))
    (gradient,) = torch.autograd.grad(augmented.mean((1, 2, 3)).sum(), images)
    is_alone = (augmented == images).flatten(1).all(1)
    assert torch.equal(gradient[is_alone], torch.full_like(gradient[is_alone], 1 / 64))
    assert 0.4 < is_alone.float().mean() < 0.8
    assert (gradient[~is_alone] != 1 / 64).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 2, 8, 8), (1, 3, 4, 4)])
def test_images_it_has_no_meaning_for_are_refused(shape: tuple[int, ...], device: torch.device):
    with pytest.raises(UserError, match="ADA"):
        ada.transform(torch.rand(shape, device=device), _p(1.0, device), _random(device))
