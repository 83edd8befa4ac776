from pathlib import Path

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.gan import load, make_config
from spectralnorm.gan.networks import build_generator
from spectralnorm.gan.pictures import encode_png, image_grid, save_png
from spectralnorm.gan.sampling import TrainedGenerator, save_generator


@pytest.fixture
def generator() -> TrainedGenerator:
    config = make_config("fashion", steps=1, architecture="dcgan", generator_width=4, latent_dim=8)
    return TrainedGenerator(build_generator(config), config, step=3, images_seen=192, training_seconds=1.5)


def test_samples_are_bytes_of_the_asked_number(generator: TrainedGenerator):
    samples = generator.sample(5, seed=0)
    assert samples.shape == (5, 1, 32, 32)
    assert samples.dtype == torch.uint8


def test_a_seed_names_its_images(generator: TrainedGenerator):
    assert torch.equal(generator.sample(4, seed=7), generator.sample(4, seed=7))
    assert not torch.equal(generator.sample(4, seed=7), generator.sample(4, seed=8))


def test_sampling_leaves_the_global_random_state_alone(generator: TrainedGenerator):
    before = torch.get_rng_state()
    generator.sample(4, seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_does_not_depend_on_its_batch(generator: TrainedGenerator):
    many, one = generator.sample(300, seed=1), generator.render(generator.latents(300, seed=1)[299:])
    assert (many[299:].int() - one.int()).abs().max() <= 1


def test_a_walk_begins_and_ends_at_its_latents(generator: TrainedGenerator):
    walks = generator.interpolate(rows=2, columns=5, seed=3).unflatten(0, (2, 5))
    ends = generator.render(generator.latents(4, seed=3))
    assert (walks[:, 0].int() - ends[:2].int()).abs().max() <= 1
    assert (walks[:, -1].int() - ends[2:].int()).abs().max() <= 1
    assert not torch.equal(walks[:, 1], walks[:, 2])


@pytest.mark.parametrize(("num", "seed"), [(0, 0), (-3, 0), (1, -1), (1, 2**63)])
def test_a_senseless_request_is_refused(generator: TrainedGenerator, num: int, seed: int):
    with pytest.raises(UserError, match=r"at least 1|seed must be"):
        generator.sample(num, seed=seed)


@pytest.fixture
def conditional() -> TrainedGenerator:
    config = make_config(
        "sngan-resnet-cifar10",
        steps=1,
        generator_width=4,
        latent_dim=8,
        conditional=True,
        class_names=("cat", "dog", "2"),
        class_counts=(1, 0, 3),
    )
    network = build_generator(config)
    for name, parameter in network.named_parameters():
        if "embed" in name or parameter.dim() == 2:  # fresh class weights are alike
            torch.nn.init.normal_(parameter)
    return TrainedGenerator(network, config)


@pytest.fixture
def styled() -> TrainedGenerator:
    config = make_config("fashion", steps=1, architecture="stylegan2", generator_width=4, latent_dim=8)
    network = build_generator(config)
    network.style_average.normal_()  # pyright: ignore[reportCallIssue]
    return TrainedGenerator(network, config)


def test_an_image_depends_on_its_own_seed_alone(generator: TrainedGenerator, conditional: TrainedGenerator):
    for trained in (generator, conditional):
        many, few = trained.sample(seeds=[5, 3, 9]), trained.sample(seeds=[9, 5])
        assert (many[[2, 0]].int() - few.int()).abs().max() <= 1
        assert not torch.equal(many[0], many[1])


def test_labels_choose_what_is_made(conditional: TrainedGenerator):
    dogs = conditional.sample(3, seed=1, labels="dog")
    assert torch.equal(dogs, conditional.sample(3, seed=1, labels=1))
    assert torch.equal(dogs, conditional.sample(3, seed=1, labels=torch.tensor([1, 1, 1])))
    assert not torch.equal(dogs, conditional.sample(3, seed=1, labels="cat"))
    mixed = conditional.sample(3, seed=1, labels=["cat", "dog", 2])
    assert (mixed[1].int() - dogs[1].int()).abs().max() <= 1


def test_labels_that_are_not_given_follow_the_training_data(conditional: TrainedGenerator):
    labels = conditional.draw_labels(2000, seed=4)
    assert labels is not None
    assert labels.unique().tolist() == [0, 2]
    assert abs((labels == 2).float().mean().item() - 0.75) < 6 * (0.75 * 0.25 / 2000) ** 0.5


def test_walks_keep_their_class(conditional: TrainedGenerator):
    rows = conditional.interpolate(2, 3, seed=1, labels=["cat", "dog"])
    cats = conditional.interpolate(2, 3, seed=1, labels="cat")
    assert (rows[:3].int() - cats[:3].int()).abs().max() <= 1
    assert not torch.equal(rows[3:], cats[3:])


def test_truncation_moves_stylegan2_to_its_mean_style(styled: TrainedGenerator):
    assert styled.truncates_styles
    images = [styled.sample(6, seed=2, truncation=psi).float() for psi in (1.0, 0.5, 0.0)]
    spreads = [batch.std(0).mean() for batch in images]
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] <= 0.5  # of rounding
    assert torch.equal(styled.sample(6, seed=2), images[0].to(torch.uint8))


