"""Intervals by drawing again, against draws with new data and against sums written out."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import bootstrap, frechet_bootstrap, frechet_distance, kernel_bootstrap


def draw(num: int, *, shift: float = 0.0, seed: int) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(seed)) + shift


def kernel_sum_by_hand(x: Tensor, y: Tensor, *, same: bool) -> tuple[float, int]:
    """Over rows of what was drawn; a pair of draws of one image is left out if ``same``."""
    total, pairs = 0.0, 0
    for i in range(len(x)):
        for j in range(len(y)):
            if same and torch.equal(x[i], y[j]):
                continue
            total += float((x[i] @ y[j] / x.shape[1] + 1) ** 3)
            pairs += 1
    return total, pairs


def squared_discrepancy_by_hand(x: Tensor, y: Tensor) -> float:
    (xx, num_xx), (yy, num_yy) = kernel_sum_by_hand(x, x, same=True), kernel_sum_by_hand(y, y, same=True)
    xy, num_xy = kernel_sum_by_hand(x, y, same=False)
    return xx / num_xx + yy / num_yy - 2 * xy / num_xy


def test_the_frechet_error_is_the_spread_over_new_data() -> None:
    pairs = [(draw(300, seed=2 * i), draw(300, shift=0.5, seed=2 * i + 1)) for i in range(160)]
    values = [frechet_distance(*pair) for pair in pairs]
    found = [frechet_bootstrap(*pair, num_draws=30, seed=i) for i, pair in enumerate(pairs[:20])]
    error = statistics.fmean(part.standard_error for part in found)
    # The spread of 160 values is known to 6 %, the mean of 20 errors to 3.
    assert error == pytest.approx(statistics.stdev(values), rel=0.15)


def test_the_frechet_bias_is_what_the_distance_of_equal_distributions_has_over_new_data() -> None:
    pairs = [(draw(300, seed=2 * i), draw(300, seed=2 * i + 1)) for i in range(60)]
    bias = statistics.fmean(frechet_bootstrap(*p, num_draws=30, seed=i).bias for i, p in enumerate(pairs[:20]))
    # The distance itself is zero. Its mean over 60 pairs is known to 4 %, that of 20 biases to 2.
    assert bias == pytest.approx(statistics.fmean(frechet_distance(*pair) for pair in pairs), rel=0.15)


def test_many_images_are_drawn_by_groups_with_the_same_error_and_bias() -> None:
    real, fake = draw(1500, seed=1), draw(1500, shift=0.5, seed=2)
    by_groups = frechet_bootstrap(real, fake, num_draws=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_GROUP_BYTES", 0)
        by_images = frechet_bootstrap(real, fake, num_draws=200)
    assert by_groups != by_images
    # Of 200 draws an error is known to 5 %, and by 100 groups to 7 %.
    assert by_groups.standard_error == pytest.approx(by_images.standard_error, rel=0.3)
    assert by_groups.bias == pytest.approx(by_images.bias, abs=0.3 * by_images.standard_error)


def test_fewer_images_than_features_have_the_same_draws_as_in_their_span() -> None:
    real, fake = draw(8, seed=1), draw(7, shift=0.5, seed=2)
    wide = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q[:6]
    found = frechet_bootstrap(real @ wide + 3, fake @ wide + 3, num_draws=20)
    expected = frechet_bootstrap(real, fake, num_draws=20)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-3)
    assert found.bias == pytest.approx(expected.bias, rel=1e-3)


def test_intervals_of_the_frechet_distance_hold_its_mean_over_new_data() -> None:
    pairs = [(draw(200, seed=2 * i), draw(200, shift=0.3, seed=2 * i + 1)) for i in range(40)]
    values = [frechet_distance(*pair) for pair in pairs]
    intervals = [
        frechet_bootstrap(*p, num_draws=25, seed=i).interval(v)
        for i, (p, v) in enumerate(zip(pairs, values, strict=True))
    ]
    held = sum(low <= statistics.fmean(values) <= high for low, high in intervals)
    # 95 % of 40 are 38; fewer than 33 happen once in a thousand times.
    assert held >= 33
    # Not by being too wide to fail.
    assert statistics.fmean(high - low for low, high in intervals) < 6 * statistics.stdev(values)


def test_the_kernel_draws_are_the_discrepancy_without_pairs_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_BLOCK_ROWS", 5)
    real, fake = draw(12, seed=1).double(), draw(9, shift=0.4, seed=2).double()
    found = kernel_bootstrap(real, fake, num_draws=4, seed=7)
    generator = torch.Generator().manual_seed(7)
    drawn = [[torch.randint(n, (n,), generator=generator) for _ in range(4)] for n in (12, 9)]
    values = [squared_discrepancy_by_hand(real[a], fake[b]) for a, b in zip(*drawn, strict=True)]
    assert found.standard_error == pytest.approx(statistics.stdev(values))
    assert found.bias == pytest.approx(statistics.fmean(values) - squared_discrepancy_by_hand(real, fake))


@pytest.mark.parametrize("num", [3, 4])
def test_few_images_have_a_kernel_error_too(num: int) -> None:
    found = kernel_bootstrap(draw(num, seed=1), draw(20, seed=2))
    assert found.standard_error > 0
    assert math.isfinite(found.standard_error)
    assert math.isfinite(found.bias)
    assert found.num_draws == 100


def test_the_kernel_error_is_the_spread_over_new_data() -> None:
    def discrepancy(index: int) -> float:
        x, y = draw(200, seed=2 * index).double(), draw(200, shift=0.5, seed=2 * index + 1).double()
        a, b, c = ((p @ q.T / 6 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        return float(((a.sum() - a.trace()) + (b.sum() - b.trace())) / (200 * 199) - 2 * c.mean())

    spread = statistics.stdev(map(discrepancy, range(60)))
    errors = [
        kernel_bootstrap(draw(200, seed=2 * i), draw(200, shift=0.5, seed=2 * i + 1)).standard_error for i in range(6)
    ]
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.35)


def test_an_interval_is_the_normal_one() -> None:
    found = bootstrap.Bootstrap(standard_error=2.0, bias=5.0, num_draws=10)
    assert found.interval(1.0) == (pytest.approx(1 - 2 * 1.959964), pytest.approx(1 + 2 * 1.959964))


def test_two_images_have_one_pair_and_no_kernel_error() -> None:
    for pair in ((draw(2, seed=1), draw(20, seed=2)), (draw(20, seed=1), draw(2, seed=2))):
        with pytest.raises(UserError, match="at least 3 images on each side"):
            kernel_bootstrap(*pair)


@pytest.mark.parametrize("function", [frechet_bootstrap, kernel_bootstrap])
def test_draws_are_the_seeds_and_leave_global_random_numbers_alone(function) -> None:
    real, fake = draw(30, seed=1), draw(30, seed=2)
    before = torch.get_rng_state()
    assert function(real, fake, num_draws=3, seed=1) == function(real, fake, num_draws=3, seed=1)
    assert function(real, fake, num_draws=3, seed=1) != function(real, fake, num_draws=3, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("function", [frechet_bootstrap, kernel_bootstrap])
def test_one_draw_is_refused(function) -> None:
    with pytest.raises(UserError, match="num_draws must be at least 2, got 1"):
        function(draw(30, seed=1), draw(30, seed=2), num_draws=1)
