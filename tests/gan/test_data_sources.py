"""Folders, ZIPs, IDX, npy and npz: what is found in them, and what is said when it is not."""

import gzip
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import from_tensors, load_images
from spectralnorm.gan.data.idx import read_idx


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(num, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, channels), dtype=np.uint8)


def encoded(array, format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


def write_images(folder: Path, num, *, seed=0, pattern="{:03d}.png"):
    for index, array in enumerate(noise(num, seed=seed)):
        file = folder / pattern.format(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(array))


def write_idx(file: Path, array):
    code = {"uint8": 0x08, "int32": 0x0C, "float32": 0x0D}[array.dtype.name]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_zip(file: Path, entries: dict[str, bytes | str]):
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def load(path, image_size=8, channels=3):
    return load_images(path, image_size=image_size, channels=channels)


def pixels_of(image_set):
    """Every prepared image, held out or not, as a set of bytes."""
    return {image.numpy().tobytes() for part in (image_set.images, image_set.held_out) for image in part}


def label_by_pixels(image_set):
    parts = ((image_set.images, image_set.labels), (image_set.held_out, image_set.held_out_labels))
    return {
        image.numpy().tobytes(): image_set.class_names[label] if label >= 0 else None
        for images, labels in parts
        for image, label in zip(images, labels.tolist(), strict=True)
    }


def channels_first(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()


# Folders


def test_a_folder_is_searched_through_all_its_subfolders(tmp_path):
    write_images(tmp_path, 3)
    write_images(tmp_path / "a" / "b", 3, seed=1)
    assert load(tmp_path).summary.num_images == 6


def test_images_of_the_right_size_come_through_unchanged(tmp_path):
    write_images(tmp_path, 6)
    assert pixels_of(load(tmp_path)) == {channels_first(array) for array in noise(6)}


def test_subfolders_name_the_classes(tmp_path):
    write_images(tmp_path / "Dog", 3)
    write_images(tmp_path / "cat" / "indoor", 3, seed=1)
    images = load(tmp_path)
    expected = {channels_first(a): "Dog" for a in noise(3)} | {channels_first(a): "cat" for a in noise(3, seed=1)}
    assert label_by_pixels(images) == expected
    assert images.summary.classes == {"Dog": 3, "cat": 3}


def test_a_folder_that_wraps_all_others_is_seen_through(tmp_path):
    write_images(tmp_path / "all" / "cat", 3)
    write_images(tmp_path / "all" / "dog", 3, seed=1)
    assert load(tmp_path).class_names == ("cat", "dog")


def test_one_subfolder_alone_is_no_class(tmp_path):
    write_images(tmp_path / "photos", 5)
    images = load(tmp_path)
    assert images.labels is None
    assert images.class_names == ()


def test_images_beside_subfolders_leave_the_set_without_classes(tmp_path):
    write_images(tmp_path, 2)
    write_images(tmp_path / "cat", 2, seed=1)
    write_images(tmp_path / "dog", 2, seed=2)
    assert load(tmp_path).labels is None


def test_train_and_test_folders_are_the_split(tmp_path):
    for seed, folder in enumerate(("Train/cat", "Train/dog", "val/cat", "val/dog")):
        write_images(tmp_path / folder, 3, seed=seed)
    images = load(tmp_path)
    held_out = {channels_first(array) for seed in (2, 3) for array in noise(3, seed=seed)}
    assert {image.numpy().tobytes() for image in images.held_out} == held_out
    assert images.class_names == ("cat", "dog")
    assert len(images.images) == 6


def test_litter_and_hidden_files_are_passed_over_and_other_files_counted(tmp_path):
    write_images(tmp_path, 5)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", "__MACOSX/001.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"litter")
    (tmp_path / "notes.TXT").write_text("hello")
    (tmp_path / "README").write_text("hello")
    summary = load(tmp_path).summary
    assert summary.num_images == 5
    assert summary.unreadable == ()
    assert summary.ignored == {".txt": 1, "no extension": 1}


def test_names_may_have_capitals_other_scripts_and_line_breaks(tmp_path):
    for name, array in zip(("A.PNG", "Ünïcode 猫.png", "two\nlines.png", "b.Png"), noise(4), strict=True):
        (tmp_path / name).write_bytes(encoded(array))
    assert load(tmp_path).summary.num_images == 4


def test_names_that_are_not_unicode_can_be_written_to_json(tmp_path):
    folder = tmp_path / os.fsdecode(b"odd \xff")
    try:
        write_images(folder / os.fsdecode(b"cat \xfe"), 20)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    write_images(folder / "dog\n", 20, seed=1)
    (folder / "dog\n" / os.fsdecode(b"\xfd.png")).write_bytes(b"")
    images = load(folder)
    json.dumps(images.summary.to_json(), ensure_ascii=False).encode("utf-8")
    assert images.name == "odd \\udcff"
    assert images.class_names == ("cat \\udcfe", "dog\\n")
    assert load(folder).summary == images.summary


def test_the_common_formats_are_read(tmp_path):
    arrays = iter(noise(9, 16, 16))
    for format, extension in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm"),
                              ("GIF", "gif"), ("TGA", "tga")):  # fmt: skip
        (tmp_path / f"image.{extension}").write_bytes(encoded(next(arrays), format))
    summary = load(tmp_path).summary
    assert (summary.num_images, summary.unreadable) == (7, ())


