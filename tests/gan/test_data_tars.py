"""Tars of images: plain ones, and the shards of a WebDataset."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import cache, load_images, tar_listing
from spectralnorm.gan.data.tars import TarSource, expand_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(num, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)


def encoded(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file, entries):
    with tarfile.open(file, "w:gz" if file.name.endswith("gz") else "w") as archive:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def sample(number, array, label=None):
    """The files of one WebDataset sample."""
    files = {f"{number:06d}.png": encoded(array)}
    return files if label is None else files | {f"{number:06d}.cls": str(label).encode()}


def write_shards(folder, num_shards=3, per_shard=10, pattern="shard-{:06d}.tar"):
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for shard in range(num_shards):
        entries = {}
        for number, array in enumerate(noise(per_shard, seed=shard)):
            entries |= sample(number, array, number % 3)
            expected[np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()] = str(number % 3)
        write_tar(folder / pattern.format(shard), entries)
    return expected


def load(path):
    return load_images(path, image_size=8, channels=3)


def label_by_pixels(data):
    parts = ((data.images, data.labels), (data.held_out, data.held_out_labels))
    return {
        image.numpy().tobytes(): data.class_names[label] if label >= 0 else None
        for images, labels in parts
        for image, label in zip(images, labels.tolist(), strict=True)
    }


@pytest.mark.parametrize("path", ["", "shard-{000000..000002}.tar"])
def test_shards_come_with_the_labels_of_their_samples(tmp_path, path):
    expected = write_shards(tmp_path / "set")
    data = load(tmp_path / "set" / path)
    assert label_by_pixels(data) == expected
    assert data.class_names == ("0", "1", "2")
    assert data.summary.ignored == {}


def test_a_single_compressed_tar_gives_what_the_plain_one_gives(tmp_path):
    entries = {}
    for number, array in enumerate(noise(20)):
        entries |= sample(number, array, number % 2)
    write_tar(tmp_path / "a.tar", entries)
    write_tar(tmp_path / "b.tar.gz", entries)
    plain, compressed = load(tmp_path / "a.tar"), load(tmp_path / "b.tar.gz")
    assert plain.fingerprint == compressed.fingerprint
    assert [entry for entry in cache.cache_folder().iterdir() if not entry.is_dir()] == []


def test_the_webdataset_library_writes_what_is_read_here(tmp_path):
    library = pytest.importorskip("webdataset", reason="needs the package webdataset")
    expected = {}
    with library.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=7, verbose=0) as writer:
        for number, array in enumerate(noise(20)):
            writer.write({"__key__": f"a/{number:03d}", "png": Image.fromarray(array), "cls": number % 4})
            expected[np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()] = str(number % 4)
    assert label_by_pixels(load(tmp_path)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"label": 3}, "3"),
        ({"class": "dog", "caption": "a dog"}, "dog"),
        ({"caption": "a dog"}, None),
        ({"label": [0.1, 0.9]}, None),
        (7, "7"),
    ],
    ids=str,
)
def test_a_class_may_stand_in_the_json_of_a_sample(tmp_path, content, expected):
    entries = {"seen.png": encoded(noise(1, seed=9)[0]), "seen.json": json.dumps(content).encode()}
    for number, array in enumerate(noise(20)):
        entries |= sample(number, array, "other")
    write_tar(tmp_path / "a.tar", entries)
    pixels = np.ascontiguousarray(noise(1, seed=9)[0].transpose(2, 0, 1)).tobytes()
    assert label_by_pixels(load(tmp_path / "a.tar"))[pixels] == expected


def test_only_the_first_image_of_a_sample_is_taken(tmp_path):
    entries = {}
    for number, (image, mask) in enumerate(zip(noise(20), noise(20, seed=1), strict=True)):
        entries |= {f"{number}.image.png": encoded(image), f"{number}.mask.png": encoded(mask), f"{number}.cls": b"1"}
    write_tar(tmp_path / "a.tar", entries)
    data = load(tmp_path / "a.tar")
    assert set(label_by_pixels(data)) == {np.ascontiguousarray(a.transpose(2, 0, 1)).tobytes() for a in noise(20)}
    assert data.summary.ignored == {"further images of a sample": 20}


def test_folders_in_a_plain_tar_name_the_classes_and_the_split(tmp_path):
    entries = {}
    for seed, folder in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        entries |= {f"./set/{folder}/photo.{i}.png": encoded(a) for i, a in enumerate(noise(3, seed=seed))}
    write_tar(tmp_path / "set.tar", entries | {"./set/README.md": b"hello", "./set/._x.png": b"litter"})
    data = load(tmp_path / "set.tar")
    assert data.class_names == ("cat", "dog")
    assert (len(data.images), len(data.held_out)) == (6, 6)
    assert data.summary.ignored == {".md": 1}


def test_shards_called_train_and_val_are_the_split(tmp_path):
    training = write_shards(tmp_path, 2, pattern="imagenet-train-{:06d}.tar")
    write_tar(tmp_path / "imagenet-validation-000000.tar", {f"{i}.png": encoded(a) for i, a in enumerate(noise(5, 9))})
    data = load(tmp_path)
    assert {image.numpy().tobytes() for image in data.images} == set(training)
    assert data.held_out_labels.tolist() == [-1] * 5


def test_broken_images_in_a_tar_are_skipped_and_named(tmp_path):
    entries = {f"{i:02d}.png": encoded(a) for i, a in enumerate(noise(40))}
    write_tar(tmp_path / "a.tar", entries | {"x/broken.png": b"no image", "empty.png": b""})
    unreadable = {item.file: item.reason for item in load(tmp_path / "a.tar").summary.unreadable}
    assert unreadable == {
        "a.tar/x/broken.png": "not an image in a format that can be read",
        "a.tar/empty.png": "the file is empty",
    }


def test_links_and_paths_that_lead_outside_are_never_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(noise(1, seed=5)[0]))
    entries = {f"{i}.png": encoded(a) for i, a in enumerate(noise(10))}
    write_tar(tmp_path / "a.tar", entries)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    assert load(tmp_path / "a.tar").summary.num_images == 10


@pytest.mark.parametrize("keep", [0.3, 0.8])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_that_is_cut_is_refused(tmp_path, name, keep):
    write_tar(tmp_path / name, {f"{i}.png": encoded(a) for i, a in enumerate(noise(20))})
    content = (tmp_path / name).read_bytes()
    end = content.rstrip(b"\0") if name == "a.tar" else content
    (tmp_path / name).write_bytes(end[: int(keep * len(end))])
    with pytest.raises(UserError, match=r"the tar '.*' cannot be read .*download or copy it again"):
        load(tmp_path / name)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"something else entirely" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "a.tar")


def test_a_tar_of_tars_says_to_unpack_them(tmp_path):
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", {f"n0{i}.tar": b"x" * 512 for i in range(3)})
    with pytest.raises(UserError, match=r"holds no images \(3 \.tar\); unpack it, and then each tar in it"):
        load(tmp_path / "ILSVRC2012_img_train.tar")


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(UserError, match=r"2 of the 5 shards .* are missing, the first is '.*shard-000003\.tar'"):
        load(tmp_path / "shard-{000000..000004}.tar")


def test_shards_that_run_backwards_are_refused(tmp_path):
    with pytest.raises(UserError, match="run from 000002 to 000000"):
        load(tmp_path / "shard-{000002..000000}.tar")


def test_braces_may_stand_twice(tmp_path):
    for a in "01":
        for b in ("08", "09", "10"):
            (tmp_path / f"{a}-{b}.tar").touch()
    names = [file.name for file in expand_shards(str(tmp_path / "{0..1}-{08..10}.tar"))]
    assert names == ["0-08.tar", "0-09.tar", "0-10.tar", "1-08.tar", "1-09.tar", "1-10.tar"]


def test_a_tar_is_listed_and_its_images_are_left_where_they_lie(tmp_path):
    write_shards(tmp_path, 1)
    source = TarSource([tmp_path / "shard-000000.tar"], what="it")
    first = source.read(0, image_size=8, channels=3).pixels
    assert source.file_name(4) == "shard-000000.tar/000004.png"
    assert torch.equal(torch.from_numpy(first), torch.from_numpy(noise(1)[0].transpose(2, 0, 1).copy()))


def arrays_of(source):
    return [source.hashes.tolist(), source.labels.tolist(), source.class_names, source.ignored, source.groups.tolist()]


def test_a_tar_is_listed_once_and_again_when_it_changed(tmp_path, monkeypatch):
    write_shards(tmp_path, 1)
    shard = tmp_path / "shard-000000.tar"
    listed = []
    original = tar_listing.list_tar
    monkeypatch.setattr(tar_listing, "list_tar", lambda *arguments: listed.append(1) or original(*arguments))
    first, second = (TarSource([shard], what="it") for _ in range(2))
    assert len(listed) == 1
    assert arrays_of(first) == arrays_of(second)
    assert (second.read(3, image_size=8, channels=3).pixels == first.read(3, image_size=8, channels=3).pixels).all()
    write_tar(shard, {f"{i}.png": encoded(a) for i, a in enumerate(noise(4))})
    assert len(TarSource([shard], what="it")) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "no place"])
def test_a_listing_that_cannot_be_read_or_kept_is_made_again(tmp_path, damage):
    write_shards(tmp_path, 1)
    first = TarSource([tmp_path / "shard-000000.tar"], what="it")
    folder = cache.cache_folder().parent / "tars"
    (kept,) = folder.iterdir()
    if damage == "no place":
        kept.unlink()
        folder.rmdir()
        folder.write_text("in the way")
    else:
        kept.write_bytes({"cut": kept.read_bytes()[:200], "empty": b"", "other": b"not a zip" * 50}[damage])
    assert arrays_of(TarSource([tmp_path / "shard-000000.tar"], what="it")) == arrays_of(first)
