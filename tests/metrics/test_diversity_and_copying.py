"""How different images are, and how near they come to training images: against loops and known cases."""

import itertools

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import copying, diversity, pairwise


def cloud(num: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


def mean_distance_by_hand(features: Tensor) -> float:
    pairs = list(itertools.combinations(features.double(), 2))
    return sum(float((a - b).norm()) for a, b in pairs) / len(pairs)


def test_diversity_is_the_ratio_of_mean_pairwise_distances(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "_BLOCK_ROWS", 8)
    monkeypatch.setattr(pairwise, "_BLOCK_COLUMNS", 5)
    real, fake = cloud(30, seed=1), cloud(21, scale=0.5, seed=2)
    expected = mean_distance_by_hand(fake) / mean_distance_by_hand(real)
    assert diversity(real, fake, device=device).overall == pytest.approx(expected, rel=1e-9)
    assert diversity(real, fake).within_class is None


def test_one_image_a_class_is_seen_within_classes_alone() -> None:
    classes = torch.arange(10).repeat(20)
    centers = cloud(10, scale=20)
    real = centers[classes] + cloud(200, seed=1)
    found = diversity(real, centers[classes], real_classes=classes, fake_classes=classes)
    assert found.overall == pytest.approx(1, abs=0.05)
    assert found.within_class == pytest.approx(0, abs=1e-6)


def test_diversity_within_classes_leaves_out_those_that_one_side_lacks() -> None:
    real = torch.tensor([[0.0], [2.0], [10.0], [11.0], [50.0]])
    fake = torch.tensor([[0.0], [1.0], [7.0]])
    found = diversity(real, fake, real_classes=torch.tensor([0, 0, 1, 1, 2]), fake_classes=torch.tensor([0, 0, 1]))
    assert found.within_class == pytest.approx(0.5)


def test_real_images_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(UserError, match="All real images have the same features"):
        diversity(torch.zeros(5, 2), torch.randn(5, 2))


def test_a_perfect_generator_is_nearer_than_usual_as_often_as_the_quantile_says() -> None:
    generator = torch.Generator().manual_seed(0)
    found = copying(torch.rand(4000, generator=generator), torch.rand(4000, generator=generator))
    assert found.share == pytest.approx(0.05, abs=0.015)
    assert found.probability == pytest.approx(0.5, abs=0.03)
    assert found.median_ratio == pytest.approx(1, abs=0.06)


def test_copies_are_all_nearer_than_usual() -> None:
    assert copying(torch.zeros(50), 1 + torch.rand(50)) == (1.0, 1.0, 0.0)


def test_part_of_the_images_copied_is_that_share_and_what_chance_adds() -> None:
    usual = torch.linspace(1, 2, 1000)
    found = copying(torch.cat([torch.zeros(300), torch.linspace(1, 2, 700)]), usual)
    assert found.share == pytest.approx(0.3 + 0.7 * 0.05, abs=0.002)


def test_ties_count_half() -> None:
    found = copying(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0, 3.0]))
    # Of 1: two ties and two farther; of 2: one tie and one farther.
    assert found.probability == pytest.approx((3 / 4 + 1.5 / 4) / 2)


def test_copying_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(UserError, match="at least two held-out images"):
        copying(torch.zeros(3), torch.zeros(1))
    with pytest.raises(UserError, match="vectors that are not empty"):
        copying(torch.zeros(0), torch.zeros(3))
    with pytest.raises(UserError, match="quantile must be between 0 and 1"):
        copying(torch.zeros(3), torch.zeros(3), quantile=1.0)
