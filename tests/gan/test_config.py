import dataclasses
import json
import math

import pytest
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, config_from_json, config_to_json, differing_lines
from spectralnorm.gan.networks import build_discriminator
from spectralnorm.gan.recipes import RECIPES, make_config
from spectralnorm.linalg import ConvolutionGeometry, max_patches_per_pixel


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_survives_json(recipe: str):
    config = make_config(recipe)
    assert config.recipe == recipe
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hing"}, "Unknown loss 'hing' (did you mean hinge?); choose one of hinge, nonsaturating"),
        ({"architecture": "vgg"}, "Unknown architecture 'vgg'; choose one of dcgan, sncnn, sndcgan"),
        ({"normalization": "instance"}, "Unknown normalization 'instance'; choose one of spectral, strict, weight"),
        ({"normalization": "spectral:nrom=matrix"}, "normalization 'spectral' has no option 'nrom'; choose among"),
        ({"normalization": "spectral:norm"}, "normalization must read name or name:option=value"),
        ({"normalization": "spectral:eps=1,eps=2"}, "gives the option eps twice"),
        ({"normalization": "batch:eps=1"}, "'batch' takes no options"),
        ({"generator_normalization": "spectral:coefficient=-1"}, "coefficient"),
        ({"generator_optimizer": "adamm"}, "Unknown generator_optimizer 'adamm'; choose one of adadelta"),
        ({"discriminator_optimizer": "sgd:lr=1"}, "the step size is a setting of its own"),
        ({"discriminator_optimizer": "sgd:momentun=0.9"}, "has no option 'momentun'; choose among momentum"),
        ({"discriminator_optimizer": "sgd:momentum=-1"}, "cannot be: Invalid momentum value"),
        ({"conditional": True}, "'dcgan' has no form with labels; choose resnet or sagan"),
        ({"path_length_weight": 2.0}, "path_length_weight is for stylegan2"),
        ({"weight_clip": -0.1}, "weight_clip must be a number at least 0, got -0.1"),
        ({"loss": "relativistic", "generator_batch_size": 128}, "generator_batch_size must be left out or equal"),
        ({"penalty": "r3"}, "Unknown penalty 'r3'; choose one of r1, r2, r1-r2"),
        ({"penalty": "none"}, "or none (in Python: None)"),
        ({"penalty_interval": 0}, "penalty_interval must be a number at least 1, got 0"),
        ({"penalty_weight": -1.0}, "penalty_weight must be a number at least 0, got -1.0"),
        ({"device": "tpu"}, "choose one of auto, cpu, cuda"),
        ({"augmentation": "shift,swirl"}, "Unknown augmentation 'swirl'"),
        ({"image_size": 40}, "choose one of 32, 48, 64, 128"),
        ({"architecture": "sagan", "image_size": 48}, "Unknown image_size '48'; choose one of 32, 64, 128"),
        ({"channels": 4}, "choose one of 1, 3"),
        ({"batch_size": "many"}, "batch_size must be a number at least 2, got 'many'"),
        ({"batch_size": None}, "batch_size must be a number at least 2, got None"),
        ({"batch_size": -1}, "batch_size must be a number at least 2, got -1"),
        ({"generator_lr": float("nan")}, "generator_lr must be a number above 0, got nan"),
        ({"generator_lr": 0.0}, "generator_lr must be a number above 0"),
        ({"beta1": 1.0}, "beta1 must be a number at least 0 and below 1, got 1.0"),
        ({"lr_decay_from": 1.5}, "at least 0 and at most 1"),
        ({"minutes": float("inf")}, "minutes must be a number above 0, got inf"),
        ({"steps": 0}, "steps must be a number at least 1, got 0"),
        ({"seed": -3}, "seed must be a number at least 0"),
        ({"seed": 2**32}, "seed must be a number at least 0 and at most 4294967295, got 4294967296"),
        ({"seed": 10**400}, "seed must be a number at least 0 and at most 4294967295"),
        ({"steps": float("inf")}, "steps must be a number at least 1, got inf"),
        ({"latent_dim": 0}, "latent_dim"),
    ],
)
def test_a_bad_setting_is_refused_in_one_sentence(settings: dict, message: str):
    with pytest.raises(UserError) as error:
        make_config(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "adam"),
    # Miyato et al. 2018, Table 1: alpha, beta1, beta2, n_dis.
    [
        ("miyato-a", (1e-4, 0.5, 0.9, 5)),
        ("miyato-b", (1e-4, 0.5, 0.999, 1)),
        ("miyato-c", (2e-4, 0.5, 0.999, 1)),
        ("miyato-d", (1e-3, 0.5, 0.9, 5)),
        ("miyato-e", (1e-3, 0.5, 0.999, 5)),
        ("miyato-f", (1e-3, 0.9, 0.999, 5)),
        ("sncnn-cifar10", (2e-4, 0.5, 0.999, 1)),
    ],
)
def test_the_settings_of_the_paper_are_recipes(recipe: str, adam: tuple[float, float, float, int]):
    config = make_config(recipe)
    assert (config.generator_lr, config.beta1, config.beta2, config.num_discriminator_steps) == adam
    assert config.discriminator_lr == config.generator_lr
    assert config.architecture == "sncnn"


