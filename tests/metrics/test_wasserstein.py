"""The certified lower bound of the Wasserstein-1 distance, where the distance is known from elsewhere."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.metrics import (
    MEAN_BOUNDS,
    CriticOptions,
    StrictCritic,
    WassersteinBound,
    clipping_interval,
    critic_lower_bound,
    train_critic,
    wasserstein_lower_bound,
)

REPEATS = 200
QUICK = CriticOptions(width=16, num_hidden=2, num_steps=30, batch_size=128)


def first_coordinate(x: Tensor) -> Tensor:
    return x[:, 0]


def shifted(num: int, dimension: int, shift: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussians a vector of length ``shift`` apart, along all axes alike: W1 is that length."""
    real = torch.randn(num, dimension, generator=generator)
    return real, torch.randn(num, dimension, generator=generator) - shift / math.sqrt(dimension)


def earth_movers(real: Tensor, fake: Tensor) -> float:
    """W1 of two finite sets with equal weights within each, as a linear programme over transport plans."""
    costs = torch.cdist(real.double(), fake.double()).numpy()
    num, other = costs.shape
    leaving = np.kron(np.eye(num), np.ones(other))
    arriving = np.kron(np.ones(num), np.eye(other))
    amounts = np.concatenate([np.full(num, 1 / num), np.full(other, 1 / other)])
    found = scipy.optimize.linprog(costs.ravel(), A_eq=np.vstack([leaving, arriving]), b_eq=amounts)
    return float(found.fun)


