"""Decoded images of a streamed set that are kept on disk."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.gan import make_config
from spectralnorm.gan.data import StreamedBatches, open_images, stream_cache
from spectralnorm.gan.data.stream_cache import StreamCache
from spectralnorm.gan.inputs import open_data

from .shards import SIZE, batches_of, numbered, numbers, stream_of, take, write_shards

PIXELS = 3 * SIZE * SIZE
RECORD = PIXELS + 16


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    """Where images are kept; it has room, whatever this machine's disk has."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(cache))
    monkeypatch.setattr(stream_cache, "_SPARED_BYTES", 0)
    return cache / "streams"


@pytest.fixture
def shards(tmp_path):
    """100 images in four tars, of which ten are held out."""
    return write_shards(tmp_path / "set", [numbered(number) for number in range(100)])


def decoded(stream, monkeypatch):
    """A list to which the positions of images are added when they are decoded."""
    positions = []
    original = type(stream.source).read

    def read(self, index, **options):
        positions.append(index)
        return original(self, index, **options)

    monkeypatch.setattr(type(stream.source), "read", read)
    return positions


def images_of(batches, num_batches):
    return torch.cat([next(batches).images for _ in range(num_batches)])


def uncached(path, num_batches, **options):
    """What a stream hands out that keeps nothing."""
    return images_of(batches_of(stream_of(path, cache_bytes=0), **options), num_batches)


def fill(stream):
    """Keep every image of the set."""
    batches = batches_of(stream, batch_size=stream.num_training)
    next(batches)
    batches.close()
    return stream


def the_file(folder):
    (path,) = folder.glob("*.images")
    return path


# What is handed out


@pytest.mark.parametrize("buffer", [5, 40, 90])
def test_batches_equal_those_without_a_cache_in_the_first_epoch_and_later(shards, buffer):
    expected = uncached(shards, 36, buffer=buffer)
    assert torch.equal(images_of(batches_of(stream_of(shards), buffer=buffer), 36), expected)
    assert torch.equal(images_of(batches_of(stream_of(shards), buffer=buffer), 36), expected)


@pytest.mark.parametrize("num_batches", [0, 6, 11, 25])
def test_going_on_in_the_middle_of_an_epoch_gives_the_batches_of_an_uncached_stream(shards, num_batches):
    uncached = batches_of(stream_of(shards, cache_bytes=0), buffer=20)
    images_of(uncached, num_batches + 1)
    cached = batches_of(stream_of(shards), buffer=20)
    images_of(cached, num_batches + 1)
    resumed = batches_of(stream_of(shards), buffer=20)
    resumed.load_state_dict(cached.state_dict())
    assert cached.state_dict() == uncached.state_dict()
    assert torch.equal(images_of(resumed, 20), images_of(uncached, 20))


def test_labels_stay_with_their_images(shards):
    batches = StreamedBatches(fill(stream_of(shards)), batch_size=9, seed=0, device="cpu", with_labels=True)
    for _ in range(20):
        images, labels = next(batches)
        assert labels.tolist() == [number % 3 for number in numbers(images)]


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_an_image_that_cannot_be_read_and_a_copy_are_skipped_in_every_epoch(shards, tmp_path):
    held_out = numbers(stream_of(shards).held_out)
    copy, broken = [number for number in range(100) if number not in held_out][:2]
    images = [numbered(number) for number in range(100)]
    images[copy], images[broken] = numbered(held_out[0]), b"damaged"
    changed = write_shards(tmp_path / "changed", images)
    cached, uncached = (batches_of(stream_of(changed, **options)) for options in ({}, {"cache_bytes": 0}))
    drawn = take(cached, 33)
    assert not {copy, broken, held_out[0]} & set(drawn)
    assert drawn == take(uncached, 33)
    assert cached.unreadable == uncached.unreadable != ()


# What is decoded


def test_only_the_first_epoch_decodes(shards, monkeypatch):
    stream = stream_of(shards)
    positions = decoded(stream, monkeypatch)
    batches = batches_of(stream, batch_size=90, buffer=10)
    take(batches, 4)
    batches.close()
    # The next epoch is read ahead from the end of the first on, before all of it is kept.
    assert sorted(set(positions)) == sorted(stream.positions.tolist())
    assert len(positions) < 2 * 90
    positions.clear()
    take(batches, 3)
    assert positions == []


