import math

import pytest
import torch
from torch.testing import assert_close

from spectralnorm.errors import UserError
from spectralnorm.gan.latents import label_tensor, slerp, truncated, walk_latents

NAMES = ("T-shirt", "Coat", "3", "0")


def test_truncated_numbers_have_the_cut_off_normal_distribution():
    latents = truncated(torch.randn(200_000, dtype=torch.float64), 0.5)
    assert latents.abs().max() <= 1
    # Moments of N(0, 1) given |z| <= 1: the variance is 1 - 2 phi(1) / (2 Phi(1) - 1).
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * density / math.erf(1 / math.sqrt(2))
    assert abs(latents.mean().item()) < 6 * math.sqrt(variance / 200_000)
    assert latents.square().mean().item() == pytest.approx(variance, abs=6 * 0.3 / math.sqrt(200_000))
    half = (latents.abs() < 0.5).double().mean().item()
    expected = math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    assert abs(half - expected) < 6 * 0.5 / math.sqrt(200_000)


def test_truncation_keeps_the_order_and_one_changes_nothing():
    latents = torch.randn(1000).sort().values
    assert (truncated(latents, 0.3).diff() >= 0).all()
    assert torch.equal(truncated(latents, 1.0), latents)
    assert torch.isfinite(truncated(torch.tensor([-40.0, 40.0]), 0.1)).all()


def test_a_spherical_walk_keeps_the_norm_and_its_speed():
    start, end = torch.nn.functional.normalize(torch.randn(2, 5, 16, dtype=torch.float64), dim=-1)
    shares = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None, None]
    walk = slerp(start, end, shares)
    assert_close(walk.norm(dim=-1), torch.ones(7, 5, dtype=torch.float64))
    steps = (walk[1:] - walk[:-1]).norm(dim=-1)
    assert_close(steps, steps[:1].expand_as(steps))
    assert_close(walk[[0, -1]], torch.stack([start, end]))


def test_a_loop_passes_its_stops_and_leads_back():
    stops = torch.randn(2, 3, 8)
    walk = walk_latents(stops, 12, loop=True)
    assert_close(walk[:, ::4], stops)
    # The step from the last frame to the first is as long as the others of its leg.
    assert_close((walk[:, 0] - walk[:, 11]).norm(dim=1), (walk[:, 11] - walk[:, 10]).norm(dim=1), rtol=0.3, atol=0)


def test_a_way_ends_at_its_last_stop():
    stops = torch.randn(2, 3, 8)
    walk = walk_latents(stops, 9, loop=False)
    assert_close(walk[:, [0, 4, 8]], stops)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("Coat", [1, 1, 1]),
        ("2", [2, 2, 2]),
        ("3", [2, 2, 2]),  # a name before a number
        (0, [0, 0, 0]),
        (["Coat", 0, "0"], [1, 0, 3]),
        (torch.tensor([2, 1, 0]), [2, 1, 0]),
        (torch.tensor(1), [1, 1, 1]),
    ],
)
def test_labels_are_names_or_numbers(labels, expected: list[int]):
    found = label_tensor(labels, 3, NAMES)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("Hat", "Unknown class 'Hat'; choose a name or a number of 0 T-shirt, 1 Coat"),
        (4, "Unknown class '4'"),
        (-1, "Unknown class '-1'"),
        ([0, 1], r"as many as images \(3\), got 2"),
        (torch.rand(3), "whole numbers"),
    ],
)
def test_labels_that_mean_nothing_are_told(labels, says: str):
    with pytest.raises(UserError, match=says):
        label_tensor(labels, 3, NAMES)


def test_labels_without_classes_are_told():
    with pytest.raises(UserError, match="trained without labels"):
        label_tensor(0, 3, ())
