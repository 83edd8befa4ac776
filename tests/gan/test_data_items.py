"""Images given as objects in Python, and the ways in which a config's data are opened."""

import numpy as np
import pytest
import torch
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan.data import ImageSet, ImageStream, open_images
from spectralnorm.gan.data.items import from_items
from spectralnorm.gan.inputs import GIVEN_DATA, open_data, prepare_data
from spectralnorm.gan.recipes import make_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(num, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


class Pets:
    """A dataset as torchvision's are: pairs, and the names of the classes."""

    classes = ["cat", "dog", "fish"]  # noqa: RUF012

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] if self.labels is None else (self.images[index], self.labels[index])


def use(data):
    return from_items(data, image_size=8, channels=3)


def label_by_pixels(data):
    parts = ((data.images, data.labels), (data.held_out, data.held_out_labels))
    return {
        image.numpy().tobytes(): data.class_names[label]
        for images, labels in parts
        for image, label in zip(images, labels.tolist(), strict=True)
    }


@pytest.mark.parametrize("kind", ["Pillow", "tensors"])
def test_pairs_of_an_image_and_its_class_are_used_with_the_names_of_classes(kind):
    arrays = noise(12)
    labels = [i % 2 for i in range(12)]
    images = [Image.fromarray(a) if kind == "Pillow" else torch.from_numpy(a).permute(2, 0, 1) for a in arrays]
    data = use(Pets(images, labels))
    expected = {a.transpose(2, 0, 1).tobytes(): Pets.classes[i] for a, i in zip(arrays, labels, strict=True)}
    assert label_by_pixels(data) == expected
    assert data.class_names == ("cat", "dog", "fish")
    assert data.name == "Pets"


def test_pillow_images_of_any_size_are_cut_and_resized():
    data = use(Pets([Image.fromarray(noise(1, 10 + i, 20)[0]) for i in range(10)]))
    assert data.num_training + len(data.held_out) == 10
    assert data.labels is None


def test_tensors_of_different_sizes_say_what_to_leave_out():
    with pytest.raises(UserError, match=r"different shapes, such as \(3, 8, 8\) and \(3, 9, 9\); leave out"):
        use([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), "has no length or cannot be indexed"),
        ([], "is empty"),
        (["a.png", "b.png"], "are of type str; expected Pillow images or tensors"),
        ([(torch.zeros(3, 8, 8), "cat")], "must be whole numbers"),
        ([(torch.zeros(3, 8, 8), 7)] * 4, "reach from 7 to 7, but it names 3 classes"),
    ],
    ids=["iterator", "empty", "paths", "names", "numbers"],
)
def test_other_objects_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        use(Pets(*zip(*data, strict=True)) if "names 3 classes" in message else data)


@pytest.mark.parametrize(("loading", "kind"), [("auto", ImageSet), ("prepare", ImageSet), ("stream", ImageStream)])
def test_a_config_s_data_are_opened_as_asked(tmp_path, loading, kind):
    np.save(tmp_path / "x.npy", noise(30, 32, 32))
    config = make_config("fashion", channels=3, data=str(tmp_path / "x.npy"))
    images = open_data(config, loading=loading)
    assert isinstance(images, kind)
    assert images.num_training == 27
    assert isinstance(open_data(make_config("fashion", channels=3), tmp_path / "x.npy", loading=loading), kind)


def test_data_given_as_objects_stay_what_they_are(tmp_path):
    config = make_config("fashion", channels=3)
    np.save(tmp_path / "x.npy", noise(30, 32, 32))
    stream = open_images(tmp_path / "x.npy", image_size=32, channels=3, loading="stream")
    prepared = prepare_data(config, torch.from_numpy(noise(30, 32, 32)).permute(0, 3, 1, 2))
    assert open_data(config, stream) is stream
    assert open_data(config, prepared, loading="stream") is prepared
    with pytest.raises(UserError, match="give them again as data="):
        open_data(make_config("fashion", data=GIVEN_DATA))
