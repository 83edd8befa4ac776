import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from spectralnorm.errors import UserError
from spectralnorm.gan.penalties import PENALTIES, path_length_penalty, path_lengths

SHAPE = (5, 2, 4, 4)


@pytest.fixture
def weight(device: torch.device) -> Tensor:
    return torch.randn(2 * 4 * 4, dtype=torch.float64, device=device, requires_grad=True)


@pytest.fixture
def smooth(device: torch.device) -> nn.Module:
    """A discriminator with derivatives of every order."""
    layers = [nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).to(device, torch.float64)


def _images(device: torch.device) -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(2, *SHAPE, dtype=torch.float64, device=device)
    return real, fake


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r1", lambda norm: norm**2 / 2),
        ("r2", lambda norm: norm**2 / 2),
        ("r1-r2", lambda norm: norm**2),
        ("gradient-penalty", lambda norm: (norm - 1) ** 2),
        ("dragan", lambda norm: (norm - 1) ** 2),
    ],
)
def test_the_penalty_of_a_linear_discriminator_is_that_of_its_weight(
    name: str, expected, weight: Tensor, device: torch.device
):
    penalty = PENALTIES[name](lambda images: images.flatten(1) @ weight, *_images(device), random=_seeded(device))
    assert penalty.ndim == 0
    assert_close(penalty, expected(weight.norm()))
    (gradient,) = torch.autograd.grad(penalty, weight)
    (analytic,) = torch.autograd.grad(expected(weight.norm()), weight)
    assert_close(gradient, analytic)


def test_every_penalty_has_its_analytic_case():
    assert set(PENALTIES) == {"r1", "r2", "r1-r2", "gradient-penalty", "dragan"}


@pytest.mark.parametrize(("name", "at_real"), [("r1", True), ("r2", False)])
def test_r1_is_taken_at_real_images_and_r2_at_generated_ones(name: str, at_real: bool, device: torch.device):
    real, fake = _images(device)
    penalty = PENALTIES[name](lambda images: images.flatten(1).square().sum(1) / 2, real, fake)  # its gradient: images
    assert_close(penalty, 0.5 * (real if at_real else fake).flatten(1).square().sum(1).mean())


@pytest.mark.parametrize("name", PENALTIES)
def test_the_gradient_of_every_penalty_is_its_finite_difference(name: str, smooth: nn.Module, device: torch.device):
    real, fake = _images(device)

    def penalty() -> Tensor:
        return PENALTIES[name](smooth, real, fake, random=_seeded(device))

    kernel = smooth[0].weight
    (gradient,) = torch.autograd.grad(penalty(), kernel)
    direction, step = torch.randn_like(kernel), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            kernel.add_(sign * step * direction)
        values.append(penalty().item())
        with torch.no_grad():
            kernel.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    # Central differences err by step^2 and by rounding over step: 1e-10 each, on a slope of order 1.
    assert_close((gradient * direction).sum().item(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_finite_where_the_discriminator_is_flat(name: str, weight: Tensor, device: torch.device):
    penalty = PENALTIES[name](lambda images: images.flatten(1) @ (0 * weight), *_images(device))
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.isfinite(penalty)
    assert not gradient.any()


@pytest.mark.parametrize("name", PENALTIES)
def test_no_penalty_reaches_the_images(name: str, smooth: nn.Module, device: torch.device):
    real, fake = (images.requires_grad_() for images in _images(device))
    PENALTIES[name](smooth, real, fake).backward()
    assert real.grad is None
    assert fake.grad is None


def test_the_gradient_penalty_looks_between_a_real_image_and_its_partner(device: torch.device):
    seen = []

    def discriminator(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return images.flatten(1).sum(1)

    real, fake = _images(device)
    PENALTIES["gradient-penalty"](discriminator, real, fake, random=_seeded(device))
    share = (seen[0] - real) / (fake - real)
    assert_close(share, share[:, :1, :1, :1].expand(SHAPE))  # one point on the straight line for each image
    assert share.min() >= 0
    assert share.max() <= 1
    assert share[:, 0, 0, 0].unique().numel() == SHAPE[0]


def test_the_gradient_penalty_refuses_batches_that_do_not_pair_up(smooth: nn.Module, device: torch.device):
    real, fake = _images(device)
    with pytest.raises(UserError, match="give equally many"):
        PENALTIES["gradient-penalty"](smooth, real, fake[:2])


def test_dragan_looks_around_real_images_at_half_their_deviation(device: torch.device):
    seen = []

    def discriminator(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return images.flatten(1).sum(1)

    real = 3 * torch.randn(64, 3, 16, 16, dtype=torch.float64, device=device)
    PENALTIES["dragan"](discriminator, real, real)
    # 49,152 normal numbers: their deviation is known to 1 / sqrt(2 * 49152) = 0.3 %; four times that is allowed.
    assert_close((seen[0] - real).std(), 0.5 * real.std(), rtol=0.0128, atol=0)


def test_path_lengths_of_a_linear_generator_are_those_of_its_matrix(device: torch.device):
    matrix = torch.randn(6, 2 * 4 * 4, dtype=torch.float64, device=device)
    styles = torch.randn(3, 1, 6, dtype=torch.float64, device=device, requires_grad=True)
    images = (styles[:, 0] @ matrix).view(3, 2, 4, 4)
    lengths = path_lengths(images, styles, random=_seeded(device))
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64, device=device, generator=_seeded(device))
    expected = (matrix @ noise.flatten(1).T / math.sqrt(4 * 4)).norm(dim=0)
    assert_close(lengths, expected)


def test_path_lengths_are_averaged_over_the_layers(device: torch.device):
    matrix = torch.randn(6, 2 * 4 * 4, dtype=torch.float64, device=device)
    styles = torch.randn(3, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    images = (styles.sum(1) @ matrix).view(3, 2, 4, 4)  # both layers have the same Jacobian
    one = path_lengths((styles[:, 0] @ matrix).view(3, 2, 4, 4), styles, random=_seeded(device))
    both = path_lengths(images, styles, random=_seeded(device))
    assert_close(both, one * math.sqrt(2))


def test_the_path_length_penalty_is_the_distance_from_the_running_mean():
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64)
    penalty, average = path_length_penalty(lengths, torch.tensor(4.0, dtype=torch.float64), decay=0.5)
    assert average.item() == 3.0
    assert penalty.item() == ((1 - 3) ** 2 + 0) / 2


def test_the_path_length_penalty_trains_the_generator(device: torch.device):
    scale = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)
    styles = torch.randn(3, 1, 32, dtype=torch.float64, device=device, requires_grad=True)
    lengths = path_lengths((scale * styles).view(3, 2, 4, 4), styles, random=_seeded(device))
    penalty, average = path_length_penalty(lengths, torch.zeros((), dtype=torch.float64, device=device))
    (gradient,) = torch.autograd.grad(penalty, scale)
    unscaled = lengths.detach() / 2  # lengths are proportional to the scale, the running mean is held fixed
    assert_close(gradient, (2 * (lengths.detach() - average) * unscaled).mean())
