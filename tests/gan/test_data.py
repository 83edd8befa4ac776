"""The built-in images, the split, the summary and the cache."""

import hashlib
import json
import os
import shutil
import time
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import DataSummary, cache, from_tensors, load_images, prepare
from spectralnorm.gan.data.image_set import digest, split


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(folder))
    return folder / "datasets"


@pytest.fixture(scope="module")
def built_in():
    return load_images(None, image_size=32, channels=1)


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 random pictures of 12 x 10 pixels in two classes."""
    folder = tmp_path / "photos"
    for index, array in enumerate(noise(30, 10, 12)):
        file = folder / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
    return folder


def noise(num, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def tensors(num, seed=0):
    return torch.from_numpy(noise(num, seed=seed)).permute(0, 3, 1, 2).contiguous()


def load(path):
    return load_images(path, image_size=8, channels=3)


@pytest.fixture
def count_decoding(monkeypatch):
    """A list that grows by one for every image file decoded."""
    calls = []
    original = prepare.digest
    monkeypatch.setattr(prepare, "digest", lambda pixels: calls.append(1) or original(pixels))
    return calls


# Built in


def test_the_built_in_set_has_ten_thousand_balanced_images_on_either_side(built_in):
    for images, labels in ((built_in.images, built_in.labels), (built_in.held_out, built_in.held_out_labels)):
        assert images.shape == (10_000, 1, 32, 32)
        assert images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [1_000] * 10
    assert built_in.class_names[1] == "Trouser"
    assert len(built_in.class_names) == 10


def test_the_built_in_atlas_holds_the_pixels_it_was_built_from():
    folder = resources.files("spectralnorm") / "assets" / "fashion_mnist"
    description = json.loads((folder / "atlas.json").read_text())
    for name in ("training", "held_out"):
        with (folder / f"{name}.png").open("rb") as stream:
            atlas = np.asarray(Image.open(stream))
        images = np.stack([tile for row in np.split(atlas, 100) for tile in np.split(row, 100, axis=1)])
        assert hashlib.sha256(images.tobytes()).hexdigest() == description[name]["pixels_sha256"]


def test_built_in_images_are_padded_with_black_and_not_resized(built_in):
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert not built_in.images[..., border].any()
    assert built_in.images[..., 2:30, 2:30].any(dim=0).all()  # every inner pixel is used by some image
    assert built_in.summary.resize == "zero-padded 28 -> 32"


def test_no_built_in_image_is_trained_on_and_held_out(built_in):
    training = {image.numpy().tobytes() for image in built_in.images}
    assert not training & {image.numpy().tobytes() for image in built_in.held_out}


def test_labels_of_the_built_in_set_belong_to_their_images(built_in):
    # Trousers leave the middle of the left edge empty; a bag fills the lower middle.
    means = [built_in.images[built_in.labels == label].float().mean(0)[0] for label in range(10)]
    trouser, bag = built_in.class_names.index("Trouser"), built_in.class_names.index("Bag")
    assert means[trouser][16, 5] < 5 < 50 < means[bag][22, 16]


def test_the_first_part_of_a_set_is_a_fair_sample_of_its_classes(built_in):
    counts = torch.bincount(built_in.held_out_labels[:1_000], minlength=10)
    # Binomial(1000, 0.1) has a standard deviation of 9.5; five of them.
    assert (counts - 100).abs().max() < 48


def test_built_in_images_come_in_other_sizes_and_channels(built_in):
    images = load_images(None, image_size=48, channels=3)
    assert images.images.shape == (10_000, 3, 48, 48)
    assert torch.equal(images.images[:100, 0], images.images[:100, 2])
    assert images.summary.resize == "zero-padded 28 -> 32, then Lanczos-antialiased to 48"
    assert images.fingerprint != built_in.fingerprint


# The split


@given(
    copies=st.lists(st.integers(1, 6), min_size=4, max_size=60),
    order=st.randoms(use_true_random=False),
)
def test_a_split_keeps_every_image_once_and_never_divides_duplicates(copies, order):
    digests = [digest(np.uint8([i])) for i, count in enumerate(copies) for _ in range(count)]
    order.shuffle(digests)
    parts = split(digests)
    assert sorted([*parts.training, *parts.held_out]) == list(range(len(digests)))
    assert not {digests[i] for i in parts.training} & {digests[i] for i in parts.held_out}
    assert parts.num_duplicates == len(digests) - len(copies)
    assert len(parts.held_out) >= 1
    assert len(parts.training) >= 1


@pytest.mark.parametrize(("num", "expected"), [(4, 2), (15, 2), (30, 3), (1_000, 100), (150_000, 10_000)])
def test_a_tenth_is_held_out_within_limits(num, expected):
    assert len(split([digest(np.uint32([i])) for i in range(num)]).held_out) == expected


def test_the_split_depends_on_content_and_not_on_order_or_names(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    for file in sorted((tmp_path / "copy" / "a").iterdir()):
        file.rename(file.with_name(f"renamed {hash(file.name)}.png"))
    first, second = load(photos), load(tmp_path / "copy")
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.held_out, second.held_out)


def test_adding_images_moves_few_between_the_parts():
    digests = [digest(np.uint32([i])) for i in range(1_100)]
    before = {digests[i] for i in split(digests[:1_000]).held_out}
    after = {digests[i] for i in split(digests).held_out}
    assert len(before & after) > 80


def test_a_given_split_is_kept_but_for_images_on_both_sides():
    digests = [digest(np.uint8([i])) for i in (0, 1, 2, 3, 0, 5, 6)]
    parts = split(digests, np.array([False] * 4 + [True] * 3))
    assert sorted(parts.training) == [1, 2, 3]
    assert sorted(parts.held_out) == [4, 5, 6]


def test_a_given_split_that_leaves_too_little_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=noise(12), x_test=noise(1, seed=1))
    with pytest.raises(UserError, match="12 images to train on and 1 others held out"):
        load(tmp_path / "x.npz")


# The summary


def test_the_summary_counts_what_was_found(photos):
    shutil.copy(photos / "a" / "0.png", photos / "a" / "again.png")
    Image.fromarray(noise(1, 20, 20, seed=9)[0]).convert("L").save(photos / "b" / "gray.png")
    (photos / "notes.txt").write_text("hello")
    fields = load(photos).summary.to_json()
    fingerprint = fields.pop("fingerprint")
    assert len(fingerprint) == 64
    assert fields == {
        "name": "photos",
        "source": str(photos),
        "licence": None,
        "num_images": 32,
        "num_training": 29,
        "num_held_out": 3,
        "channels": 3,
        "image_size": 8,
        "original_sizes": {"12x10": 31, "20x20": 1},
        "modes": {"RGB": 31, "L": 1},
        "classes": {"a": 16, "b": 16},
        "num_duplicates": 1,
        "unreadable": (),
        "ignored": {".txt": 1},
        "resize": "centre-cropped, Lanczos-antialiased to 8",
        "streamed": False,
    }


def test_a_summary_survives_json(photos):
    summary = load(photos).summary
    assert DataSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_more_than_ten_sizes_are_summed_up(tmp_path):
    for index in range(14):
        Image.fromarray(noise(1, 10 + index, 10, seed=index)[0]).save(tmp_path / f"{index}.png")
    sizes = load(tmp_path).summary.original_sizes
    assert len(sizes) == 11
    assert sizes["other"] == 4


def test_the_table_shows_ten_classes_and_sums_up_the_others():
    labels = torch.arange(60) % 12
    text = from_tensors(tensors(60), labels, image_size=8, channels=3).summary.render()
    assert "12: 0 (5), 1 (5)" in text
    assert "and 2 others (10)" in text
    assert "60: 54 to train on, 6 held out for metrics" in text


def test_table_says_what_was_looked_for_and_not_found():
    rows = dict(from_tensors(tensors(60), image_size=8, channels=3).summary.rows())
    assert (rows["classes"], rows["duplicates"], rows["unreadable"]) == ("none given", "none", "none")


def test_the_table_lists_unreadable_files_with_their_reasons(photos):
    (photos / "a" / "broken.png").write_bytes(b"")
    assert "1, skipped: a/broken.png (the file is empty)" in load(photos).summary.render()


# The fingerprint


def test_the_fingerprint_changes_with_a_pixel_and_with_a_label():
    images, labels = tensors(20), torch.arange(20) % 2
    other_images, other_labels = images.clone(), labels.clone()
    other_images[0, 0, 0, 0] ^= 1
    other_labels[0] ^= 1
    sets = [(images, labels), (other_images, labels), (images, other_labels), (images, None)]
    prints = {from_tensors(*pair, image_size=8, channels=3).fingerprint for pair in sets}
    assert len(prints) == 4


def test_the_fingerprint_does_not_change_with_the_order():
    images = tensors(20)
    order = torch.randperm(20)
    shuffled = from_tensors(images[order], image_size=8, channels=3)
    assert shuffled.fingerprint == from_tensors(images, image_size=8, channels=3).fingerprint


# The cache


def test_a_second_run_does_not_decode_again(photos, count_decoding):
    first = load(photos)
    assert len(count_decoding) == 30
    second = load(photos)
    assert len(count_decoding) == 30
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.held_out, second.held_out)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.held_out_labels, second.held_out_labels)
    assert first.class_names == second.class_names
    assert first.summary.to_json() == second.summary.to_json() | {"unreadable": ()}


def test_a_changed_folder_is_decoded_again_and_its_old_entry_removed(photos, cache_folder):
    load(photos)
    Image.fromarray(noise(1, seed=9)[0]).save(photos / "a" / "new.png")
    assert load(photos).summary.num_images == 31
    assert len(list(cache_folder.iterdir())) == 1


def test_each_size_has_its_own_entry(photos, cache_folder):
    load(photos)
    assert load_images(photos, image_size=6, channels=1).images.shape[1:] == (1, 6, 6)
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "set.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_again(photos, cache_folder, count_decoding, file, damage):
    first = load(photos)
    (entry,) = cache_folder.iterdir()
    data = (entry / file).read_bytes()
    (entry / file).unlink() if damage == "gone" else (entry / file).write_bytes(data[: len(data) // 2])
    second = load(photos)
    assert torch.equal(first.images, second.images)
    load(photos)
    assert len(count_decoding) == 60


def test_a_cache_that_cannot_be_written_is_not_needed(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "file"))
    assert load(photos).summary.num_images == 30


def test_a_full_disk_leaves_the_images_in_memory(photos, cache_folder, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    assert load(photos).summary.num_images == 30
    assert list(cache_folder.iterdir()) == []


def test_a_failed_load_leaves_nothing_in_the_cache(tmp_path, cache_folder):
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError):
        load(tmp_path)
    assert list(cache_folder.iterdir()) == []


def test_what_a_killed_process_left_a_day_ago_is_removed(photos, cache_folder):
    for name, age_seconds in (("unfinished-old", 2 * 24 * 3600), ("unfinished-now", 0)):
        (cache_folder / name).mkdir(parents=True)
        os.utime(cache_folder / name, (time.time() - age_seconds,) * 2)
    load(photos)
    assert [folder.name for folder in cache_folder.glob("unfinished-*")] == ["unfinished-now"]


def test_a_large_set_is_mapped_from_disk_and_safe_to_write_to(photos, cache_folder, monkeypatch):
    in_memory = load(photos)
    shutil.rmtree(cache_folder)
    monkeypatch.setattr(cache, "MEMORY_MAP_BYTES", 1_000)
    mapped = load(photos)
    (entry,) = cache_folder.iterdir()
    assert sorted(file.name for file in entry.iterdir()) == ["images.npy", "labels.npy", "set.json"]
    assert torch.equal(mapped.images, in_memory.images)
    assert torch.equal(mapped.held_out, in_memory.held_out)
    mapped.images.zero_()
    assert torch.equal(load(photos).images, in_memory.images)


def test_the_cache_lies_where_the_desktop_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRALNORM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "spectralnorm" / "datasets"


def test_progress_is_told_up_to_the_last_image(photos):
    told = []
    load_images(photos, image_size=8, channels=3, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (30, 30)
