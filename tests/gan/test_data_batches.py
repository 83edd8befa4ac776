"""The endless stream of shuffled batches."""

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.gan.data import Batches
from spectralnorm.gan.data import batches as batches_module


def numbered(num):
    """Images that show their own number: uint8 (num, 1, 2, 2)."""
    return torch.arange(num, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def numbers(batch):
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def take(stream, num_batches):
    return [number for _ in range(num_batches) for number in numbers(next(stream))]


def test_pixels_are_scaled_to_exactly_minus_one_to_one(device):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    batch = next(Batches(images, batch_size=1, seed=0, device=device)).images
    assert batch.dtype == torch.float32
    assert batch.device.type == device.type
    assert (batch.min().item(), batch.max().item()) == (-1.0, 1.0)
    expected = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(1, 1, 16, 16)
    # A GPU multiplies by the rounded reciprocal: one rounding more than a division.
    torch.testing.assert_close(batch.cpu().double(), expected, atol=2 * torch.finfo(torch.float32).eps, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_epoch_takes_each_image_once_also_across_batches(device, batch_size):
    drawn = take(Batches(numbered(10), batch_size=batch_size, seed=0, device=device), 3 * 10)
    for epoch in range(len(drawn) // 10):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_batches_are_always_full(device):
    stream = Batches(numbered(10), batch_size=7, seed=0, device=device)
    assert [len(next(stream).images) for _ in range(9)] == [7] * 9


def test_labels_stay_with_their_images(device):
    stream = Batches(numbered(10), torch.arange(10) * 3, batch_size=7, seed=0, device=device)
    for _ in range(5):
        batch = next(stream)
        assert batch.labels.device.type == device.type
        assert batch.labels.tolist() == [3 * number for number in numbers(batch)]


def test_without_labels_there_are_none(device):
    assert next(Batches(numbered(10), batch_size=7, seed=0, device=device)).labels is None


def test_epochs_and_seeds_differ():
    by_seed = [take(Batches(numbered(100), batch_size=100, seed=seed, device="cpu"), 2) for seed in (0, 1)]
    orders = [tuple(order[i : i + 100]) for order in by_seed for i in (0, 100)]
    assert len(set(orders)) == 4


def test_the_same_seed_gives_the_same_order():
    first, second = (Batches(numbered(50), batch_size=8, seed=5, device="cpu") for _ in range(2))
    assert take(first, 20) == take(second, 20)


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(Batches(numbered(50), batch_size=8, seed=5, device="cpu"), 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert take(Batches(numbered(50), batch_size=8, seed=5, device="cpu"), 8) == first


@pytest.mark.parametrize("num_batches", [0, 1, 6, 7, 25])
def test_a_stream_goes_on_exactly_from_its_state(device, num_batches):
    stream = Batches(numbered(50), batch_size=8, seed=5, device=device)
    take(stream, num_batches)
    state = stream.state_dict()
    resumed = Batches(numbered(50), batch_size=8, seed=5, device=device)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert all(type(value) is int for value in state.values())
    assert take(resumed, 20) == take(stream, 20)


def test_a_resumed_stream_may_have_another_batch_size():
    stream = Batches(numbered(50), batch_size=8, seed=5, device="cpu")
    take(stream, 5)
    resumed = Batches(numbered(50), batch_size=4, seed=5, device="cpu")
    resumed.load_state_dict(stream.state_dict())
    assert take(resumed, 10) == take(stream, 5)


@pytest.mark.parametrize(("num", "seed"), [(49, 5), (50, 6)])
def test_the_state_of_other_data_or_another_seed_is_refused(num, seed):
    state = Batches(numbered(50), batch_size=8, seed=5, device="cpu").state_dict()
    with pytest.raises(UserError, match="cannot go on with"):
        Batches(numbered(num), batch_size=8, seed=seed, device="cpu").load_state_dict(state)


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_a_batch_larger_than_the_data_or_empty_is_refused(batch_size):
    with pytest.raises(UserError, match="cannot be taken from 10 training images; choose a batch size from 1 to 10"):
        Batches(numbered(10), batch_size=batch_size, seed=0, device="cpu")


def test_changing_a_batch_does_not_change_the_data(device):
    stream = Batches(numbered(10), batch_size=10, seed=0, device=device)
    next(stream).images.zero_()
    assert sorted(take(stream, 1)) == list(range(10))


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("given", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", ["cuda", "cuda:0"])
def test_the_order_on_a_gpu_is_that_on_the_cpu_wherever_the_images_lie(monkeypatch, share, given, wanted):
    monkeypatch.setattr(batches_module, "_DEVICE_SHARE", share)
    on_gpu = Batches(numbered(50).to(given), batch_size=8, seed=5, device=wanted)
    assert take(on_gpu, 20) == take(Batches(numbered(50), batch_size=8, seed=5, device="cpu"), 20)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_next_never_waits_for_the_gpu(monkeypatch, share, without_waiting):
    monkeypatch.setattr(batches_module, "_DEVICE_SHARE", share)
    stream = Batches(numbered(50), torch.arange(50), batch_size=8, seed=5, device="cuda")
    next(stream)
    with without_waiting():
        for _ in range(20):
            next(stream)