def test_a_second_run_decodes_only_what_the_first_did_not_reach(shards, monkeypatch):
    stream = stream_of(shards)
    positions = decoded(stream, monkeypatch)
    batches = batches_of(stream, buffer=10)
    take(batches, 5)
    batches.close()
    first = set(positions)
    again = stream_of(shards)
    positions.clear()
    take(batches_of(again, batch_size=90), 1)
    assert set(positions) == set(stream.positions.tolist()) - first


def test_several_processes_keep_one_entry_between_them(shards, monkeypatch, folder):
    first, second = stream_of(shards), stream_of(shards)
    positions = decoded(first, monkeypatch)
    one, other = (batches_of(stream, batch_size=45, seed=3, buffer=10) for stream in (first, second))
    drawn = [take(batches, 1) for _ in range(4) for batches in (one, other)]
    assert drawn[0::2] == drawn[1::2]
    one.close()
    other.close()
    positions.clear()
    assert sorted(take(batches_of(second, batch_size=90), 1)) == sorted(drawn[0] + drawn[2])
    assert positions == []
    assert the_file(folder).stat().st_size == 90 * RECORD


def test_images_that_lie_decoded_are_not_kept_again(tmp_path, folder):
    np.save(tmp_path / "x.npy", np.stack([numbered(number) for number in range(100)]))
    stream = stream_of(tmp_path / "x.npy")
    assert stream.kept == "they lie where they are, decoded already"
    assert not folder.exists()


# What is never handed out


@pytest.mark.parametrize("change", ["torn", "hole", "flipped", "shorter"])
def test_a_record_that_is_not_whole_is_decoded_again_and_mended(shards, monkeypatch, folder, change):
    expected = uncached(shards, 22)
    fill(stream_of(shards))
    whole = the_file(folder).read_bytes()
    broken = bytearray(whole)
    middle = 40 * RECORD
    if change == "torn":
        broken[middle + 20 : middle + RECORD] = bytes(RECORD - 20)
    elif change == "hole":
        broken[middle : middle + RECORD] = bytes(RECORD)
    elif change == "flipped":
        broken[middle + 5] ^= 1
    else:
        del broken[middle + 20 :]
    the_file(folder).write_bytes(broken)
    stream = stream_of(shards)
    positions = decoded(stream, monkeypatch)
    batches = batches_of(stream)
    assert torch.equal(images_of(batches, 22), expected)
    batches.close()
    assert set(positions) == set(stream.positions[40:41] if change != "shorter" else stream.positions[40:])
    assert the_file(folder).read_bytes() == whole


def test_a_file_that_becomes_shorter_while_it_is_read_is_decoded_again(shards, folder):
    expected = uncached(shards, 44, buffer=10)
    batches = batches_of(fill(stream_of(shards)), buffer=10)
    first = images_of(batches, 22)
    os.truncate(the_file(folder), 100)
    assert torch.equal(torch.cat([first, images_of(batches, 22)]), expected)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_wrong(tmp_path, folder):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(300)]
    path = write_shards(tmp_path / "set", images, labels=False)
    program = (
        "from spectralnorm.gan.data import StreamedBatches, open_images, stream_cache\n"
        "stream_cache._SPARED_BYTES = 0\n"
        f"images = open_images({str(path)!r}, image_size=32, channels=3, loading='stream')\n"
        "batches = StreamedBatches(images, batch_size=4, seed=0, device='cpu', num_threads=2)\n"
        "for number in range(10**6):\n"
        "    next(batches)\n"
        "    print(number, flush=True)\n"
    )
    for num_batches in (1, 12):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(num_batches):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    assert the_file(folder).stat().st_size > 0
    cached, uncached = (
        batches_of(open_images(path, image_size=32, channels=3, loading="stream", **options))
        for options in ({}, {"cache_bytes": 0})
    )
    assert torch.equal(images_of(cached, 80), images_of(uncached, 80))


