import torch
from torch import nn
from torch.testing import assert_close

from spectralnorm.gan.ema import GeneratorAverage


def _set(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_half_of_a_weight_is_left_after_the_half_life():
    network = nn.Linear(2, 2).double()
    _set(network, 0.0)
    average = GeneratorAverage(network, half_life_images=640)
    _set(network, 1.0)
    for _ in range(10):
        average.update(batch_size=64, images_seen=10**6)
    assert_close(average.module.weight, torch.full((2, 2), 0.5, dtype=torch.float64))


def test_the_half_life_means_the_same_at_every_batch_size():
    shares = []
    for batch_size in (16, 64):
        network = nn.Linear(1, 1).double()
        _set(network, 0.0)
        average = GeneratorAverage(network, half_life_images=200)
        _set(network, 1.0)
        for _ in range(640 // batch_size):
            average.update(batch_size=batch_size, images_seen=10**6)
        shares.append(average.module.weight.item())
    assert_close(shares[0], shares[1])


def test_the_first_weights_are_soon_forgotten():
    network = nn.Linear(1, 1).double()
    _set(network, 1.0)
    average = GeneratorAverage(network, half_life_images=10_000)
    _set(network, 0.0)
    for step in range(100):
        average.update(batch_size=64, images_seen=64 * (step + 1))
    # With the full half-life, 0.5^(6400 / 10000) = 64 % of the start would be left.
    assert average.module.weight.item() < 1e-3


def test_no_half_life_copies_the_generator():
    network = nn.Linear(3, 3)
    average = GeneratorAverage(network, half_life_images=0)
    _set(network, 0.25)
    average.update(batch_size=4, images_seen=4)
    assert_close(average.module.weight, network.weight.detach())


def test_running_statistics_are_averaged_and_counters_copied():
    network = nn.BatchNorm1d(2)
    average = GeneratorAverage(network, half_life_images=64)
    network(torch.randn(8, 2) + 5)
    average.update(batch_size=64, images_seen=10**6)
    assert_close(average.module.running_mean, network.running_mean / 2)
    assert average.module.num_batches_tracked == 1


def test_the_average_is_in_eval_mode_and_asks_for_no_gradient():
    average = GeneratorAverage(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), half_life_images=1)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
