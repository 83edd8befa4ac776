"""Sets that are read while training goes on."""

import dataclasses
import gc
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralnorm.errors import UserError
from spectralnorm.gan import make_config, train
from spectralnorm.gan.checkpoint import latest_checkpoint
from spectralnorm.gan.data import Batches, ImageSet, ImageStream, StreamedBatches, load, open_batches, open_images
from spectralnorm.gan.data.stream import epoch_order
from spectralnorm.gan.run_folder import CHECKPOINTS, DATA_FILE

from .shards import SIZE, batches_of, encoded, numbered, numbers, stream_of, take, write_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def stream(tmp_path):
    """100 images in four shards; ten are held out."""
    return stream_of(write_shards(tmp_path / "set", [numbered(number) for number in range(100)]))


# The order


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    buffer=st.integers(1, 90),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_hands_out_each_image_once_and_never_before_it_is_read(sizes, buffer, seed, epoch):
    starts = np.cumsum([0, *sizes])
    reading, handing = epoch_order(starts, buffer=buffer, seed=seed, epoch=epoch)
    assert sorted(reading.tolist()) == sorted(handing.tolist()) == list(range(starts[-1]))
    place_read = np.empty(len(reading), int)
    place_read[reading] = np.arange(len(reading))
    assert (place_read[handing] <= np.arange(len(handing)) + buffer - 1).all()


def test_blocks_are_read_from_their_first_image_to_their_last():
    reading, _ = epoch_order(np.array([0, 3, 7, 12]), buffer=2, seed=0, epoch=0)
    runs = np.split(reading, np.flatnonzero(np.diff(reading) != 1) + 1)
    assert {tuple(run) for run in runs} <= {(0, 1, 2), (3, 4, 5, 6), (7, 8, 9, 10, 11), (0, 1, 2, 3, 4, 5, 6),
                                            (3, 4, 5, 6, 7, 8, 9, 10, 11)}  # fmt: skip


def test_a_buffer_of_all_images_shuffles_them_evenly():
    # Where image 0 of 5 is handed out, over 2,000 epochs: 400 in each place, with a standard deviation of 18.
    places = [epoch_order(np.array([0, 2, 5]), buffer=5, seed=0, epoch=e)[1].tolist().index(0) for e in range(2000)]
    assert np.abs(np.bincount(places, minlength=5) - 400).max() < 5 * 18


# Held out


def test_a_tenth_is_held_out_with_labels_and_the_rest_is_trained_on(stream):
    held_out = numbers(stream.held_out)
    assert len(held_out) == 10
    assert stream.held_out_labels.tolist() == [number % 3 for number in held_out]
    drawn = take(batches_of(stream, batch_size=9), 10)
    assert sorted(drawn + held_out) == list(range(100))
    assert stream.num_training == 90


def test_what_is_held_out_depends_on_names_and_not_on_the_folder(stream, tmp_path):
    other = stream_of(write_shards(tmp_path / "other", [numbered(number) for number in range(100)]))
    assert torch.equal(other.held_out, stream.held_out)
    assert other.fingerprint == stream.fingerprint


def test_another_label_and_another_held_out_pixel_are_another_fingerprint(stream, tmp_path):
    changed = [numbered(number) for number in range(100)]
    changed[numbers(stream.held_out)[0]][0, 0] += 1
    fingerprints = {
        stream.fingerprint,
        stream_of(write_shards(tmp_path / "a", changed)).fingerprint,
        stream_of(write_shards(tmp_path / "b", [numbered(n) for n in range(100)], labels=False)).fingerprint,
    }
    assert len(fingerprints) == 3


def test_an_image_that_equals_a_held_out_one_is_never_trained_on(stream, tmp_path):
    held_out = numbers(stream.held_out)
    training = next(number for number in range(100) if number not in held_out)
    images = [numbered(number) for number in range(100)]
    images[training] = numbered(held_out[0])
    copied = stream_of(write_shards(tmp_path / "copied", images))
    batches = batches_of(copied, batch_size=89)
    assert sorted(take(batches, 1)) == sorted(set(range(100)) - set(held_out) - {training})
    assert batches.unreadable == ()


def test_a_split_of_its_own_is_kept(tmp_path):
    folder = tmp_path / "set"
    for base, part in ((0, "train"), (200, "val")):
        for index in range(30):
            file = folder / part / f"{index % 2}" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(numbered(base + index)))
    stream = stream_of(folder)
    assert sorted(numbers(stream.held_out)) == list(range(200, 230))
    assert sorted(take(batches_of(stream, batch_size=30), 1)) == list(range(30))