def test_truncation_of_other_networks_is_that_of_their_latents(generator: TrainedGenerator):
    assert not generator.truncates_styles
    latents = generator.latents(50, seed=2, truncation=0.25)
    assert latents.abs().max() <= 0.5
    assert torch.equal(generator.sample(50, seed=2, truncation=0.25), generator.render(latents))
    assert torch.equal(generator.latents(50, seed=2), generator.latents(50, seed=2, truncation=1.0))


def test_a_walk_for_a_video_comes_back(generator: TrainedGenerator):
    frames = generator.walk(2, 8, stops=2, seed=3)
    assert frames.shape == (2, 8, 1, 32, 32)
    stops = generator.render(generator.latents(4, seed=3)).unflatten(0, (2, 2))
    assert (frames[:, ::4].int() - stops.int()).abs().max() <= 1
    # Two stops, there and back the same way.
    assert (frames[:, 3].int() - frames[:, 5].int()).abs().max() <= 1
    ends = generator.walk(2, 8, stops=2, seed=3, loop=False)[:, [0, -1]]
    assert (ends.int() - stops.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "Neither num nor seeds"),
        ({"num": 3, "seeds": [1, 2]}, "leave out num"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "seed must be"),
        ({"num": 2, "labels": 0}, "trained without labels"),
        ({"num": 2, "truncation": 0.0}, "truncation must be"),
        ({"num": 2, "truncation": 1.5}, "truncation must be"),
        ({"num": 2, "truncation": float("nan")}, "truncation must be"),
    ],
)
def test_a_slip_in_sampling_is_told(generator: TrainedGenerator, arguments: dict, says: str):
    with pytest.raises(UserError, match=says):
        generator.sample(**arguments)


def test_a_saved_generator_is_the_same_network(generator: TrainedGenerator, tmp_path: Path):
    save_generator(tmp_path / "generator.safetensors", generator)
    for place in (tmp_path, tmp_path / "generator.safetensors"):
        loaded = load(place)
        assert loaded.config == generator.config
        assert (loaded.step, loaded.images_seen, loaded.training_seconds) == (3, 192, 1.5)
        assert not loaded.training
        assert torch.equal(loaded.sample(3, seed=2), generator.sample(3, seed=2))


def test_missing_and_foreign_files_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no trained generator yet"):
        load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(tmp_path / "weights.safetensors")


def test_a_grid_tiles_row_after_row():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4)
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 4, 12)
    assert grid[0, ::2, ::4].tolist() == [[0, 1, 2], [3, 4, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_reads_back_exactly(channels: int, tmp_path: Path):
    from PIL import Image

    image = torch.randint(256, (channels, 6, 9), dtype=torch.uint8)
    save_png(tmp_path / "new" / "image.png", image)
    picture = Image.open(tmp_path / "new" / "image.png")
    assert picture.mode == {1: "L", 3: "RGB"}[channels]
    assert list(picture.tobytes()) == image.permute(1, 2, 0).flatten().tolist()
    assert encode_png(image) == (tmp_path / "new" / "image.png").read_bytes()
