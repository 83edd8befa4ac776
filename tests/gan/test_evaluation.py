"""Measuring generators: path lengths, and folders of images."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectralnorm.errors import UserError
from spectralnorm.gan import make_config
from spectralnorm.gan.data import ImageSet, from_tensors, open_images
from spectralnorm.gan.data.points import open_points
from spectralnorm.gan.evaluation import extractors_for, measure
from spectralnorm.gan.image_folders import all_images, size_of_first
from spectralnorm.gan.sampling import TrainedGenerator, build_generator
from spectralnorm.metrics import load_extractor
from spectralnorm.records import Metric


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return from_tensors(pixels, image_size=32, channels=1)


def generator(**settings) -> TrainedGenerator:
    config = make_config("fashion", generator_width=4, latent_dim=8, **settings)
    return TrainedGenerator(build_generator(config).requires_grad_(False), config)


def path_lengths(made: TrainedGenerator, images: ImageSet) -> dict[str, Metric]:
    extractor = load_extractor("classifier")
    return {metric.name: metric for metric in measure(made, images, extractors=[extractor], num=40, metrics=["ppl"])}


def test_a_generator_has_a_path_length_in_z(images: ImageSet) -> None:
    (found,) = path_lengths(generator(), images).values()
    assert found.name == "Path length in z-Classifier"
    assert found.value > 0
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert found.details["steps"] == 20


def test_a_generator_with_styles_has_one_in_w_too(images: ImageSet) -> None:
    made = generator(architecture="stylegan2")
    assert list(path_lengths(made, images)) == ["Path length in z-Classifier", "Path length in w-Classifier"]


def test_a_path_stays_in_its_class(images: ImageSet) -> None:
    made = generator(architecture="resnet", conditional=True, class_names=("a", "b"), class_counts=(1, 1))
    seen: list[torch.Tensor] = []

    def forward(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        # A step into the other class would be a jump of 1 / epsilon.
        return (latents.sum(1) * 1e-3 + labels).view(-1, 1, 1, 1).expand(-1, 1, 32, 32).float() / 2

    made.network.forward = forward
    (found,) = path_lengths(made, images).values()
    assert set(torch.cat(seen).tolist()) == {0, 1}
    assert torch.equal(seen[0], seen[1])
    assert found.value < 1e3


def test_a_generator_that_ignores_its_latent_has_no_path(images: ImageSet) -> None:
    made = generator()
    made.network.forward = lambda latents: latents.new_zeros(len(latents), 1, 32, 32)
    (found,) = path_lengths(made, images).values()
    assert found.value == 0


def test_the_size_of_a_folder_is_that_of_its_first_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "in" / "a.png")
    Image.new("L", (50, 50)).save(tmp_path / "in" / "b.png")
    assert size_of_first(tmp_path) == (20, 3)
    (tmp_path / "in" / "a.png").unlink()
    assert size_of_first(tmp_path) == (50, 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 3, 24, 20), (20, 3)), ((5, 24, 20, 3), (20, 3)), ((5, 28, 28), (28, 1)), ((5, 1, 16, 16), (16, 1))],
)
def test_the_size_of_an_array_is_in_its_shape(tmp_path: Path, shape: tuple[int, ...], expected) -> None:
    np.save(tmp_path / "images.npy", np.zeros(shape, dtype=np.uint8))
    assert size_of_first(tmp_path / "images.npy") == expected


def _idx(file: Path, pixels: np.ndarray) -> None:
    header = bytes([0, 0, 8, pixels.ndim]) + b"".join(size.to_bytes(4, "big") for size in pixels.shape)
    file.write_bytes(header + pixels.tobytes())


def test_the_size_is_that_of_the_first_image_of_any_kind_of_file(tmp_path: Path) -> None:
    pixels = np.arange(5 * 24 * 20, dtype=np.uint8).reshape(5, 24, 20)
    np.savez(tmp_path / "images.npz", images=pixels)
    assert size_of_first(tmp_path / "images.npz") == (20, 1)
    assert len(all_images(tmp_path / "images.npz", image_size=20, channels=1)) == 5
    # Padded from 28 to 32 pixels, as for training.
    _idx(tmp_path / "train-images-idx3-ubyte", np.zeros((5, 28, 28), dtype=np.uint8))
    assert size_of_first(tmp_path / "train-images-idx3-ubyte") == (32, 1)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    assert size_of_first(tmp_path / "images.tar") == (20, 3)


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        size_of_first(tmp_path)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"None of the 1 images in .* can be read"):
        size_of_first(tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "toy-ring"])
def test_images_are_seen_as_what_they_are_and_not_as_what_their_folder_is_called(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for level in range(40):
        Image.new("L", (32, 32), level).save(tmp_path / name / f"{level}.png")
    images = open_images(tmp_path / name, image_size=32, channels=1)
    extractors = extractors_for(images, device=torch.device("cpu"))
    assert [extractor.name for extractor in extractors] == ["SqueezeNet"]
    found = measure(generator(), images, extractors=extractors, num=4, metrics=("diversity",))
    assert [metric.name for metric in found] == ["Diversity-SqueezeNet"]


@pytest.mark.parametrize(("name", "expected"), [(None, ["Classifier", "SqueezeNet"]), ("toy-ring", [])])
def test_what_is_built_in_is_seen_by_what_knows_it(name: str | None, expected: list[str]) -> None:
    images = open_images(None, image_size=32, channels=1) if name is None else open_points(name)
    assert [extractor.name for extractor in extractors_for(images, device=torch.device("cpu"))] == expected


@pytest.mark.parametrize("num", [1, 120])
def test_copies_of_one_image_can_be_measured(num: int, tmp_path: Path) -> None:
    for index in range(num):
        Image.new("L", (8, 8), 77).save(tmp_path / f"{index}.png")
    found = all_images(tmp_path, image_size=8, channels=1)
    assert found.shape == (num, 1, 8, 8)
    assert (found == 77).all()


def test_all_images_of_a_folder_are_measured_in_a_fixed_order(tmp_path: Path) -> None:
    for level in range(12):
        Image.new("L", (8, 8), level).save(tmp_path / f"{level}.png")
    found = all_images(tmp_path, image_size=8, channels=1)
    assert sorted(found[:, 0, 0, 0].tolist()) == list(range(12))
    assert torch.equal(all_images(tmp_path, image_size=8, channels=1), found)
