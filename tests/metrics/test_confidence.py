"""Lower bounds of a mean: never too high more often than promised, and no looser than the mathematics makes them."""

import math

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.confidence import MEAN_BOUNDS, betting_bound, empirical_bernstein_bound, paired_differences

REPEATS = 300


def uniform(num: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num, generator=generator, dtype=torch.float64)


def rare(num: int, generator: torch.Generator) -> Tensor:
    return (uniform(num, generator) < 0.02).double()


def often(num: int, generator: torch.Generator) -> Tensor:
    return (uniform(num, generator) < 0.98).double()


def narrow(num: int, generator: torch.Generator) -> Tensor:
    return 0.3 + 0.01 * uniform(num, generator)


DRAWS = {"uniform": (uniform, 0.5), "rare": (rare, 0.02), "often": (often, 0.98), "narrow": (narrow, 0.305)}


@pytest.mark.parametrize("method", MEAN_BOUNDS)
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("num", "confidence"), [(20, 0.95), (200, 0.95), (200, 0.7)])
def test_the_bound_is_above_the_mean_no_more_often_than_promised(
    method: str, kind: str, num: int, confidence: float
) -> None:
    draw, mean = DRAWS[kind]
    generator = torch.Generator().manual_seed(1)
    bounds = [
        MEAN_BOUNDS[method](draw(num, generator), low=0.0, high=1.0, confidence=confidence) for _ in range(REPEATS)
    ]
    assert sum(bound > mean for bound in bounds) <= (1 - confidence) * REPEATS


def test_empirical_bernstein_is_its_formula() -> None:
    values = uniform(50, torch.Generator().manual_seed(0)) * 4 - 1
    mean = sum(values.tolist()) / 50
    variance = sum((value - mean) ** 2 for value in values.tolist()) / 49
    log = math.log(2 / 0.05)
    expected = mean - math.sqrt(2 * variance * log / 50) - 4 * 7 * log / (3 * 49)
    assert empirical_bernstein_bound(values, low=-1.0, high=3.0) == pytest.approx(expected, rel=1e-12)


def capital(values: list[float], mean: float, confidence: float) -> float:
    """The most a gambler ever has who bets against one mean, bet by bet."""
    wealth = most = 1.0
    for time, value in enumerate(values):
        seen = values[:time]
        means = [(0.5 + sum(seen[: i + 1])) / (i + 2) for i in range(time)]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))) / (time + 1)
        stake = math.sqrt(2 * math.log(1 / (1 - confidence)) / (len(values) * variance))
        wealth *= 1 + min(stake, 0.75 / mean) * (value - mean)
        most = max(most, wealth)
    return most


@pytest.mark.parametrize("kind", ["uniform", "narrow"])
def test_the_betting_bound_is_where_a_gambler_wins_just_enough(kind: str) -> None:
    values = DRAWS[kind][0](60, torch.Generator().manual_seed(3))
    bound = betting_bound(values, low=0.0, high=1.0, confidence=0.9)
    assert bound > 0
    assert capital(values.tolist(), bound, 0.9) == pytest.approx(10, rel=1e-6)


def test_the_betting_bound_is_nearly_what_the_variance_alone_would_give() -> None:
    values = narrow(4000, torch.Generator().manual_seed(4))
    wanted = float(values.mean()) - float(values.std()) * math.sqrt(2 * math.log(20) / 4000)
    # An interval a hundred times too wide costs the empirical Bernstein bound much and the betting one little.
    betting, bernstein = (float(MEAN_BOUNDS[name](values, low=0.0, high=1.0)) for name in ("betting", "bernstein"))
    assert wanted - betting < 0.0005
    assert betting - bernstein > 0.001


@pytest.mark.parametrize("method", MEAN_BOUNDS)
def test_a_bound_moves_and_grows_with_the_values(method: str) -> None:
    values = uniform(100, torch.Generator().manual_seed(5))
    bound = MEAN_BOUNDS[method](values, low=0.0, high=1.0)
    assert MEAN_BOUNDS[method](10 * values - 3, low=-3.0, high=7.0) == pytest.approx(10 * bound - 3, abs=1e-9)


@pytest.mark.parametrize("method", MEAN_BOUNDS)
def test_a_bound_is_within_the_interval_and_tends_to_the_values(method: str) -> None:
    assert MEAN_BOUNDS[method](torch.zeros(10), low=0.0, high=1.0) == 0
    assert 0.9 < MEAN_BOUNDS[method](torch.ones(1000), low=0.0, high=1.0) < 1


def test_paired_differences_have_the_difference_of_the_means_and_waste_nothing() -> None:
    first, second = torch.arange(6.0), torch.tensor([10.0, 20.0])
    assert torch.equal(paired_differences(first, second), torch.tensor([1.0 - 10, 4.0 - 20], dtype=torch.float64))
    assert torch.equal(paired_differences(second, first), torch.tensor([10.0 - 1, 20.0 - 4], dtype=torch.float64))
    assert torch.equal(paired_differences(second, second), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", MEAN_BOUNDS)
@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.rand(5), {"confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        (torch.rand(1), {}, r"at least two values, got shape \(1,\)"),
        (torch.rand(5, 1), {}, r"a vector of at least two values, got shape \(5, 1\)"),
        (torch.tensor([0.5, 2.0]), {}, r"within \[0.0, 1.0\], got 0.5 to 2.0"),
        (torch.tensor([0.5, math.nan]), {}, r"within \[0.0, 1.0\]"),
        (torch.rand(5), {"high": 0.0}, r"low below high, got \[0.0, 0.0\]"),
    ],
)
def test_values_that_do_not_fit_are_refused(method: str, values: Tensor, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MEAN_BOUNDS[method](values, **{"low": 0.0, "high": 1.0, **options})
