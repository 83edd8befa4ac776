"""Distances of features, against formulas written out in float64."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import frechet_distance, kernel_distance


def frechet_by_hand(x: Tensor, y: Tensor) -> float:
    """Heusel et al. 2017, eq. 6, with scipy's square root of a matrix."""
    a, b = x.double().numpy(), y.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def squared_mmd_by_hand(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of Gretton et al. 2012, eq. 3, sum by sum."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * across


def features(num: int, size: int, *, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Correlated, skewed and far from zero, as features of networks are: float32 (num, size)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / size**0.5
    return torch.nn.functional.softplus(torch.randn(num, size, generator=generator) @ mix + shift) + 1


def test_frechet_distance_agrees_with_scipys_matrix_square_root() -> None:
    real, fake = features(300, 16, seed=1), features(200, 16, shift=0.3, seed=2)
    assert frechet_distance(real, fake) == pytest.approx(frechet_by_hand(real, fake), rel=1e-8)


def test_frechet_distance_of_shifted_and_stretched_gaussians_is_known() -> None:
    # Exact moments: points in pairs around the mean, along each axis.
    axes = torch.eye(3, dtype=torch.float64)
    points = torch.cat([axes, -axes]) * (5 / 2) ** 0.5  # covariance 1
    shift = torch.tensor([1.0, -2.0, 0.5])
    stretch = torch.tensor([1.0, 2.0, 3.0])
    expected = float(shift.square().sum() + (stretch - 1).square().sum())
    assert frechet_distance(points, points * stretch + shift) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_symmetric() -> None:
    real, fake = features(100, 8, seed=1), features(150, 8, shift=0.2, seed=2)
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    real = features(100, 8)
    assert 0 <= frechet_distance(real, real) < 1e-6


def test_frechet_distance_keeps_its_digits_far_from_zero() -> None:
    real, fake = features(300, 8, seed=1).double(), features(300, 8, shift=0.1, seed=2).double()
    far = frechet_distance(real + 1e6, fake + 1e6)
    assert far == pytest.approx(frechet_distance(real, fake), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features_is_finite_and_right() -> None:
    real, fake = features(20, 64, seed=1), features(12, 64, shift=0.3, seed=2)
    # tr((C C')^(1/2)) is the nuclear norm of X Y^T for centred data: no square root of a singular matrix.
    x, y = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (real.double(), fake.double()))
    means = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    expected = means + x.square().sum() + y.square().sum() - 2 * torch.linalg.matrix_norm(x @ y.T, "nuc")
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-5)


def test_frechet_distance_of_unchanging_features_is_the_distance_of_the_means() -> None:
    assert frechet_distance(torch.zeros(10, 3), torch.ones(10, 3)) == pytest.approx(3.0)


def test_kernel_distance_of_whole_sets_agrees_with_the_formula() -> None:
    real, fake = features(24, 5, seed=1), features(24, 5, shift=0.2, seed=2)
    mean, spread = kernel_distance(real.double(), fake.double(), num_subsets=3, subset_size=24)
    assert mean == pytest.approx(squared_mmd_by_hand(real, fake), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-9)


def test_kernel_distance_in_float32_is_close_to_float64() -> None:
    real, fake = features(400, 64, seed=1), features(400, 64, shift=0.02, seed=2)
    mean, spread = kernel_distance(real, fake)
    exact, _ = kernel_distance(real.double(), fake.double())
    assert abs(mean - exact) < 1e-3 * spread


def test_kernel_distance_is_unbiased() -> None:
    real, fake = features(4000, 8, seed=1), features(4000, 8, seed=2)
    for size in (10, 200):
        mean, spread = kernel_distance(real.double(), fake.double(), num_subsets=400, subset_size=size)
        assert abs(mean) < 4 * spread / 400**0.5 + 0.02 * spread


def test_kernel_distance_grows_with_the_shift() -> None:
    real = features(500, 8, seed=1)
    distances = [kernel_distance(real, features(500, 8, shift=shift, seed=2))[0] for shift in (0.1, 0.3, 0.6)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_kernel_distance_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    real, fake = features(60, 4, seed=1), features(60, 4, seed=2)
    assert kernel_distance(real, fake, seed=3) == kernel_distance(real, fake, seed=3)
    assert kernel_distance(real, fake, seed=3) != kernel_distance(real, fake, seed=4)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_the_global_random_numbers_are_left_alone(distance) -> None:
    before = torch.get_rng_state()
    distance(features(20, 4), features(20, 4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), r"as many columns, got \(5, 3\) and \(5, 4\)"),
        (torch.zeros(5), torch.zeros(5, 4), "must be two matrices"),
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least 2 images on each side, got 1 and 5"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(distance, real: Tensor, fake: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distance(real, fake)


def test_a_subset_larger_than_a_set_is_refused() -> None:
    with pytest.raises(UserError, match="subset_size must be from 2 to the 10 images of the smaller set, got 11"):
        kernel_distance(torch.zeros(20, 3), torch.zeros(10, 3), subset_size=11)


def test_no_subsets_are_refused() -> None:
    with pytest.raises(UserError, match="num_subsets must be at least 1, got 0"):
        kernel_distance(torch.zeros(20, 3), torch.zeros(10, 3), num_subsets=0)


def test_importing_the_metrics_does_not_import_torchmetrics() -> None:
    code = "import sys, spectralnorm.metrics; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
