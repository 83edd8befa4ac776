import pytest
import torch
from torch.testing import assert_close

from spectralnorm.gan.augment import AUGMENTATIONS, compose


def _random(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def images(device: torch.device) -> torch.Tensor:
    return torch.rand(64, 3, 32, 32, device=device) * 2 - 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_keeps_shape_and_passes_gradients(name: str, images: torch.Tensor):
    images.requires_grad_(True)
    augmented = AUGMENTATIONS[name](images, _random(images.device))
    assert augmented.shape == images.shape
    (gradient,) = torch.autograd.grad(augmented.square().sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_follows_its_generator_alone(name: str, images: torch.Tensor):
    before = torch.get_rng_state()
    first = AUGMENTATIONS[name](images, _random(images.device, 1))
    again = AUGMENTATIONS[name](images, _random(images.device, 1))
    other = AUGMENTATIONS[name](images, _random(images.device, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_shift_moves_an_image_whole_and_brings_in_background(images: torch.Tensor):
    shifted = AUGMENTATIONS["shift"](images, _random(images.device))
    for image, moved in zip(images, shifted, strict=True):
        matches = []
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                expected = torch.full_like(image, -1.0)
                rows, columns = slice(max(0, dy), 32 + min(0, dy)), slice(max(0, dx), 32 + min(0, dx))
                source = image[:, max(0, -dy) : 32 - max(0, dy), max(0, -dx) : 32 - max(0, dx)]
                expected[:, rows, columns] = source
                matches.append(torch.equal(moved, expected))
        assert sum(matches) == 1


def test_shift_reaches_every_offset_on_both_axes(device: torch.device):
    dot = torch.full((2000, 1, 32, 32), -1.0, device=device)
    dot[:, :, 16, 16] = 1.0
    places = (AUGMENTATIONS["shift"](dot, _random(device)) == 1).nonzero()[:, 2:]
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(12, 21) for x in range(12, 21)}


def test_cutout_sets_one_square_to_gray_and_leaves_the_rest(images: torch.Tensor):
    cut = AUGMENTATIONS["cutout"](images, _random(images.device))
    for image, result in zip(images, cut, strict=True):
        hole = (result == 0).all(dim=0)
        rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
        assert len(rows) <= 16
        assert len(columns) <= 16
        assert hole.sum() == len(rows) * len(columns)
        assert torch.equal(result[:, ~hole], image[:, ~hole])


def test_flip_mirrors_about_half_of_the_images(device: torch.device):
    images = torch.rand(400, 1, 8, 8, device=device)
    flipped = AUGMENTATIONS["flip"](images, _random(device))
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    # Binomial(400, 1/2): within six standard deviations.
    assert abs(mirrored.sum().item() - 200) < 60


def test_no_names_change_nothing(images: torch.Tensor):
    assert_close(compose([])(images, _random(images.device)), images, rtol=0, atol=0)
