"""Path lengths of generators whose derivative is known."""

import math

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import path_length


def pixels(latents: Tensor, rows: slice) -> Tensor:
    return latents[:, :, None, None]


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def ends(num: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, size, generator=generator).double(), torch.randn(num, size, generator=generator).double()


def test_along_a_straight_line_a_linear_generator_has_the_squared_distance_of_its_ends() -> None:
    start = torch.zeros(60, 3, dtype=torch.float64)
    end = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64).expand(60, -1)
    found = path_length(pixels, lambda x: 10 * flat(x), start, end, spherical=False)
    assert found.mean == pytest.approx(900, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-3)
    assert found.num == 60


def test_along_a_great_circle_the_speed_is_the_angle_times_the_radius() -> None:
    start = 3 * torch.eye(4, dtype=torch.float64)[:1].expand(50, -1)
    end = 5 * torch.eye(4, dtype=torch.float64)[1:2].expand(50, -1)
    # A quarter of a circle of radius 2, the root of four dimensions, whatever the ends' own lengths.
    found = path_length(pixels, flat, start, end, spherical=True)
    assert found.mean == pytest.approx((2 * math.pi / 2) ** 2, rel=1e-5)


def test_the_extreme_percents_are_left_out() -> None:
    start = torch.zeros(201, 1, dtype=torch.float64)
    end = torch.ones(201, 1, dtype=torch.float64)
    end[0] = 1e6
    assert path_length(pixels, flat, start, end, spherical=False).mean == pytest.approx(1, rel=1e-6)


def test_float32_comes_near_float64() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
    start, end = ends(200, 16)
    with torch.no_grad():
        single = path_length(lambda z, _: network(z), lambda x: x, start.float(), end.float(), spherical=True)
        network.double()
        double = path_length(lambda z, _: network(z), lambda x: x, start, end, spherical=True)
    assert single.mean == pytest.approx(double.mean, rel=0.01)


def test_rows_name_the_paths_and_batches_do_not_matter() -> None:
    start, end = ends(50, 4)
    factors = torch.arange(50, dtype=torch.float64)[:, None, None, None]

    def images(latents: Tensor, rows: slice) -> Tensor:
        return factors[rows] * pixels(latents, rows)

    one = path_length(images, flat, start, end, spherical=True, batch_size=50)
    many = path_length(images, flat, start, end, spherical=True, batch_size=7)
    assert one.mean == pytest.approx(many.mean, rel=1e-9)


def test_what_is_no_path_is_refused() -> None:
    start, end = ends(5, 4)
    with pytest.raises(UserError, match="matrices of one shape"):
        path_length(pixels, flat, start, end[:4], spherical=True)
    with pytest.raises(UserError, match="epsilon must be positive"):
        path_length(pixels, flat, start, end, spherical=True, epsilon=0.0)