def test_a_changed_set_is_never_served_from_the_entry_of_the_old_one(shards, folder):
    fill(stream_of(shards))
    before = the_file(folder)
    # Of the same names and sizes, since all of these files are as long.
    write_shards(shards, [numbered(number + 256) for number in range(100)])
    stream = stream_of(shards)
    assert set(take(batches_of(stream, batch_size=90), 2)) <= set(range(256, 356))
    assert the_file(folder) != before


def test_a_decoder_that_gives_other_pixels_begins_an_entry_of_its_own(shards, monkeypatch):
    stream = fill(stream_of(shards))
    original = type(stream.source).read

    def brighter(self, index, **options):
        image = original(self, index, **options)
        return image._replace(pixels=image.pixels + np.array([0, 1, 0], np.uint8)[:, None, None])

    monkeypatch.setattr(type(stream.source), "read", brighter)
    assert set(take(batches_of(stream_of(shards), batch_size=90), 1)) <= set(range(256, 356))


def test_another_size_has_an_entry_of_its_own(shards, folder):
    fill(stream_of(shards))
    larger = open_images(shards, image_size=8, channels=3, loading="stream")
    assert next(batches_of(larger)).images.shape == (8, 3, 8, 8)
    assert len(list(folder.glob("*.images"))) == 2


# How much is kept


def test_of_a_set_that_is_larger_than_the_limit_the_first_images_are_kept(shards, monkeypatch, folder):
    expected = uncached(shards, 22)
    stream = fill(stream_of(shards, cache_bytes=30 * RECORD + 5))
    assert stream.kept.max_bytes == the_file(folder).stat().st_size == 30 * RECORD
    positions = decoded(stream, monkeypatch)
    batches = batches_of(stream)
    assert torch.equal(images_of(batches, 22), expected)
    batches.close()
    assert set(positions) == set(stream.positions[30:])


def test_a_smaller_limit_shortens_what_was_kept(shards, folder):
    fill(stream_of(shards))
    fill(stream_of(shards, cache_bytes=30 * RECORD))
    assert the_file(folder).stat().st_size == 30 * RECORD


def test_a_limit_of_nothing_leaves_no_file(shards, folder):
    stream = fill(stream_of(shards, cache_bytes=0))
    assert stream.kept == "the limit is 0"
    assert not folder.exists()


def test_a_negative_limit_is_refused(shards):
    with pytest.raises(UserError, match="cache_bytes must be at least 0, got -1"):
        stream_of(shards, cache_bytes=-1)


def test_the_set_opened_longest_ago_gives_way(tmp_path, folder):
    paths = [write_shards(tmp_path / name, [numbered(number) for number in range(100)]) for name in "abc"]
    entries = [fill(stream_of(path)).kept.path for path in paths[:2]]
    for age, entry in zip((100, 200), entries, strict=True):
        os.utime(entry, (entry.stat().st_mtime - age,) * 2)
    # Blocks of the disk are taken whole, so two more entries would not fit.
    limit = 90 * RECORD + entries[0].stat().st_blocks * 512
    third = fill(stream_of(paths[2], cache_bytes=limit)).kept.path
    assert set(folder.glob("*.images")) == {entries[0], third}


def test_at_most_half_of_the_free_disk_is_taken(shards, monkeypatch):
    usage = type("Usage", (), {"free": 2 * 10 * RECORD})
    monkeypatch.setattr(stream_cache.shutil, "disk_usage", lambda folder: usage)
    assert stream_of(shards).kept.max_bytes == 10 * RECORD


# Where it cannot be kept


