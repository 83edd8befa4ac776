"""Modes that are counted by hand."""

import math

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.metrics import class_modes, count_modes

RING = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(8) * math.pi / 4])


def test_a_perfect_ring_has_all_modes_and_the_share_within_three_deviations() -> None:
    noise = 0.02 * torch.randn(8000, 2, generator=torch.Generator().manual_seed(0))
    found = count_modes(RING.repeat(1000, 1) + noise, RING, standard_deviation=0.02)
    assert found.covered == 8
    # In two dimensions the share within r deviations is 1 - exp(-r^2 / 2).
    assert found.high_quality_share == pytest.approx(1 - math.exp(-4.5), abs=4 * math.sqrt(0.011 / 8000))
    assert sum(found.counts) == round(8000 * found.high_quality_share)


def test_samples_between_modes_reach_none() -> None:
    found = count_modes(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.061]]), RING, standard_deviation=0.02)
    assert (found.covered, found.counts[0]) == (1, 1)
    assert found.high_quality_share == pytest.approx(1 / 3)


def test_a_sample_counts_for_its_nearest_mode_alone() -> None:
    found = count_modes(torch.tensor([[0.4]]), torch.tensor([[0.0], [1.0]]), standard_deviation=1.0)
    assert found.counts == (1, 0)


def test_three_digits_make_a_thousand_modes() -> None:
    digits = torch.tensor([[0, 0, 7], [0, 0, 7], [9, 9, 9], [1, 2, 3]])
    found = class_modes(torch.nn.functional.one_hot(digits, 10).float())
    assert (found.covered, found.num_modes) == (3, 1000)
    assert (found.shares[7], found.shares[999], found.shares[123]) == (0.5, 0.25, 0.25)
    assert found.divergence == pytest.approx(0.5 * math.log(500) + 0.5 * math.log(250))


def test_even_votes_have_no_divergence_and_one_mode_has_the_most() -> None:
    assert class_modes(torch.eye(10)).divergence == pytest.approx(0, abs=1e-12)
    assert class_modes(torch.eye(10)[:1].repeat(5, 1)).divergence == pytest.approx(math.log(10))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="matrices of as many columns"):
        count_modes(torch.zeros(3, 2), torch.zeros(3, 3), standard_deviation=1)
    with pytest.raises(UserError, match="must be positive, got 0"):
        count_modes(torch.zeros(3, 2), RING, standard_deviation=0)
    with pytest.raises(UserError, match="logits must have the shape"):
        class_modes(torch.zeros(3))