@pytest.mark.parametrize("method", MEAN_BOUNDS)
@pytest.mark.parametrize(("num_real", "num_fake"), [(400, 400), (300, 1000)])
def test_with_the_best_critic_the_bound_is_below_the_distance_as_often_as_promised(
    method: str, num_real: int, num_fake: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    bounds = []
    for _ in range(REPEATS):
        # The coordinate itself is the best critic of a shift along it.
        real = torch.randn(num_real, 1, generator=generator) + 1
        fake = torch.randn(num_fake, 1, generator=generator)
        found = critic_lower_bound(first_coordinate, real, fake, lipschitz=1.0, interval=(-3, 4), method=method)
        bounds.append(found.lower_confidence_bound)
    assert sum(bound > 1 for bound in bounds) <= 0.05 * REPEATS
    # 2.45 standard errors of about 0.07 for betting; for Bernstein 2.7, and 0.3 to 0.4 for the interval's length.
    assert sum(bounds) / REPEATS > {"betting": 0.7, "bernstein": 0.3}[method]


def test_between_finite_sets_the_bound_is_below_the_distance_of_linear_programming() -> None:
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.rand(15, 2, generator=generator) + 0.5, torch.rand(12, 2, generator=generator)
    truth = earth_movers(real, fake)
    direction = (real.mean(0) - fake.mean(0))[:, None]
    direction /= direction.norm()

    def critic(x: Tensor) -> Tensor:
        return x @ direction

    above = 0
    for seed in range(REPEATS):
        drawn = [
            part[torch.randint(len(part), (150,), generator=torch.Generator().manual_seed(2 * seed + place))]
            for place, part in enumerate((real, fake))
        ]
        found = critic_lower_bound(critic, *drawn, lipschitz=1 + 1e-6, interval=(-1, 3))
        above += found.lower_confidence_bound > truth
    assert above <= 0.05 * REPEATS


def test_a_critic_of_constant_two_gives_the_bound_of_its_half() -> None:
    real, fake = shifted(500, 3, 2.0, torch.Generator().manual_seed(2))

    def doubled(x: Tensor) -> Tensor:
        return 2 * first_coordinate(x)

    one = critic_lower_bound(first_coordinate, real, fake, lipschitz=1.0, interval=(-3, 3))
    two = critic_lower_bound(doubled, real, fake, lipschitz=2.0, interval=(-6, 6))
    assert two.estimate == pytest.approx(one.estimate, rel=1e-9)
    assert two.lower_confidence_bound == pytest.approx(one.lower_confidence_bound, rel=1e-9)


def test_a_bound_tells_what_it_rests_on() -> None:
    real, fake = torch.rand(30, 2) + 1, torch.rand(20, 2)
    found = critic_lower_bound(first_coordinate, real, fake, lipschitz=1.5, interval=(0, 2), confidence=0.9)
    expected = float(real[:, 0].mean() - fake[:, 0].mean()) / 1.5
    assert found.estimate == pytest.approx(expected, rel=1e-6)
    assert found == WassersteinBound(
        estimate=found.estimate,
        lower_confidence_bound=found.lower_confidence_bound,
        confidence=0.9,
        range=(0, 2),
        num_samples=(30, 20),
        lipschitz=1.5,
    )


def test_the_bound_is_never_below_zero_and_clipping_can_only_weaken() -> None:
    real, fake = torch.rand(100, 1) + 1, torch.rand(100, 1)
    assert critic_lower_bound(first_coordinate, fake, real, lipschitz=1.0, interval=(0, 2)).lower_confidence_bound == 0
    narrow = critic_lower_bound(first_coordinate, real, fake, lipschitz=1.0, interval=(0.9, 1.1))
    assert 0.1 < narrow.lower_confidence_bound < 0.2 < narrow.estimate


def test_rounding_of_the_critic_is_taken_off_twice() -> None:
    real, fake = torch.rand(200, 1) + 1, torch.rand(200, 1)
    exact, rounded = (
        critic_lower_bound(first_coordinate, real, fake, lipschitz=2.0, interval=(0, 2), rounding_error=error)
        for error in (0.0, 0.05)
    )
    assert exact.lower_confidence_bound - rounded.lower_confidence_bound == pytest.approx(0.05, abs=1e-9)


def test_the_order_of_samples_does_no_harm() -> None:
    real, fake = shifted(400, 1, 1.0, torch.Generator().manual_seed(3))
    sorted_real, sorted_fake = real.sort(0).values, fake.sort(0, descending=True).values
    found = critic_lower_bound(first_coordinate, sorted_real, sorted_fake, lipschitz=1.0, interval=(-3, 3))
    assert 0.7 < found.lower_confidence_bound < 1


def test_the_interval_leaves_out_what_costs_more_than_it_brings() -> None:
    # One value in 500 is a thousand times as large.
    real, fake = torch.rand(1000, 1) + 1, torch.rand(1000, 1)
    low, high = clipping_interval(first_coordinate, real, fake)
    assert float(fake.min()) <= low < 0.05
    assert 1.95 < high <= float(real.max())
    real[::500] = 1000.0
    fake[::500] = -1000.0
    low, high = clipping_interval(first_coordinate, real, fake)
    assert -1 < low < high < 3


def test_the_interval_of_a_constant_critic_has_a_length() -> None:
    low, high = clipping_interval(lambda x: torch.zeros(len(x)), torch.rand(10, 1), torch.rand(10, 1))
    assert low < 0 < high


@pytest.mark.parametrize("num_features", [2, 40])
def test_a_trained_critic_stretches_no_distance_by_more_than_its_certified_constant(num_features: int) -> None:
    real, fake = shifted(200, num_features, 2.0, torch.Generator().manual_seed(4))
    critic = train_critic(real, fake.square(), options=QUICK)
    constant = critic.lipschitz_bound()
    points = torch.cat([real, fake]).double().requires_grad_()
    gradients = torch.autograd.grad(critic(points).sum(), points)[0]
    assert float(gradients.norm(dim=1).max()) <= constant * (1 + 1e-12)
    assert constant <= 1 + 1e-6


def test_the_certified_constant_is_that_of_the_stored_weights_not_one() -> None:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 5), (1, 8))]
    biases = [torch.zeros(8), torch.zeros(1)]
    critic = StrictCritic(weights=weights, biases=biases, center=torch.zeros(5), scale=4.0)
    norms = [float(torch.linalg.matrix_norm(weight, 2)) for weight in weights]
    assert critic.lipschitz_bound() == pytest.approx(math.prod(norms), rel=1e-8)
    assert critic.lipschitz_bound() >= math.prod(norms)


def test_a_critics_rounding_is_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(6)
    real, fake = shifted(100, 6, 2.0, generator)
    critic = train_critic(real * 1000 + 1e4, fake * 1000 + 1e4, options=QUICK)
    x = real * 1000 + 1e4
    # In numpy's longer floating-point numbers, layer by layer.
    hidden = (x.numpy().astype(np.longdouble) - critic.center.numpy().astype(np.longdouble)) / critic.scale
    for layer in critic.network:
        if isinstance(layer, nn.Linear):
            weight, bias = (part.numpy().astype(np.longdouble) for part in (layer.weight, layer.bias))
            hidden = hidden @ weight.T + bias
        else:
            pairs = np.sort(hidden.reshape(len(hidden), -1, 2), axis=2)[:, :, ::-1]
            hidden = pairs.reshape(len(hidden), -1)
    exact = hidden[:, 0] * critic.scale
    worst = float(np.abs(critic(x).numpy().astype(np.longdouble) - exact).max())
    bound = critic.rounding_error_bound(x)
    assert worst <= bound < 1e-7


@pytest.mark.parametrize("dimension", [2, 8, 64])
def test_between_shifted_gaussians_the_estimate_is_within_five_percent(dimension: int) -> None:
    real, fake = shifted(8000, dimension, 2.0, torch.Generator().manual_seed(7))
    found = wasserstein_lower_bound(real, fake, options=QUICK)
    assert found.estimate == pytest.approx(2, rel=0.05)
    assert 1.7 < found.lower_confidence_bound <= 2


