"""CIFAR and STL-10 as they are distributed, the layouts of ImageNet and LSUN, and labels that are asked for."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import archives, cache, from_tensors, load_images
from spectralnorm.gan.data.pickles import read_pickle


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def classes_by_pixels(images, labels, class_names):
    return {
        image.numpy().tobytes(): class_names[label] if label >= 0 else None
        for image, label in zip(images, labels.tolist(), strict=True)
    }


def write_tar(file, folder):
    with tarfile.open(file, "w:gz" if file.suffix in (".gz", ".tgz") else "w") as archive:
        archive.add(folder, arcname=folder.name)


# CIFAR: each writer makes a tiny set from the description on its web page, and says what must come out of it.

NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
NAMES_100 = [f"fine {number}".replace(" ", "_") for number in range(100)]


def cifar_part(num, seed, num_classes):
    """Images (num, 3072) in the order red, green, blue, each row by row, and labels."""
    return noise(num, 3072, seed=seed), (np.arange(num) * 7 + seed) % num_classes


def write_cifar10_binary(folder):
    for seed, name in enumerate(BATCHES):
        pixels, labels = cifar_part(4, seed, 10)
        with (folder / f"{name}.bin").open("wb") as file:
            for image, label in zip(pixels, labels, strict=True):
                file.write(bytes([label]) + image.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES_10) + "\n\n")


def write_cifar100_binary(folder):
    for seed, name in enumerate(["train", "test"]):
        pixels, labels = cifar_part(20 if name == "train" else 4, seed, 100)
        with (folder / f"{name}.bin").open("wb") as file:
            for image, label in zip(pixels, labels, strict=True):
                file.write(bytes([label // 5, label]) + image.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES_100))
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse_{number}" for number in range(20)))


def python2_pickle(pixels, labels, labels_key):
    """What Python 2 wrote: opcodes put together by hand, since Python 3 writes other ones for text."""

    def text(value):
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R"
        + b"(" + number(1) + number(len(pixels)) + number(3072) + b"\x86"
        + b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R"
        + b"(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        + b"\x89" + b"T" + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text("data") + array + text(labels_key) + numbers + b"u."


def write_cifar10_python(folder):
    for seed, name in enumerate(BATCHES):
        (folder / name).write_bytes(python2_pickle(*cifar_part(4, seed, 10), "labels"))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES_10, "num_vis": 3072}, protocol=2))


def write_cifar100_python(folder):
    for seed, name in enumerate(["train", "test"]):
        pixels, labels = cifar_part(20 if name == "train" else 4, seed, 100)
        content = {"data": pixels, "fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES_100}, protocol=2))


CIFAR = {
    "cifar-10-batches-bin": (write_cifar10_binary, NAMES_10, [(4, seed) for seed in range(5)], (4, 5)),
    "cifar-10-batches-py": (write_cifar10_python, NAMES_10, [(4, seed) for seed in range(5)], (4, 5)),
    "cifar-100-binary": (write_cifar100_binary, NAMES_100, [(20, 0)], (4, 1)),
    "cifar-100-python": (write_cifar100_python, NAMES_100, [(20, 0)], (4, 1)),
}


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("place", ["the folder", "the folder around it", "a tar.gz"])
def test_cifar_comes_with_its_classes_and_its_test_images_held_out(tmp_path, name, place):
    write, class_names, training, test = CIFAR[name]
    folder = tmp_path / "root" / name
    folder.mkdir(parents=True)
    write(folder)
    path = {"the folder": folder, "the folder around it": folder.parent, "a tar.gz": tmp_path / "cifar.tar.gz"}[place]
    if place == "a tar.gz":
        write_tar(path, folder)
    data = load_images(path, image_size=32, channels=3)
    assert data.class_names == tuple(class_names)

    def expected(parts):
        return {
            image.tobytes(): class_names[label]
            for num, seed in parts
            for image, label in zip(*cifar_part(num, seed, len(class_names)), strict=True)
        }

    assert classes_by_pixels(data.images, data.labels, class_names) == expected(training)
    assert classes_by_pixels(data.held_out, data.held_out_labels, class_names) == expected([test])
    data.require_labels()


def test_a_compressed_set_is_unpacked_once(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    write_cifar100_binary(folder)
    write_tar(tmp_path / "cifar.tgz", folder)
    first = load_images(tmp_path / "cifar.tgz", image_size=32, channels=3)
    monkeypatch.setattr(tarfile, "open", lambda *_args, **_options: pytest.fail("opened again"))
    assert torch.equal(load_images(tmp_path / "cifar.tgz", image_size=32, channels=3).images, first.images)


def test_what_unpacks_to_more_than_fits_in_memory_is_mapped_from_a_file_that_vanishes(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "test_X.bin").write_bytes(noise(5000).tobytes())
    write_tar(tmp_path / "x.tar.gz", tmp_path / "x")
    monkeypatch.setattr(cache, "MEMORY_MAP_BYTES", 1000)
    found = archives.read_members(tmp_path / "x.tar.gz", ["test_X.bin"])
    assert isinstance(found["test_X.bin"], np.memmap)
    np.testing.assert_array_equal(found["test_X.bin"], noise(5000))
    assert list(cache.cache_folder().iterdir()) == []


def test_a_cifar_batch_that_is_missing_or_cut_is_named(tmp_path):
    write_cifar10_binary(tmp_path)
    file = tmp_path / "data_batch_3.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"'data_batch_3\.bin' is damaged: .* no multiple of the 3,073"):
        load_images(tmp_path, image_size=32, channels=3)
    file.unlink()
    with pytest.raises(UserError, match=r"lacks data_batch_3\.bin of CIFAR"):
        load_images(tmp_path, image_size=32, channels=3)


def test_a_cut_tar_of_cifar_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    write_cifar10_binary(folder)
    write_tar(tmp_path / "c.tar.gz", folder)
    content = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot be read .*download or copy it again"):
        load_images(tmp_path / "c.tar.gz", image_size=32, channels=3)


class Attack:
    """Unpickling it makes a file, if anything lets it."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return (open, (self._file, "w"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, protocol):
    data = pickle.dumps({"data": Attack(str(tmp_path / "made"))}, protocol=protocol)
    with pytest.raises(UserError, match=r"asks for \w+\.open.*use the binary version"):
        read_pickle(data, what="'data_batch_1'")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [np.array([{}], dtype=object), np.zeros(3), np.random.default_rng(0), {1: np.float32(1)}, torch.zeros(1)],
    ids=["objects", "floats", "generator", "scalar", "tensor"],
)
def test_a_pickle_of_other_things_is_refused(content):
    with pytest.raises(UserError, match="not a pickle of plain arrays"):
        read_pickle(pickle.dumps(content), what="it")


