import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from spectralnorm.errors import UserError
from spectralnorm.gan.augment import AUGMENTATIONS, Augmenter, compose, make_augmenter


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


@pytest.mark.parametrize("name", ["none", "shift,flip", "diffaugment", "diffaugment:p=0.5", "ada", "ada:p=0.3"])
def test_an_augmenter_follows_its_generator_alone(name: str, images: torch.Tensor):
    before = torch.get_rng_state()
    augment = make_augmenter(name, device=images.device)
    augment.p.fill_(max(augment.p.item(), 0.3))
    first, again = (augment(images, _random(images.device, 1)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, images) == (name == "none")


def test_a_list_of_names_draws_what_it_always_drew(images: torch.Tensor):
    names = ["shift", "flip", "color"]
    random, same = _random(images.device), _random(images.device)
    augmented = make_augmenter(",".join(names), device=images.device)(images, random)
    assert torch.equal(augmented, compose(names)(images, same))
    assert torch.equal(random.get_state(), same.get_state())


def test_diffaugment_is_color_translation_and_cutout(images: torch.Tensor):
    augmented = make_augmenter("diffaugment", device=images.device)(images, _random(images.device))
    assert torch.equal(augmented, compose(["color", "translation", "cutout"])(images, _random(images.device)))


def test_translation_brings_in_gray_where_shift_brings_in_black(images: torch.Tensor):
    black = AUGMENTATIONS["shift"](images, _random(images.device))
    gray = AUGMENTATIONS["translation"](images, _random(images.device))
    differ = black != gray
    assert differ.any()
    assert (black[differ] == -1).all()
    assert (gray[differ] == 0).all()


@pytest.mark.parametrize("name", ["diffaugment:p=0", "shift,cutout,flip,color:p=0", "ada:p=0", "ada"])
def test_nothing_leaks_at_probability_zero(name: str, images: torch.Tensor):
    images.requires_grad_(True)
    augmented = make_augmenter(name, device=images.device)(images, _random(images.device))
    cotangent = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(augmented, images, cotangent)
    assert torch.equal(augmented, images)
    assert torch.equal(gradient, cotangent)


def test_a_probability_is_the_share_of_augmented_images(device: torch.device):
    images = torch.rand(3000, 3, 8, 8, device=device)
    changed = make_augmenter("color:p=0.3", device=device)(images, _random(device)) != images
    share = changed.flatten(1).any(1).float().mean().item()
    assert abs(share - 0.3) < 6 * (0.3 * 0.7 / 3000) ** 0.5


def _feed(augment: Augmenter, sign: float, *, batches: int, start: int = 0, batch_size: int = 100) -> int:
    for batch in range(batches):
        augment.observe(torch.full((batch_size,), sign, device=augment.p.device))
        augment.adapt(start + (batch + 1) * batch_size)
    return start + batches * batch_size


def test_p_rises_while_real_logits_are_positive_and_falls_while_they_are_not(device: torch.device):
    augment = make_augmenter("ada:kimg=10", device=device)
    seen = _feed(augment, 1.0, batches=3)
    assert augment.p.item() == 0.0
    seen = _feed(augment, 1.0, batches=17, start=seen)
    # 2,000 images of 10,000.
    assert augment.p.item() == pytest.approx(0.2)
    seen = _feed(augment, -1.0, batches=8, start=seen)
    assert augment.p.item() == pytest.approx(0.12)
    _feed(augment, -1.0, batches=40, start=seen)
    assert augment.p.item() == 0.0


def test_p_turns_at_its_target_and_ends_at_one(device: torch.device):
    for target, direction in ((0.4, 1), (0.6, -1)):
        augment = make_augmenter(f"ada:target={target}:kimg=1", device=device)
        augment.p.fill_(0.5)
        logits = torch.tensor([1.0, 1.0, 1.0, -1.0], device=device)  # r_t = 0.5
        for batch in range(4):
            augment.observe(logits)
            augment.adapt(4 * (batch + 1))
        assert augment.p.item() == pytest.approx(0.5 + direction * 0.016)
    _feed(augment, 1.0, batches=400)
    assert augment.p.item() == 1.0


def test_p_stays_where_it_is_constant_or_nothing_was_observed(device: torch.device):
    fixed = make_augmenter("ada:p=0.3", device=device)
    _feed(fixed, 1.0, batches=8)
    assert fixed.p.item() == pytest.approx(0.3)
    assert fixed.state_dict() == {}
    unseen = make_augmenter("ada:kimg=1", device=device)
    unseen.p.fill_(0.5)
    for batch in range(8):
        unseen.adapt(100 * batch)
    assert unseen.p.item() == 0.5


def test_an_augmenter_goes_on_exactly_from_its_state(device: torch.device):
    whole, first = (make_augmenter("ada:kimg=10", device=device) for _ in range(2))
    seen = _feed(first, 1.0, batches=6)
    second = make_augmenter("ada:kimg=10", device=device)
    second.load_state_dict({name: tensor.cpu() for name, tensor in first.state_dict().items()})
    _feed(second, 1.0, batches=7, start=seen)
    _feed(whole, 1.0, batches=13)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    assert whole.p.item() > 0


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: numbers read back, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ada", "diffaugment:target=0.6", "shift,cutout,flip,color"])
def test_augmenting_and_adapting_never_wait_for_the_device(name: str, images: torch.Tensor):
    augment = make_augmenter(name, device=images.device)
    random = _random(images.device)
    with _NoWaiting():
        for batch in range(4):
            augment.observe(augment(images, random).mean((1, 2, 3)))
            augment.adapt(64 * (batch + 1))
    with pytest.raises(AssertionError), _NoWaiting():
        float(augment.p)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shift,swirl", "Unknown augmentation 'swirl'; choose one of none, diffaugment, ada, shift"),
        ("ada,shift", "'ada' stands alone, not in a list; a list may hold shift, cutout, flip, color, translation"),
        ("flip,none", "'none' stands alone"),
        ("ada:speed=3", "Unknown option 'speed=3'"),
        ("ada:p=1.5", "Unknown option 'p=1.5'"),
        ("ada:p=nan", "Unknown option 'p=nan'"),
        ("ada:target", "Unknown option 'target'"),
        ("ada:p=0.5:target=0.6", "gives p and how p adapts"),
    ],
)
def test_a_slip_in_a_name_is_told(name: str, says: str):
    with pytest.raises(UserError, match=says):
        make_augmenter(name, device="cpu")
