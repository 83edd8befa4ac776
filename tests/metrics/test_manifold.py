"""Precision, recall, density and coverage, against their definitions written out with loops."""

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import density_coverage, neighbour_radii, pairwise, precision_recall


def cloud(num: int, size: int = 3, *, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed)) + shift


def radius_by_hand(features: Tensor, index: int, k: int) -> float:
    distances = sorted(float((features[index] - other).norm()) for i, other in enumerate(features) if i != index)
    return distances[k - 1]


def counts_by_hand(points: Tensor, centers: Tensor, k: int) -> list[list[bool]]:
    """Row by point, column by ball."""
    radii = [radius_by_hand(centers, index, k) for index in range(len(centers))]
    return [[float((p - c).norm()) <= r for c, r in zip(centers, radii, strict=True)] for p in points]


@pytest.fixture(params=[(1024, 4096), (7, 5)], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "_BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(pairwise, "_BLOCK_COLUMNS", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_shares_in_the_others_manifold(k: int, device: torch.device) -> None:
    real, fake = cloud(40, seed=1).double(), cloud(30, shift=0.8, seed=2).double()
    found = precision_recall(real.to(device), fake.to(device), k=k, device=device)
    in_real, in_fake = counts_by_hand(fake, real, k), counts_by_hand(real, fake, k)
    assert found.precision == pytest.approx(sum(map(any, in_real)) / 30)
    assert found.recall == pytest.approx(sum(map(any, in_fake)) / 40)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


@pytest.mark.usefixtures("blocks")
def test_density_and_coverage_count_the_real_neighbourhoods(device: torch.device) -> None:
    real, fake = cloud(40, seed=1).double(), cloud(30, shift=0.8, seed=2).double()
    found = density_coverage(real.to(device), fake.to(device), k=5, device=device)
    inside = counts_by_hand(fake, real, 5)
    assert found.density == pytest.approx(sum(map(sum, inside)) / (5 * 30))
    assert found.coverage == pytest.approx(sum(map(any, zip(*inside, strict=True))) / 40)
    assert 0 < found.coverage < 1


@pytest.mark.usefixtures("blocks")
def test_the_radius_reaches_to_the_kth_other_image() -> None:
    features = cloud(25).double()
    expected = [radius_by_hand(features, index, 4) for index in range(25)]
    torch.testing.assert_close(neighbour_radii(features, k=4), torch.tensor(expected, dtype=torch.float64))


def test_float32_features_far_from_zero_keep_their_neighbours() -> None:
    features = cloud(60) * 1e-3 + 100
    exact = features.double()
    expected = torch.tensor([radius_by_hand(exact, index, 3) for index in range(60)], dtype=torch.float64)
    torch.testing.assert_close(neighbour_radii(features, k=3), expected)


def test_the_same_images_have_perfect_precision_recall_and_coverage() -> None:
    real = cloud(50)
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert density_coverage(real, real.clone()).coverage == 1.0


def test_density_of_another_draw_is_about_one() -> None:
    # Each real ball holds k of the n real points, and so about as many of n others.
    assert density_coverage(cloud(1500, seed=1), cloud(1500, seed=2)).density == pytest.approx(1, abs=0.1)


def test_dropping_a_mode_lowers_recall_and_coverage_alone() -> None:
    real = torch.cat([cloud(100, seed=1), cloud(100, shift=50, seed=2)])
    fake = cloud(200, seed=3)
    found, counted = precision_recall(real, fake), density_coverage(real, fake)
    assert found.precision > 0.8
    assert found.recall < 0.55
    assert counted.coverage <= 0.5


def test_one_stray_real_image_lets_precision_grow_but_not_density() -> None:
    real = torch.cat([cloud(100, seed=1), torch.full((1, 3), 30.0)])
    fake = torch.full((100, 3), 15.0) + cloud(100, seed=2) / 10
    assert precision_recall(real, fake).precision == 1.0
    assert density_coverage(real, fake).density == pytest.approx(1 / 5)


def test_known_radii_are_used() -> None:
    real, fake = cloud(40, seed=1), cloud(40, shift=0.5, seed=2)
    assert precision_recall(real, fake, real_radii=neighbour_radii(real, k=3)) == precision_recall(real, fake)
    assert precision_recall(real, fake, real_radii=torch.zeros(40)).precision == 0


def test_too_few_images_for_k_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 images on each side, got 3 and 10"):
        precision_recall(cloud(3), cloud(10))
    with pytest.raises(UserError, match="k must be from 1 to one less than the number of images"):
        density_coverage(cloud(5), cloud(10))