def full_disk(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_once_and_changes_no_batch(shards, monkeypatch):
    expected = uncached(shards, 30, buffer=10)
    stream = stream_of(shards)
    monkeypatch.setattr(os, "pwrite", full_disk)
    batches = batches_of(stream, buffer=10)
    with pytest.warns(UserWarning, match="no more decoded images of 'set' are kept in .*No space left") as told:
        assert torch.equal(images_of(batches, 30), expected)
    assert len(told) == 1


def test_a_disk_that_takes_a_part_of_an_image_serves_no_half_of_it(shards, monkeypatch):
    expected = uncached(shards, 30, buffer=10)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: whole(file, data[: len(data) // 2], place))
    batches = batches_of(stream_of(shards), buffer=10)
    with pytest.warns(UserWarning, match="No space left"):
        assert torch.equal(images_of(batches, 30), expected)
    monkeypatch.undo()
    assert torch.equal(images_of(batches_of(stream_of(shards, cache_bytes=10**6), buffer=10), 30), expected)


def test_a_real_full_disk_is_survived(tiny_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tiny_disk))
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    path = write_shards(tmp_path / "large", list(images), labels=False)
    cached = open_images(path, image_size=32, channels=3, loading="stream")
    (tiny_disk / "something else").write_bytes(bytes(400 * 1024))
    batches = batches_of(cached, batch_size=90)
    with pytest.warns(UserWarning, match="No space left"):
        drawn = images_of(batches, 3)
    uncached = open_images(path, image_size=32, channels=3, loading="stream", cache_bytes=0)
    assert torch.equal(drawn, images_of(batches_of(uncached, batch_size=90), 3))


def test_what_the_disk_spares_for_other_things_is_left_to_them(shards, monkeypatch):
    monkeypatch.setattr(stream_cache, "_SPARED_BYTES", 2**60)
    with pytest.warns(UserWarning, match="GB of its disk are free"):
        fill(stream_of(shards))


def test_a_folder_that_cannot_be_written_to_is_done_without(shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "file"))
    stream = stream_of(shards)
    assert stream.kept == f"{str(tmp_path / 'file' / 'streams')!r} cannot be written to: Not a directory"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(set(take(batches_of(stream, batch_size=90), 1))) == 90


def test_a_cache_that_is_deleted_while_it_is_used_is_no_harm(shards, folder):
    expected = uncached(shards, 40, buffer=10)
    batches = batches_of(stream_of(shards), buffer=10)
    first = images_of(batches, 15)
    the_file(folder).unlink()
    folder.rmdir()
    assert torch.equal(torch.cat([first, images_of(batches, 25)]), expected)


# Reading


def test_runs_of_neighbours_are_read_in_the_order_asked_for(tmp_path):
    cache = StreamCache(Path(tmp_path / "x"), num_images=8, shape=(1, 2, 2), num_bytes=10**6)
    for index in (1, 2, 3, 5, 7):
        pixels = np.full((1, 2, 2), index, np.uint8)
        cache.write(index, stream_cache.Kept(pixels, stream_cache.digest(pixels)))
    found = cache.read([5, 1, 2, 3, 4, 0, 7])
    assert [None if image is None else int(image.pixels[0, 0, 0]) for image in found] == [5, 1, 2, 3, None, None, 7]


def test_the_setting_is_a_limit_in_gigabytes(shards):
    config = make_config("fashion", channels=3, data=str(shards), data_loading="stream", stream_cache_gb=0.0)
    assert open_data(config, loading="stream").kept == "the limit is 0"
    record = 3 * config.image_size**2 + 16
    kept = open_data(replace(config, stream_cache_gb=20_000 / 1e9), loading="stream").kept
    assert kept.max_bytes == 20_000 // record * record
    with pytest.raises(UserError, match="stream_cache_gb must be a number at least 0"):
        replace(config, stream_cache_gb=-1.0)


def test_neighbours_that_were_compared_before_are_had_at_once(tmp_path):
    cache = StreamCache(tmp_path / "x", num_images=8, shape=(1, 2, 2), num_bytes=10**6)
    for index in (1, 2, 3, 5):
        pixels = np.full((1, 2, 2), index, np.uint8)
        cache.write(index, stream_cache.Kept(pixels, stream_cache.digest(pixels)))
    found = cache.read_at_once([1, 2, 3])
    if found is None:
        pytest.skip("this file system does not tell what lies in memory")
    assert found[0][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert found[1] == [stream_cache.digest(pixels) for pixels in found[0]]
    assert [cache.read_at_once(indices) for indices in ([3, 4, 5], [1, 3], [2, 1], [0, 1])] == [None] * 4
    again = StreamCache(tmp_path / "x", num_images=8, shape=(1, 2, 2), num_bytes=10**6)
    assert again.read_at_once([1, 2, 3]) is None
    again.read([1, 2, 3])
    assert again.read_at_once([1, 2, 3]) is not None
    os.truncate(tmp_path / "x", 20)
    assert again.read_at_once([1, 2, 3]) is None