def test_a_damaged_pickle_is_refused_wherever_it_is_cut():
    data = python2_pickle(*cifar_part(1, 0, 10), "labels")
    for length in (0, 1, 5, 30, 60, 120, 200, len(data) - 1):
        with pytest.raises(UserError, match="not a pickle of plain arrays"):
            read_pickle(data[:length], what="it")


# STL-10


def write_stl10(folder):
    """Column by column: the description on its web page, written out pixel by pixel."""
    folder.mkdir()
    expected = {}
    for seed, (name, num) in enumerate([("unlabeled", 6), ("train", 3), ("test", 3)]):
        images = noise(num, 3, 96, 96, seed=seed)  # channel, row, column
        by_column = [image[c, :, column] for image in images for c in range(3) for column in range(96)]
        (folder / f"{name}_X.bin").write_bytes(b"".join(column.tobytes() for column in by_column))
        labels = [1, 10, 3]
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(labels))
        names = [None] * num if name == "unlabeled" else ["airplane", "truck", "car"]
        expected[name] = {image.tobytes(): label for image, label in zip(images, names, strict=True)}
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return expected, names


@pytest.mark.parametrize("packed", [False, True])
def test_stl10_trains_on_unlabelled_and_labelled_images_and_holds_out_the_test_images(tmp_path, packed):
    folder = tmp_path / "stl10_binary"
    expected, names = write_stl10(folder)
    if packed:
        write_tar(tmp_path / "stl10_binary.tar.gz", folder)
    data = load_images(tmp_path / "stl10_binary.tar.gz" if packed else folder, image_size=96, channels=3)
    assert data.class_names == tuple(names)
    assert classes_by_pixels(data.images, data.labels, names) == expected["unlabeled"] | expected["train"]
    assert classes_by_pixels(data.held_out, data.held_out_labels, names) == expected["test"]
    with pytest.raises(UserError, match=r"6 of the 9 training images of 'stl10_binary.*' have none; label or remove"):
        data.require_labels()


def test_stl10_without_its_training_images_is_refused(tmp_path):
    write_stl10(tmp_path / "stl")
    (tmp_path / "stl" / "train_y.bin").unlink()
    with pytest.raises(UserError, match=r"lacks train_y\.bin of STL-10"):
        load_images(tmp_path / "stl", image_size=96, channels=3)


def test_stl10_labels_that_no_name_belongs_to_are_refused(tmp_path):
    write_stl10(tmp_path / "stl")
    (tmp_path / "stl" / "train_y.bin").write_bytes(bytes([1, 11, 3]))
    with pytest.raises(UserError, match="reach from -1 to 10, but it names 10 classes"):
        load_images(tmp_path / "stl", image_size=96, channels=3)


# ImageNet and LSUN