def test_held_out_images_are_few_when_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("spectralnorm.gan.data.cache.MEMORY_MAP_BYTES", 5 * 3 * SIZE * SIZE)
    stream = stream_of(write_shards(tmp_path / "set", [numbered(number) for number in range(100)]))
    assert (len(stream.held_out), stream.num_training) == (5, 95)


def test_examples_are_different_training_images_with_their_labels(stream):
    images, labels = stream.examples(40)
    shown = numbers(images)
    assert len(set(shown)) == 40
    assert not set(shown) & set(numbers(stream.held_out))
    assert labels.tolist() == [number % 3 for number in shown]


def test_the_summary_says_that_the_set_is_streamed(stream):
    rows = dict(stream.summary.rows())
    assert rows["images"] == "100: 90 to train on, 10 held out for metrics"
    assert rows["loading"] == "streamed; what is said of pixels is that of the 10 held out"
    assert rows["sizes"] == "4x4 (10)"
    assert stream.summary.classes == {"0": 34, "1": 33, "2": 33}


# Batches


@pytest.mark.parametrize("buffer", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 8, 90])
def test_every_epoch_takes_each_image_once_also_across_batches(stream, buffer, batch_size):
    drawn = take(batches_of(stream, batch_size=batch_size, buffer=buffer), 3 * 90 // batch_size)
    training = sorted(set(range(100)) - set(numbers(stream.held_out)))
    for epoch in range(len(drawn) // 90):
        assert sorted(drawn[90 * epoch : 90 * epoch + 90]) == training


def test_batches_bring_the_labels_of_their_images_when_asked(stream, device):
    batches = StreamedBatches(stream, batch_size=8, seed=0, device=device, with_labels=True)
    for _ in range(15):
        images, labels = next(batches)
        assert images.device.type == labels.device.type == device.type
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert labels.tolist() == [number % 3 for number in numbers(images.cpu())]
    assert next(batches_of(stream)).labels is None


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_number_of_threads(stream):
    first = take(batches_of(stream, batch_size=90, num_threads=1), 2)
    assert take(batches_of(stream, batch_size=90, num_threads=5), 2) == first
    orders = {tuple(first[:90]), tuple(first[90:]), tuple(take(batches_of(stream, batch_size=90, seed=1), 1))}
    assert len(orders) == 3


@pytest.mark.parametrize("buffer", [5, 40, 90])
@pytest.mark.parametrize("num_batches", [0, 1, 6, 11, 12, 25])
def test_a_stream_goes_on_exactly_from_its_state(stream, num_batches, buffer):
    batches = batches_of(stream, buffer=buffer)
    take(batches, num_batches)
    state = batches.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = batches_of(stream, buffer=buffer)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert take(resumed, 20) == take(batches, 20)


def test_going_on_reads_the_buffer_again_and_nothing_from_before(stream, monkeypatch):
    batches = batches_of(stream, buffer=10)
    take(batches, 7)
    state = batches.state_dict()
    read = []
    original = type(stream.source).read
    monkeypatch.setattr(
        type(stream.source),
        "read",
        lambda self, index, **options: read.append(index) or original(self, index, **options),
    )
    resumed = batches_of(stream, buffer=10)
    resumed.load_state_dict(state)
    expected = take(batches, 1)
    read.clear()
    assert take(resumed, 1) == expected
    resumed.close()
    # The buffer, the batch, and what a thread takes at a time.
    assert len(set(read)) <= 10 + 8 + 16


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_images": 91}, {"buffer": 11}])
def test_the_state_of_another_stream_is_refused(stream, change):
    batches = batches_of(stream, buffer=10)
    with pytest.raises(UserError, match="cannot go on with"):
        batches.load_state_dict(batches.state_dict() | change)


@pytest.mark.parametrize("batch_size", [0, 91])
def test_a_batch_larger_than_the_data_or_empty_is_refused(stream, batch_size):
    with pytest.raises(UserError, match="cannot be taken from 90 training images"):
        batches_of(stream, batch_size=batch_size)


def test_memory_is_bounded_by_the_buffer(stream):
    batches = batches_of(stream, buffer=20)
    for _ in range(40):
        next(batches)
        assert len(batches._reader.store) == 20 + 8 + 16
        assert len(batches._reader._free) >= 8
        assert len(batches._reader._orders) <= 2


def test_threads_end_with_the_batches(stream):
    before = threading.active_count()
    batches = batches_of(stream, num_threads=3)
    next(batches)
    assert threading.active_count() == before + 3
    del batches
    gc.collect()
    assert threading.active_count() == before


def test_a_program_may_end_while_threads_are_reading(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, (40, 500, 500, 3), dtype=np.uint8)
    write_shards(tmp_path / "set", list(large))
    program = (
        "from spectralnorm.gan.data import StreamedBatches, open_images\n"
        f"images = open_images({str(tmp_path / 'set')!r}, image_size=64, channels=3, loading='stream')\n"
        "batches = StreamedBatches(images, batch_size=4, seed=0, device='cpu', num_threads=4)\n"
        "for _ in range(3): next(batches)\n"
        "print('ends now')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ends now\n", "")


def test_a_run_on_a_streamed_set_goes_on_to_the_last_bit(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    config = make_config(
        "fashion",
        channels=3,
        data=str(write_shards(tmp_path / "set", list(images))),
        data_loading="stream",
        batch_size=4,
        generator_width=4,
        discriminator_width=4,
        steps=5,
        device="cpu",
    )

    def stop_after_two(trainer):
        trainer.stop_reason = "interrupted" if trainer.step == 2 else trainer.stop_reason

    train(config, out=tmp_path / "whole")
    assert train(config, out=tmp_path / "parts", observers=[stop_after_two]).step == 2
    assert train(config, out=tmp_path / "parts").step == 5
    whole, parts = (latest_checkpoint(tmp_path / name / CHECKPOINTS) for name in ("whole", "parts"))
    assert whole.numbers["batches"] == parts.numbers["batches"]
    assert whole.tensors.keys() == parts.tensors.keys()
    assert [name for name in whole.tensors if not torch.equal(whole.tensors[name], parts.tensors[name])] == []


# What cannot be read


def damaged(stream, how_many):
    """The images of the stream's set with some of those to train on damaged, and their numbers."""
    training = [number for number in range(100) if number not in numbers(stream.held_out)][:how_many]
    return [b"damaged" if number in training else numbered(number) for number in range(100)], training


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_damaged_images_are_skipped_and_named(stream, tmp_path):
    images, broken = damaged(stream, 3)
    batches = batches_of(stream_of(write_shards(tmp_path / "damaged", images)), batch_size=87)
    assert sorted(take(batches, 1)) == sorted(set(range(100)) - set(numbers(stream.held_out)) - set(broken))
    take(batches, 1)
    shards = [f"{number - number % 25:06d}.tar/{number:06d}.png" for number in broken]
    assert sorted(item.file for item in batches.unreadable) == sorted(shards)
    assert {item.reason for item in batches.unreadable} == {"not an image in a format that can be read"}


def test_the_first_damaged_image_is_told_while_training(stream, tmp_path):
    images, _ = damaged(stream, 1)
    batches = batches_of(stream_of(write_shards(tmp_path / "damaged", images)), batch_size=90)
    with pytest.warns(UserWarning, match=r"'000000\.tar/0000\d\d\.png' cannot be read .* and is skipped"):
        take(batches, 3)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_too_many_damaged_images_end_the_run(stream, tmp_path):
    images, _ = damaged(stream, 6)
    batches = batches_of(stream_of(write_shards(tmp_path / "damaged", images)))
    with pytest.raises(UserError, match=r"5 of the first \d+ images of 'damaged' cannot be read, more than 5%"):
        take(batches, 12)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_going_on_after_damaged_images_gives_the_same_batches(stream, tmp_path):
    images, _ = damaged(stream, 4)
    again = stream_of(write_shards(tmp_path / "damaged", images))
    batches, resumed = (batches_of(again, buffer=20) for _ in range(2))
    take(batches, 9)
    resumed.load_state_dict(batches.state_dict())
    assert take(resumed, 15) == take(batches, 15)


def test_too_many_damaged_held_out_images_are_refused_before_training(stream, tmp_path):
    images = [b"damaged" if number in numbers(stream.held_out)[:2] else numbered(number) for number in range(100)]
    with pytest.raises(UserError, match=r"2 of 10 images in .* cannot be read"):
        stream_of(write_shards(tmp_path / "damaged", images))


def test_an_error_in_a_thread_reaches_the_one_who_waits(stream, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(type(stream.source), "read", fail)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        next(batches_of(stream))


# How it is chosen


@pytest.mark.parametrize(("limit", "kind"), [(10**4, ImageSet), (10**3, ImageStream)])
def test_tars_are_streamed_when_they_would_be_large(tmp_path, monkeypatch, limit, kind):
    monkeypatch.setattr(load, "STREAM_BYTES", limit)
    write_shards(tmp_path / "set", [numbered(number) for number in range(100)])
    assert isinstance(open_images(tmp_path / "set", image_size=SIZE, channels=3), kind)
    assert isinstance(open_images(tmp_path / "set", image_size=SIZE, channels=3, loading="prepare"), ImageSet)


@pytest.mark.parametrize(("room", "memory", "kind"), [(0, 0, ImageStream), (1, 0, ImageSet), (0, 1, ImageSet)])
def test_a_folder_is_streamed_only_when_there_is_no_room_for_it(tmp_path, monkeypatch, room, memory, kind):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(encoded(numbered(number)))
    monkeypatch.setattr(load, "STREAM_BYTES", 100)
    monkeypatch.setattr(load.cache, "has_room", lambda num_bytes: bool(room))
    monkeypatch.setattr(load.cache, "free_memory", lambda: memory * 10**6)
    assert isinstance(open_images(tmp_path, image_size=SIZE, channels=3), kind)


def test_what_is_in_the_cache_is_used_though_no_room_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "STREAM_BYTES", 100)
    monkeypatch.setattr(load.cache, "free_memory", lambda: 0)
    write_shards(tmp_path / "tars", [numbered(number) for number in range(100)])
    open_images(tmp_path / "tars", image_size=SIZE, channels=3, loading="prepare")
    (tmp_path / "folder").mkdir()
    for number in range(30):
        (tmp_path / "folder" / f"{number}.png").write_bytes(encoded(numbered(number)))
    open_images(tmp_path / "folder", image_size=SIZE, channels=3)
    monkeypatch.setattr(load.cache, "has_room", lambda num_bytes: False)
    for name in ("tars", "folder"):
        assert isinstance(open_images(tmp_path / name, image_size=SIZE, channels=3), ImageSet)


@pytest.mark.parametrize("streamed", [False, True], ids=["prepared", "streamed"])
def test_a_run_goes_on_with_images_loaded_as_when_it_began(tmp_path, monkeypatch, streamed):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(load, "STREAM_BYTES", 100)
    monkeypatch.setattr(load.cache, "free_memory", lambda: 0)
    config = make_config(
        "fashion",
        channels=3,
        data=str(tmp_path / "noise.npy"),
        batch_size=4,
        generator_width=4,
        discriminator_width=4,
        device="cpu",
    )
    for steps, is_room_left in ((2, not streamed), (4, streamed)):
        monkeypatch.setattr(load.cache, "has_room", lambda num_bytes, is_left=is_room_left: is_left)
        assert train(dataclasses.replace(config, steps=steps), out=tmp_path / "run").step == steps
        assert json.loads((tmp_path / "run" / DATA_FILE).read_text())["streamed"] == streamed


def test_one_call_opens_batches_of_either_kind(stream):
    prepared = open_images(None, image_size=32, channels=1)
    batches = open_batches(prepared, batch_size=4, seed=0, device="cpu", with_labels=True)
    assert isinstance(batches, Batches)
    assert next(batches).labels.shape == (4,)
    streamed = open_batches(stream, batch_size=4, seed=0, device="cpu", with_labels=True)
    assert isinstance(streamed, StreamedBatches)
    assert next(streamed).labels.shape == (4,)


def test_an_unknown_way_of_loading_is_refused():
    with pytest.raises(UserError, match="Unknown data loading 'lazy'; choose one of auto, prepare, stream"):
        open_images(None, image_size=32, channels=1, loading="lazy")


def test_labels_of_a_stream_can_be_asked_for(stream, tmp_path):
    stream.require_labels()
    without = stream_of(write_shards(tmp_path / "without", [numbered(n) for n in range(100)], labels=False))
    with pytest.raises(UserError, match="90 of the 90 training images of 'without' have none"):
        without.require_labels()


@pytest.mark.gpu
def test_next_never_waits_for_the_gpu(stream, without_waiting):
    batches = StreamedBatches(stream, batch_size=8, seed=0, device="cuda", with_labels=True)
    next(batches)
    with without_waiting():
        for _ in range(20):
            next(batches)
