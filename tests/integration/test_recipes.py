"""Every recipe at its image size, narrow and with small batches: it trains, saves, goes on, samples, and certifies or
says why it cannot."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralnorm import certify
from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.data import ImageSet, from_tensors
from spectralnorm.gan.discriminators import discriminator_of_run, of_steepest_class
from spectralnorm.gan.inputs import prepare_data
from spectralnorm.gan.recipes import RECIPES, make_config
from spectralnorm.gan.run import train
from spectralnorm.gan.sampling import load
from spectralnorm.gan.trainer import Trainer
from spectralnorm.lipschitz import Certificate

# Networks of which no Lipschitz constant is known: what the refusal names.
UNCERTIFIED = {"sagan-128": "matmul"}


def _small(recipe: str) -> Config:
    config = make_config(recipe, device="cpu", steps=20, log_every=10, num_sample_grids=1, num_evaluations=1)
    width = 4 if config.architecture != "points" else 8
    changes: dict = {"generator_width": width, "discriminator_width": width, "batch_size": 2}
    if config.architecture == "r3gan":
        changes["latent_dim"] = 8
    if config.architecture == "stylegan2":
        changes["latent_dim"] = 16
    if config.generator_batch_size is not None:
        changes["generator_batch_size"] = 4
    return dataclasses.replace(config, **changes)


def _images(config: Config) -> ImageSet:
    if config.architecture == "points":
        return prepare_data(config)
    random = torch.Generator().manual_seed(0)
    shape = (40, config.channels, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    return from_tensors(images, torch.arange(40) % 3, image_size=config.image_size, channels=config.channels)


def _is_large(recipe: str) -> bool:
    return make_config(recipe).image_size > 64


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=[pytest.mark.slow] * _is_large(recipe)) for recipe in RECIPES]
)
def test_a_recipe_trains_goes_on_samples_and_certifies_or_says_why_not(recipe: str, tmp_path: Path):
    config, folder = _small(recipe), tmp_path / "run"
    images = _images(config)
    first = train(config, out=folder, data=images, observers=[_stop_at_16])
    second = train(config, out=folder, data=images)
    assert (first.step, first.reason) == (16, "interrupted")
    assert (second.step, second.reason) == (20, "steps")
    generator = load(folder)
    samples = generator.sample(3, seed=1)
    assert samples.shape == (3, config.channels, config.image_size, config.image_size)
    assert torch.equal(samples, load(folder).sample(3, seed=1))
    assert len(samples.flatten(1).unique(dim=0)) == 3

    discriminator, config, _ = discriminator_of_run(folder)
    shape = (config.channels, config.image_size, config.image_size)
    model, num_classes = of_steepest_class(discriminator) if config.conditional else (discriminator, None)
    # For all sizes of images and with a short search, where that takes a minute less.
    options = {"input_sizes": "all", "ascent_steps": 2} if _is_large(recipe) else {}
    found = _certificate(model, shape, num_classes=num_classes, **options)
    if recipe in UNCERTIFIED:
        assert isinstance(found, str)
        assert UNCERTIFIED[recipe] in found
    else:
        assert isinstance(found, Certificate)
        assert 0 < found.lower_bound <= found.upper_bound < float("inf")
        if config.normalization == "strict" and config.lipschitz is not None:
            assert found.upper_bound <= config.lipschitz
        if config.conditional:
            every = certify(discriminator, shape, num_classes=len(config.class_names), ascent_steps=0)
            assert found.upper_bound == pytest.approx(every.upper_bound, rel=1e-9)


def _stop_at_16(trainer: Trainer) -> None:
    if trainer.step == 16:
        trainer.request_stop("interrupted")


def _certificate(model: torch.nn.Module, shape: tuple[int, int, int], **options: Any) -> Certificate | str:
    try:
        return certify(model, shape, **options)
    except UserError as error:
        return str(error)