def test_links_to_folders_are_followed_without_going_round_in_circles(tmp_path):
    write_images(tmp_path / "real", 5)
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(data)
    assert load(data).summary.num_images == 5


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing at the data path .*give a folder of images"):
        load(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is empty; give one that holds images"):
        load(tmp_path)


def test_a_folder_of_text_files_is_refused_with_what_it_holds(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("hello")
    with pytest.raises(UserError, match=r"holds no images, only other files \(3 \.txt\)"):
        load(tmp_path)


def test_a_folder_around_one_archive_says_to_give_the_archive(tmp_path):
    write_zip(tmp_path / "images.zip", {})
    with pytest.raises(UserError, match="give the path of the file"):
        load(tmp_path)


def test_one_image_in_a_folder_is_refused(tmp_path):
    write_images(tmp_path, 1)
    with pytest.raises(UserError, match="holds only one image"):
        load(tmp_path)


def test_copies_of_one_image_are_refused(tmp_path):
    for index in range(9):
        (tmp_path / f"{index}.png").write_bytes(encoded(noise(1)[0]))
    with pytest.raises(UserError, match="9 images, 1 of them different"):
        load(tmp_path)


def test_the_path_of_a_single_image_is_refused(tmp_path):
    write_images(tmp_path, 1)
    with pytest.raises(UserError, match="is a single image"):
        load(tmp_path / "000.png")


def test_a_truncated_png_alone_is_refused_with_the_reason(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(noise(1, 64, 64)[0])[:500])
    with pytest.raises(UserError, match=r"none of the 1 images .*'cut\.png': .*truncated"):
        load(tmp_path)


def test_few_unreadable_files_are_skipped_and_listed(tmp_path):
    write_images(tmp_path, 39)
    (tmp_path / "broken.png").write_bytes(b"not a PNG")
    images = load(tmp_path)
    assert images.summary.num_images == 39
    assert [item.file for item in images.summary.unreadable] == ["broken.png"]
    assert "not an image" in images.summary.unreadable[0].reason


def test_more_than_one_in_twenty_unreadable_is_refused(tmp_path):
    write_images(tmp_path, 37)
    for index in range(2):
        (tmp_path / f"broken{index}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"2 of 39 images .* cannot be read, more than 5% \('broken0\.png': the file is"
    ):
        load(tmp_path)


def test_a_dangling_link_is_unreadable_and_does_not_stop_the_rest(tmp_path):
    write_images(tmp_path, 39)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [item.file for item in load(tmp_path).summary.unreadable] == ["gone.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def test_a_message_stays_on_one_line_whatever_the_files_are_called(tmp_path):
    (tmp_path / "two\nlines.png").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


# ZIPs


def test_a_zip_gives_the_same_images_and_fingerprint_as_the_folder(tmp_path):
    write_images(tmp_path / "folder" / "a", 6)
    write_images(tmp_path / "folder" / "b", 6, seed=1)
    files = sorted((tmp_path / "folder").rglob("*.png"))
    write_zip(tmp_path / "images.zip", {str(f.relative_to(tmp_path)): f.read_bytes() for f in files})
    from_folder, from_zip = load(tmp_path / "folder"), load(tmp_path / "images.zip")
    assert from_folder.fingerprint == from_zip.fingerprint
    assert torch.equal(from_folder.images, from_zip.images)


@pytest.mark.parametrize("base", ["", "wrapper/"])
def test_dataset_json_gives_the_labels_in_a_zip(tmp_path, base):
    arrays = noise(6)
    classes = [7, 3, None, 3, 12, 7]
    names = [f"00000/{index}.png" for index in range(6)]
    entries = {base + name: encoded(array) for name, array in zip(names, arrays, strict=True)}
    entries[base + "dataset.json"] = json.dumps({"labels": list(zip(names, classes, strict=True))})
    write_zip(tmp_path / "images.zip", entries)
    images = load(tmp_path / "images.zip")
    assert images.class_names == ("3", "7", "12")
    expected = [None if value is None else str(value) for value in classes]
    assert label_by_pixels(images) == dict(zip(map(channels_first, arrays), expected, strict=True))
    assert images.summary.classes == {"3": 2, "7": 2, "12": 1, "(no class)": 1}


def test_dataset_json_without_labels_means_none_even_with_subfolders(tmp_path):
    entries = {f"{index % 2:05d}/{index}.png": encoded(array) for index, array in enumerate(noise(6))}
    write_zip(tmp_path / "images.zip", entries | {"dataset.json": '{"labels": null}'})
    assert load(tmp_path / "images.zip").labels is None


def test_dataset_json_works_in_a_folder_too(tmp_path):
    write_images(tmp_path, 6)
    labels = [[f"{index:03d}.png", "odd" if index % 2 else "even"] for index in range(6)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert load(tmp_path).summary.classes == {"even": 3, "odd": 3}


def test_labels_that_do_not_match_the_files_are_refused(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{index:03d}.png", 0] for index in range(1, 8)]}))
    with pytest.raises(
        UserError, match=r"1 images without a label \(such as '000.png'\) and 2 labels without an image"
    ):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"labels": 3}', '{"labels": [1, 2]}', "\xff"])
def test_a_dataset_json_of_another_form_is_refused(tmp_path, text):
    write_images(tmp_path, 6)
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot be read as labels; expected \{"):
        load(tmp_path)


def test_a_class_that_is_a_list_is_refused(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{i:03d}.png", [0.0, 1.0]] for i in range(4)]}))
    with pytest.raises(UserError, match="expected a whole number, a name or null"):
        load(tmp_path)


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK no more")
    with pytest.raises(UserError, match="is not a ZIP that can be read"):
        load(tmp_path / "images.zip")


def test_a_damaged_entry_of_a_zip_is_unreadable(tmp_path):
    write_zip(tmp_path / "images.zip", {f"{i:02d}.png": encoded(a) for i, a in enumerate(noise(40))})
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(data)
    unreadable = load(tmp_path / "images.zip").summary.unreadable
    assert [item.file for item in unreadable] == ["00.png"]
    assert "CRC" in unreadable[0].reason


def test_an_entry_that_would_unpack_to_gigabytes_is_never_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("spectralnorm.gan.data.files._LARGEST_ZIP_ENTRY", 10_000)
    entries = {f"{i:02d}.png": encoded(a) for i, a in enumerate(noise(40))}
    write_zip(tmp_path / "images.zip", entries | {"bomb.png": bytes(20_000)})
    unreadable = load(tmp_path / "images.zip").summary.unreadable
    assert [(item.file, "unpacks to more" in item.reason) for item in unreadable] == [("bomb.png", True)]


# IDX


@settings(max_examples=40, deadline=None)
@given(
    array=st.sampled_from([np.uint8, np.int32, np.float32]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    ),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_reading_an_idx_file_gives_back_what_was_written(tmp_path_factory, array, suffix):
    file = tmp_path_factory.mktemp("idx") / f"values{suffix}"
    write_idx(file, array)
    np.testing.assert_array_equal(read_idx(file), array)


def write_digits(folder, prefix, num, seed, suffix=".gz"):
    images = noise(num, 28, 28, 1, seed)[..., 0]
    labels = (np.arange(num) % 10).astype(np.uint8)
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


@pytest.mark.parametrize("path", ["", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("test_name", ["t10k", "test"])
def test_an_idx_set_brings_its_labels_and_its_test_images(tmp_path, path, test_name):
    images, labels = write_digits(tmp_path, "train", 30, seed=0)
    test_images, _ = write_digits(tmp_path, test_name, 20, seed=1, suffix="")
    data = load(tmp_path / path, image_size=32, channels=1)
    assert (len(data.images), len(data.held_out)) == (30, 20)
    padded = [np.pad(image, 2).tobytes() for image in images]
    expected = dict(zip(padded, map(str, labels), strict=True))
    found = label_by_pixels(data)
    assert {pixels: found[pixels] for pixels in padded} == expected
    held_out = {image.numpy().tobytes() for image in data.held_out}
    assert held_out == {np.pad(image, 2).tobytes() for image in test_images}
    assert data.summary.resize == "zero-padded 28 -> 32"


def test_idx_images_without_labels_are_split_like_any_others(tmp_path):
    write_idx(tmp_path / "images-idx3-ubyte", noise(30, 10, 10, 1)[..., 0])
    data = load(tmp_path / "images-idx3-ubyte", image_size=10, channels=1)
    assert (len(data.images), len(data.held_out), data.labels) == (27, 3, None)


def test_idx_labels_of_another_number_are_refused(tmp_path):
    write_digits(tmp_path, "train", 30, seed=0)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(29, np.uint8))
    with pytest.raises(UserError, match="30 images and 29 labels do not match"):
        load(tmp_path)


def test_idx_labels_given_as_images_are_refused(tmp_path):
    write_digits(tmp_path, "train", 30, seed=0)
    with pytest.raises(UserError, match="give the file of the images"):
        load(tmp_path / "train-labels-idx1-ubyte.gz")


@pytest.mark.parametrize("cut", [3, 10, 500, -1])
def test_an_idx_file_that_is_cut_is_refused(tmp_path, cut):
    file = tmp_path / "train-images-idx3-ubyte"
    write_idx(file, noise(5, 28, 28, 1)[..., 0])
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="IDX"):
        load(file)


def test_a_cut_gzip_is_refused(tmp_path):
    write_digits(tmp_path, "train", 30, seed=0)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read .*download or copy it again"):
        load(tmp_path)


# npy, npz, tensors


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_both_layouts_of_colour_arrays_are_understood(tmp_path, layout):
    arrays = noise(12)
    np.save(tmp_path / "x.npy", arrays if layout == "NHWC" else arrays.transpose(0, 3, 1, 2))
    assert pixels_of(load(tmp_path / "x.npy")) == {channels_first(array) for array in arrays}


def test_gray_arrays_need_no_channel_axis(tmp_path):
    arrays = noise(12, channels=1)
    np.save(tmp_path / "x.npy", arrays[..., 0])
    assert pixels_of(load(tmp_path / "x.npy", channels=1)) == {array.tobytes() for array in arrays}


def test_gray_arrays_are_repeated_for_three_channels(tmp_path):
    np.save(tmp_path / "x.npy", noise(12, channels=1))
    images = load(tmp_path / "x.npy").images
    assert torch.equal(images, images[:, :1].expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: (x / 255).astype(np.float32),
        lambda x: x / 255,
        lambda x: (x / 127.5 - 1).astype(np.float32),
        lambda x: x.astype(np.int64),
    ],
    ids=["float32 in [0, 1]", "float64 in [0, 1]", "float32 in [-1, 1]", "int64"],
)
def test_other_kinds_of_numbers_give_the_same_pixels(tmp_path, convert):
    arrays = noise(12)
    np.save(tmp_path / "x.npy", convert(arrays))
    assert pixels_of(load(tmp_path / "x.npy")) == {channels_first(array) for array in arrays}


def test_bool_arrays_are_black_and_white(tmp_path):
    arrays = noise(12) > 127
    np.save(tmp_path / "x.npy", arrays)
    assert pixels_of(load(tmp_path / "x.npy")) == {channels_first(np.uint8(255) * array) for array in arrays}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.float32([0, 255.0]), "values from 0 to 255; expected uint8"),
        (np.float32([0, np.nan]), "from nan"),
        (np.float32([-2, 1]), "from -2 to 1"),
        (np.int16([-1, 255]), "from -1 to 255"),
        (np.uint16([0, 65535]), "from 0 to 65535"),
        (np.uint8([0, 1]), "save it as bool"),
        (np.complex64([0, 1]), "type complex64"),
    ],
    ids=str,
)
def test_values_that_could_mean_anything_are_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", np.resize(array, (12, 8, 8)))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", [(8,), (12, 64), (64, 64, 3), (12, 8, 8, 5), (2, 12, 8, 8, 3), (0, 8, 8, 3), ()])
def test_shapes_that_are_not_images_are_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="shape"):
        load(tmp_path / "x.npy")


def test_an_npy_of_objects_is_refused_unopened(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a NumPy file of plain numbers") as raised:
        load(tmp_path / "x.npy")
    assert "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("content", [b"", b"nonsense that is no array"])
def test_a_file_that_holds_no_arrays_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"is empty|not a NumPy file"):
        load(tmp_path / name)


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=noise(12))
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a NumPy file"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize(("images_key", "labels_key"), [("images", "labels"), ("x_train", "y_train"), ("data", "y")])
def test_an_npz_is_read_under_the_customary_names(tmp_path, images_key, labels_key):
    arrays, labels = noise(12), np.arange(12).reshape(12, 1) % 3
    np.savez(tmp_path / "x.npz", **{images_key: arrays, labels_key: labels})
    expected = dict(zip(map(channels_first, arrays), map(str, labels[:, 0]), strict=True))
    assert label_by_pixels(load(tmp_path / "x.npz")) == expected


def test_the_test_arrays_of_an_npz_are_held_out(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=noise(12), x_test=noise(5, seed=1))
    assert {i.numpy().tobytes() for i in load(tmp_path / "x.npz").held_out} == set(
        map(channels_first, noise(5, seed=1))
    )


def test_an_npz_without_images_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "x.npz", weights=noise(2), biases=noise(2))
    with pytest.raises(UserError, match="holds the arrays weights, biases"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize("labels", [np.zeros(11, np.int64), np.zeros((12, 3), np.int64), np.zeros(12)], ids=str)
def test_npz_labels_that_do_not_match_are_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", images=noise(12), labels=labels)
    with pytest.raises(UserError, match="labels"):
        load(tmp_path / "x.npz")


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"1,2,3")
    with pytest.raises(UserError, match="of an unknown kind; give a folder"):
        load(tmp_path / "data.csv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_tensors_become_an_image_set(dtype, device):
    arrays = torch.from_numpy(noise(12)).permute(0, 3, 1, 2)
    tensor = arrays if dtype == torch.uint8 else arrays.to(dtype) / 127.5 - 1
    images = from_tensors(tensor.to(device), torch.arange(12) % 2, image_size=8, channels=3, name="mine")
    assert pixels_of(images) == {image.numpy().tobytes() for image in arrays.contiguous()}
    assert images.name == "mine"
    assert images.class_names == ("0", "1")


def test_tensors_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"shape \(12, 8, 8\); expected"):
        from_tensors(torch.zeros(12, 8, 8), image_size=8, channels=1)


@pytest.mark.parametrize(("image_size", "channels"), [(0, 3), (8, 2)])
def test_impossible_sizes_are_refused(image_size, channels):
    with pytest.raises(UserError, match="must be"):
        load_images(None, image_size=image_size, channels=channels)