@pytest.mark.parametrize(
    ("recipe", "image_size", "falls_from", "steps", "generator_batch_size"),
    # Miyato et al. 2018 for CIFAR-10 and STL-10; the others as sn_cifar10.yml, sn_projection_64.yml and, for four
    # processes together, sn_projection.yml of pfnet-research/sngan_projection.
    [
        ("resnet-cifar10", 32, 0, 100_000, 128),
        ("projection-cifar10", 32, 0, 50_000, 128),
        ("resnet-stl48", 48, 0, 100_000, 128),
        ("resnet-64", 64, 200_000, 250_000, None),
        ("resnet-128", 128, 400_000, 450_000, 128),
    ],
)
def test_the_residual_networks_are_recipes_with_the_published_settings(
    recipe: str, image_size: int, falls_from: int, steps: int, generator_batch_size: int | None
):
    config = make_config(f"sngan-{recipe}")
    assert (config.architecture, config.image_size, config.loss) == ("resnet", image_size, "hinge")
    # Miyato et al. 2018, section 4.1 and Table 1, last row: alpha, beta1, beta2, n_dis.
    assert (config.generator_lr, config.beta1, config.beta2, config.num_discriminator_steps) == (2e-4, 0.0, 0.9, 5)
    assert config.discriminator_lr == config.generator_lr
    assert (config.batch_size, config.generator_batch_size) == (64, generator_batch_size)
    assert (round(config.lr_decay_from * steps), config.steps) == (falls_from, steps)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(UserError, match="steps and minutes are both missing"):
        Config()


def test_an_unknown_recipe_lists_the_choices():
    with pytest.raises(UserError, match=r"Unknown recipe 'fashoin' \(did you mean fashion\?\); choose one of fashion"):
        make_config("fashoin")


def test_a_given_budget_replaces_that_of_the_recipe():
    assert make_config("fashion", steps=20).minutes is None
    assert make_config("fashion", minutes=1.0).steps is None
    both = make_config("fashion", steps=20, minutes=1.0)
    assert (both.steps, both.minutes) == (20, 1.0)


def test_only_settings_that_change_the_training_differ():
    config = make_config(steps=10)
    longer = dataclasses.replace(config, steps=20, device="cpu", log_every=3)
    assert differing_lines(config, longer) == []
    other = dataclasses.replace(config, batch_size=32, loss="nonsaturating" if config.loss == "hinge" else "hinge")
    assert [line.partition(":")[0] for line in differing_lines(config, other)] == ["loss", "batch_size"]


def test_settings_of_a_newer_version_are_named():
    fields = json.loads(config_to_json(make_config()))
    with pytest.raises(UserError, match="warp"):
        config_from_json(json.dumps({**fields, "warp": 9}))


def test_a_damaged_config_is_told():
    with pytest.raises(UserError, match="not valid JSON"):
        config_from_json('{"loss": ')


def test_the_strict_recipe_allows_what_plain_normalization_promises():
    config = make_config("fashion-strict")
    layers = [layer for layer in build_discriminator(config).modules() if isinstance(layer, nn.Conv2d)]
    size, promised = (config.image_size,) * 2, 1.0
    for layer in layers:
        geometry = ConvolutionGeometry.of(layer)
        promised *= math.sqrt(max_patches_per_pixel(geometry, size))
        size = geometry.output_size(size)
    assert config.lipschitz == pytest.approx(promised, rel=1e-12)