def write_images(folder, num, seed=0, extension="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(noise(num, 8, 8, 3, seed=seed)):
        Image.fromarray(array).save(folder / f"{index}.{extension}", "PNG")


def tally(data):
    names = (*data.class_names, None)
    return [sorted(str(names[label]) for label in labels) for labels in (data.labels, data.held_out_labels)]


@pytest.mark.parametrize("base", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenets_flat_validation_images_are_held_out_without_a_class(tmp_path, base):
    for seed, wnid in enumerate(("n01440764", "n01443537")):
        write_images(tmp_path / base / "train" / wnid, 3, seed=seed, extension="JPEG")
    write_images(tmp_path / base / "val", 2, seed=2, extension="JPEG")
    data = load_images(tmp_path, image_size=8, channels=3)
    assert data.class_names == ("n01440764", "n01443537")
    assert tally(data) == [["n01440764"] * 3 + ["n01443537"] * 3, ["None"] * 2]
    data.require_labels()


def test_validation_images_of_a_class_that_is_not_trained_on_have_none(tmp_path):
    for seed, folder in enumerate(("train/a", "train/b", "val/a", "val/c")):
        write_images(tmp_path / folder, 2, seed=seed)
    data = load_images(tmp_path, image_size=8, channels=3)
    assert tally(data) == [["a", "a", "b", "b"], ["None", "None", "a", "a"]]


def test_lsuns_exported_folders_are_classes_with_their_own_split(tmp_path):
    for seed, folder in enumerate(("bedroom_train", "bedroom_val", "church_outdoor_train", "church_outdoor_val")):
        write_images(tmp_path / folder / "0", 2, seed=seed)
    data = load_images(tmp_path, image_size=8, channels=3)
    assert tally(data) == [["bedroom"] * 2 + ["church_outdoor"] * 2] * 2


def test_one_exported_lsun_set_has_a_split_and_no_classes(tmp_path):
    for seed, folder in enumerate(("bedroom_train", "bedroom_val")):
        write_images(tmp_path / folder, 2, seed=seed)
    data = load_images(tmp_path, image_size=8, channels=3)
    assert (len(data.images), len(data.held_out), data.labels) == (2, 2, None)


@pytest.mark.parametrize("folders", [("bullet_train", "crash_test"), ("station-train", "valley"), ("test", "value")])
def test_classes_whose_names_end_in_train_or_test_are_no_split(tmp_path, folders):
    for seed, folder in enumerate(folders):
        write_images(tmp_path / folder, 20, seed=seed)
    data = load_images(tmp_path, image_size=8, channels=3)
    assert data.class_names == tuple(sorted(folders))
    assert len(data.held_out) == 4


def write_lmdb(folder, values):
    lmdb = pytest.importorskip("lmdb", reason="needs the package lmdb (extra: lmdb)")
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number:04d}".encode(), value)


def encoded(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def test_an_lmdb_is_read_where_the_package_is_installed(tmp_path):
    arrays = noise(30, 8, 8, 3)
    write_lmdb(tmp_path / "bedroom_val_lmdb", [encoded(array) for array in arrays] + [b"broken"])
    data = load_images(tmp_path / "bedroom_val_lmdb", image_size=8, channels=3)
    found = {image.numpy().tobytes() for part in (data.images, data.held_out) for image in part}
    assert found == {np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes() for array in arrays}
    assert [item.file for item in data.summary.unreadable] == ["0030"]


def test_an_lmdb_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"x")
    with pytest.raises(UserError, match=r"install 'spectralnorm\[lmdb\]', or export it to images or WebDataset tars"):
        load_images(tmp_path, image_size=8, channels=3)


def test_a_folder_around_an_lmdb_says_to_give_the_one_inside(tmp_path):
    (tmp_path / "bedroom_train_lmdb").mkdir()
    (tmp_path / "bedroom_train_lmdb" / "data.mdb").write_bytes(b"x")
    with pytest.raises(UserError, match=r"give the folder that holds data\.mdb itself"):
        load_images(tmp_path, image_size=8, channels=3)


# Labels that are asked for


def images_with(labels):
    return from_tensors(torch.from_numpy(noise(40, 3, 8, 8)), labels, image_size=8, channels=3, name="mine")


def test_labels_of_all_images_are_enough():
    images_with(torch.arange(40) % 2).require_labels()


def test_a_set_without_labels_says_how_to_give_them():
    with pytest.raises(
        UserError, match=r"but 36 of the 36 training images of 'mine' have none; put each into a folder"
    ):
        images_with(None).require_labels()


def test_a_single_class_is_none():
    with pytest.raises(UserError, match="needs at least two, but 'mine' has only '5'"):
        images_with(torch.full((40,), 5)).require_labels()


def test_examples_are_the_first_training_images_with_their_labels():
    data = images_with(torch.arange(40) % 2)
    images, labels = data.examples(5)
    assert torch.equal(images, data.images[:5])
    assert torch.equal(labels, data.labels[:5])
    assert data.num_training == 36
