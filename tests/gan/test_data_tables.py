"""Parquet files and the data sets of Hugging Face, where their packages are installed."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import from_huggingface, load_images
from spectralnorm.gan.data.columns import choose_images, choose_labels
from spectralnorm.gan.inputs import prepare_data
from spectralnorm.gan.recipes import make_config

CLASSES = ["cat", "dog", "fish"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow", reason="needs the package pyarrow (extra: parquet)")


@pytest.fixture
def parquet(arrow):
    return pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets", reason="needs the package datasets (extra: huggingface)")


def noise(num, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)


def encoded(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def first_channels(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()


def pixels(*seeds, num=12):
    return {first_channels(array) for seed in seeds for array in noise(num, seed)}


def load(path):
    return load_images(path, image_size=8, channels=3)


def label_by_pixels(data):
    parts = ((data.images, data.labels), (data.held_out, data.held_out_labels))
    return {
        image.numpy().tobytes(): data.class_names[label] if label >= 0 else None
        for images, labels in parts
        for image, label in zip(images, labels.tolist(), strict=True)
    }


def structs(num=12, seed=0):
    return [{"bytes": encoded(array), "path": f"{i}.png"} for i, array in enumerate(noise(num, seed))]


# Parquet


@pytest.mark.parametrize("kind", ["struct", "binary", "list", "channels first", "bool lists"])
def test_images_are_found_in_any_column_that_can_hold_them(tmp_path, arrow, parquet, kind):
    columns = {
        "struct": structs(),
        "binary": [encoded(array) for array in noise(12)],
        "list": [array.tolist() for array in noise(12)],
        "channels first": [array.transpose(2, 0, 1).tolist() for array in noise(12)],
        "bool lists": [(array > 127).tolist() for array in noise(12)],
    }
    table = arrow.table({"id": list(range(12)), "photo": columns[kind], "caption": ["text"] * 12})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    data = load(tmp_path / "x.parquet")
    arrays = noise(12)
    if kind == "bool lists":
        arrays = 255 * (arrays > 127).astype(np.uint8)
    assert {i.numpy().tobytes() for part in (data.images, data.held_out) for i in part} == set(
        map(first_channels, arrays)
    )
    assert data.labels is None


@pytest.mark.parametrize("kind", ["named", "numbers", "text", "dictionary"])
def test_labels_of_a_parquet_file_belong_to_their_images(tmp_path, arrow, parquet, kind):
    numbers = [None, *(i % 3 for i in range(1, 12))]
    values = numbers if kind in ("named", "numbers") else [None if i is None else CLASSES[i] for i in numbers]
    column = arrow.array(values)
    table = arrow.table({"image": structs(), "label": column.dictionary_encode() if kind == "dictionary" else column})
    if kind == "named":
        features = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    data = load(tmp_path / "x.parquet")
    names = ["0", "1", "2"] if kind == "numbers" else CLASSES
    expected = [None if number is None else names[number] for number in numbers]
    assert label_by_pixels(data) == dict(zip(map(first_channels, noise(12)), expected, strict=True))


@pytest.mark.parametrize("base", ["", "data"])
def test_a_folder_of_parquet_files_brings_its_split(tmp_path, arrow, parquet, base):
    (tmp_path / base).mkdir(exist_ok=True)
    for seed, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        table = arrow.table({"image": structs(seed=seed), "label": [0, 1] * 6})
        parquet.write_table(table, tmp_path / base / f"{name}.parquet")
    (tmp_path / "README.md").write_text("hello")
    data = load(tmp_path)
    assert {image.numpy().tobytes() for image in data.images} == pixels(0, 1)
    assert {image.numpy().tobytes() for image in data.held_out} == pixels(2)


def test_rows_that_hold_no_image_are_skipped_and_named(tmp_path, arrow, parquet):
    rows = [*structs(num=80), {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": None}, None]
    parquet.write_table(arrow.table({"image": rows}), tmp_path / "x.parquet", row_group_size=7)
    unreadable = {item.file: item.reason for item in load(tmp_path / "x.parquet").summary.unreadable}
    assert unreadable == {
        "x.parquet, row 80": "the table holds only its path; save the images themselves in it",
        "x.parquet, row 81": "the file is empty",
        "x.parquet, row 82": "the cell is empty",
    }


def test_a_parquet_file_without_images_says_which_columns_it_has(tmp_path, arrow, parquet):
    parquet.write_table(arrow.table({"text": ["a"], "score": [0.5]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the columns text, score; expected the images in one called 'image'"):
        load(tmp_path / "x.parquet")


def test_a_class_without_a_name_is_refused(tmp_path, arrow, parquet):
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = arrow.table({"image": structs(), "label": [0, 1, 2, 3] * 3})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the class 3, but names only 3 classes"):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_a_damaged_parquet_file_is_refused(tmp_path, arrow, parquet, keep):
    parquet.write_table(arrow.table({"image": structs()}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"is not a Parquet file that can be read"):
        load(tmp_path / "x.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs the package pyarrow.*pip install 'spectralnorm\[parquet\]'"):
        load(tmp_path / "x.parquet")


# Columns


def test_customary_names_are_preferred_and_an_only_column_needs_none():
    assert choose_images(["mask", "image"], ["mask", "image"], what="it") == "image"
    assert choose_images(["scan"], ["scan", "text"], what="it") == "scan"
    assert choose_labels(["id", "label"], []) == "label"
    assert choose_labels(["id", "breed"], ["breed"]) == "breed"
    assert choose_labels(["id", "label", "fine_label"], ["fine_label"]) == "fine_label"
    assert choose_labels(["id", "caption"], []) is None


def test_two_columns_of_images_without_a_customary_name_are_not_guessed_at():
    with pytest.raises(UserError, match="has the columns left, right"):
        choose_images(["left", "right"], ["left", "right"], what="it")


# Hugging Face


def make(datasets, num=12, seed=0, labels=True):
    content = {"image": [Image.fromarray(array) for array in noise(num, seed)]}
    features = {"image": datasets.Image()}
    if labels:
        content["breed"] = [i % 3 for i in range(num)]
        features["breed"] = datasets.ClassLabel(names=CLASSES)
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def expected_labels(num=12, seed=0):
    return {first_channels(array): CLASSES[i % 3] for i, array in enumerate(noise(num, seed))}


def test_a_saved_data_set_is_read_from_its_folder(tmp_path, datasets):
    make(datasets).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert label_by_pixels(data) == expected_labels()
    assert data.class_names == tuple(CLASSES)


def test_the_test_split_of_a_saved_dictionary_is_held_out(tmp_path, datasets):
    splits = {"train": make(datasets), "validation": make(datasets, seed=1), "test": make(datasets, seed=2)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert {image.numpy().tobytes() for image in data.images} == pixels(0)
    assert {image.numpy().tobytes() for image in data.held_out} == pixels(2)


def test_a_data_set_given_from_python_keeps_its_own_order_format_and_choice_of_rows(datasets):
    chosen = make(datasets, num=30).select(range(0, 30, 2)).shuffle(seed=1).with_format("torch")
    data = from_huggingface(chosen, image_size=8, channels=3)
    every = list(expected_labels(30).items())
    assert label_by_pixels(data) == dict(every[::2])
    assert data.name == "huggingface"


@pytest.mark.parametrize("kind", ["Array3D", "binary"])
def test_arrays_and_bytes_of_a_data_set_are_images_too(datasets, kind):
    features = {"Array3D": datasets.Array3D((8, 8, 3), "uint8"), "binary": datasets.Value("binary")}
    values = [array if kind == "Array3D" else encoded(array) for array in noise(12)]
    rows = datasets.Dataset.from_dict({"pic": values}, features=datasets.Features({"pic": features[kind]}))
    data = from_huggingface(rows, image_size=8, channels=3)
    assert {i.numpy().tobytes() for part in (data.images, data.held_out) for i in part} == pixels(0)


@pytest.mark.parametrize("split", ["", ":train", ":train[:50%]"])
def test_a_named_data_set_is_loaded_by_its_package(tmp_path, datasets, split):
    folder = tmp_path / "pets"
    folder.mkdir()
    make(datasets).to_parquet(folder / "train.parquet")
    make(datasets, seed=1).to_parquet(folder / "test.parquet")
    data = load(f"hf:{folder}{split}")
    found = {image.numpy().tobytes() for part in (data.images, data.held_out) for image in part}
    half = {first_channels(array) for array in noise(12)[:6]}
    assert found == {"": pixels(0, 1), ":train": pixels(0), ":train[:50%]": half}[split]


def test_a_name_that_is_not_found_is_told_in_one_sentence(tmp_path, datasets):
    with pytest.raises(UserError, match=r"hf:.*nowhere cannot be loaded \(.*\); check its name and split\.$"):
        load(f"hf:{tmp_path}/nowhere")


def test_a_streamed_data_set_is_refused(datasets):
    with pytest.raises(UserError, match="is streamed and has no length"):
        from_huggingface(make(datasets).to_iterable_dataset(), image_size=8, channels=3)


def test_the_trainer_takes_a_data_set_as_its_data(datasets):
    data = prepare_data(make_config("fashion", channels=3), make(datasets))
    assert data.images.shape[1:] == (3, 32, 32)
    assert data.num_training + len(data.held_out) == 12


@pytest.mark.parametrize("path", ["hf:some/name", "saved"])
def test_hugging_face_without_datasets_names_the_extra(tmp_path, monkeypatch, path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=r"needs the package datasets.*pip install 'spectralnorm\[huggingface\]'"):
        load(path if path.startswith("hf:") else tmp_path / path)