def test_of_values_on_a_line_the_bound_is_below_scipys_distance() -> None:
    generator = torch.Generator().manual_seed(8)
    real = torch.randn(3000, 1, generator=generator).exp()
    fake = 3 * torch.rand(3000, 1, generator=generator)
    found = wasserstein_lower_bound(real, fake, options=CriticOptions(width=16, num_steps=150))
    # Of the samples, not of the distributions, but with thirty times as many: off by about 0.01.
    many = torch.randn(100_000, generator=generator).exp().numpy(), 3 * torch.rand(100_000, generator=generator).numpy()
    truth = scipy.stats.wasserstein_distance(*many)
    assert found.lower_confidence_bound < truth
    assert found.lower_confidence_bound > 0.5 * truth


def test_spheres_of_one_center_need_a_critic_that_is_not_linear() -> None:
    points = torch.randn(4000, 4, generator=torch.Generator().manual_seed(9))
    points /= points.norm(dim=1, keepdim=True)
    # The distance of two radii is 1, and the means agree.
    found = wasserstein_lower_bound(points[:2000], 2 * points[2000:], options=CriticOptions(width=32, num_steps=150))
    assert 0.7 < found.lower_confidence_bound <= 1


def test_between_equal_distributions_nothing_is_claimed_more_often_than_promised() -> None:
    generator = torch.Generator().manual_seed(10)
    options = CriticOptions(width=4, num_hidden=1, num_steps=3, batch_size=32)
    claimed = 0
    for seed in range(40):
        real, fake = torch.rand(60, 2, generator=generator), torch.rand(60, 2, generator=generator)
        claimed += wasserstein_lower_bound(real, fake, options=options, seed=seed).lower_confidence_bound > 0
    assert claimed <= 0.05 * 40


def test_the_same_seed_gives_the_same_bound_and_the_global_random_numbers_are_left_alone() -> None:
    real, fake = shifted(100, 3, 1.0, torch.Generator().manual_seed(11))
    before = torch.get_rng_state()
    assert wasserstein_lower_bound(real, fake, options=QUICK) == wasserstein_lower_bound(real, fake, options=QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_taken_as_vectors(device: torch.device) -> None:
    images = torch.rand(60, 1, 4, 4, device=device)
    found = wasserstein_lower_bound(images, images.flip(0) / 2, options=QUICK)
    flat = wasserstein_lower_bound(images.flatten(1), images.flip(0).flatten(1) / 2, options=QUICK)
    assert found.estimate == pytest.approx(flat.estimate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lipschitz": 0.0}, "positive, finite constant of the critic, got 0.0"),
        ({"lipschitz": math.inf}, "positive, finite constant of the critic, got inf"),
        ({"interval": (1.0, 1.0)}, r"low below high, got \[1.0, 1.0\]"),
        ({"method": "normal"}, "Unknown method 'normal'; choose one of betting, bernstein"),
        ({"confidence": 0.0}, "confidence must be between 0 and 1, got 0.0"),
        ({"rounding_error": -1.0}, "must not be negative, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        critic_lower_bound(
            first_coordinate, torch.rand(9, 1), torch.rand(9, 1), **{"lipschitz": 1.0, "interval": (0, 1), **options}
        )


def test_critics_that_give_no_number_are_refused() -> None:
    samples = torch.rand(9, 2)
    with pytest.raises(UserError, match=r"one value a sample, \(n,\) or \(n, 1\), got \(9, 2\) for 9 samples"):
        critic_lower_bound(lambda x: x, samples, samples, lipschitz=1.0, interval=(0, 1))
    with pytest.raises(UserError, match="must be finite"):
        critic_lower_bound(lambda x: x[:, 0] / 0, samples, samples, lipschitz=1.0, interval=(0, 1))


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"of one shape, got \(30, 2\) and \(30, 3\)"):
        train_critic(torch.rand(30, 2), torch.rand(30, 3))
    with pytest.raises(UserError, match="at least ten samples on each side, got 30 and 9"):
        train_critic(torch.rand(30, 2), torch.rand(9, 2))
    with pytest.raises(UserError, match="must be finite"):
        train_critic(torch.rand(30, 2), torch.full((30, 2), math.nan))
    with pytest.raises(UserError, match=r"held_out_share must be between 0 and 1, got 1.0"):
        wasserstein_lower_bound(torch.rand(30, 2), torch.rand(30, 2), held_out_share=1.0)
    with pytest.raises(UserError, match="even number of at least 2, got 3"):
        CriticOptions(width=3)
