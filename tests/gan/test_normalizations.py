"""Normalizations by name, for both networks of every architecture."""

import dataclasses

import pytest
import torch
from tests.gan.test_models import NO_WEIGHTS
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.networks import build_discriminator, build_generator
from spectralnorm.gan.normalizations import NORMALIZATIONS, check_normalization, normalize
from spectralnorm.gan.trainer import Trainer
from spectralnorm.gan.weight_control import OrthonormalPenalty
from spectralnorm.gan.weight_norms import spectra

SMALL = Config(
    steps=2, batch_size=4, image_size=32, channels=1, generator_width=4, discriminator_width=4, latent_dim=8,
    device="cpu",
)  # fmt: skip


def _discriminator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(6, 5, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(20, 7), nn.LeakyReLU(), nn.Linear(7, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "largest"),
    [("spectral", 1.0), ("spectral:coefficient=0.5", 0.5), ("spectral:mode=cap,coefficient=100", None), ("none", None)],
)
def test_spectral_normalization_takes_the_options_of_the_layer(setting: str, largest: float | None):
    plain, network = spectra(_discriminator()), spectra(normalize(_discriminator(), setting))
    for layer, values in network.items():
        assert values[0] == pytest.approx(plain[layer][0] if largest is None else largest, rel=1e-3)


def test_strict_layers_never_exceed_one():
    assert all(values[0] <= 1 for values in spectra(normalize(_discriminator(), "strict")).values())


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("spectral:update=manual", "would never be renewed in training; choose update=step or forward"),
        ("spectral:n_power_iterations=x", "n_power_iterations must be a whole number, got 'x'"),
        ("spectral:n_power_iterations=1.5", "n_power_iterations must be a whole number, got 1.5"),
        ("strict:strict=false", "'strict' has no option 'strict'; choose among"),
        ("spectral:strict=maybe", "strict must be true or false, got 'maybe'"),
        ("spectral:norm=frobenius", "norm must be one of"),
        ("weight:dim=1", "takes no options"),
    ],
)
def test_an_option_that_cannot_be_is_told_in_one_sentence(setting: str, says: str):
    with pytest.raises(UserError, match=says):
        check_normalization("normalization", setting)


@pytest.mark.parametrize(
    ("setting", "kinds"), [("batch", ["BatchNorm2d", "BatchNorm1d"]), ("layer", ["GroupNorm", "LayerNorm"])]
)
def test_features_are_normalized_after_hidden_layers_but_the_first(setting: str, kinds: list[str]):
    network = normalize(_discriminator(), setting)
    after = [type(child[1]).__name__ for child in network if isinstance(child, nn.Sequential)]
    assert after == kinds
    assert isinstance(network[0], nn.Conv2d)
    assert isinstance(network[-1], nn.Linear)
    assert network(torch.randn(3, 1, 8, 8)).shape == (3, 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neither_the_first_layer_nor_the_logit_or_image_is_followed_by_a_normalization(architecture: str):
    config = _with(architecture, normalization="none", generator_normalization="none")
    colour = {} if ARCHITECTURES[architecture].makes_points else {"channels": 3}
    for build in (build_generator, build_discriminator):
        network = build(dataclasses.replace(config, **colour))
        ends = _layers(network)[0], _layers(network)[-1]
        normalize(network, "batch")
        followed = [each[0] for each in network.modules() if isinstance(each, nn.Sequential) and _is_followed(each)]
        assert followed
        assert not any(layer is end for layer in followed for end in ends)


def _layers(network: nn.Module) -> list[nn.Module]:
    return [each for each in network.modules() if isinstance(each, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]


def _is_followed(pair: nn.Sequential) -> bool:
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    return len(pair) == 2 and isinstance(pair[1], kinds) and not isinstance(pair[0], kinds)


def test_layer_normalization_does_not_mix_images():
    network = normalize(_discriminator(), "layer")
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(network(images)[:2], network(images[:2]))


def test_weight_normalization_keeps_the_function():
    images = torch.randn(3, 1, 8, 8)
    network = normalize(_discriminator(), "weight")
    torch.testing.assert_close(network(images), _discriminator()(images))
    assert sum("original0" in name for name, _ in network.named_parameters()) == 4


def test_the_orthonormal_penalty_is_the_distance_of_the_gram_matrix_from_the_identity():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(2, 4))
    kernel, matrix = network[0].weight.flatten(1), network[1].weight
    expected = (kernel @ kernel.T - torch.eye(3)).square().sum() + (matrix.T @ matrix - torch.eye(2)).square().sum()
    torch.testing.assert_close(OrthonormalPenalty(network)(), expected)
    nn.init.orthogonal_(network[0].weight)
    nn.init.orthogonal_(network[1].weight)
    assert OrthonormalPenalty(network)().item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("setting", [name for name in NORMALIZATIONS if name != "strict"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_a_step_with_every_normalization_of_its_discriminator(
    architecture: str, setting: str, device: torch.device
):
    _take_steps(_with(architecture, normalization=setting), device)


@pytest.mark.parametrize("setting", ["spectral", "weight"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_weights_of_every_generator_are_normalized(architecture: str, setting: str, device: torch.device):
    trainer = _take_steps(_with(architecture, generator_normalization=setting), device)
    parameters = dict(trainer.generator.named_parameters())
    weights = [name for name, each in parameters.items() if each.ndim > 1 and name not in NO_WEIGHTS]
    assert all(".parametrizations." in f".{name}" for name in weights)


@pytest.mark.parametrize("setting", ["strict", "batch", "layer"])
def test_the_generator_of_stylegan2_takes_what_is_made_for_other_layers(setting: str, device: torch.device):
    _take_steps(_with("stylegan2", generator_normalization=setting), device)


def _with(architecture: str, **settings: str) -> Config:
    if ARCHITECTURES[architecture].makes_points:
        settings |= {"data": "toy-ring"}
        return dataclasses.replace(SMALL, architecture=architecture, image_size=1, channels=2, **settings)
    return dataclasses.replace(SMALL, architecture=architecture, **settings)


def _take_steps(config: Config, device: torch.device) -> Trainer:
    images = torch.randint(256, (40, config.channels, config.image_size, config.image_size), dtype=torch.uint8)
    torch.manual_seed(0)
    trainer = Trainer(
        config,
        generator=build_generator(config),
        discriminator=build_discriminator(config),
        images=images,
        device=device,
    )
    before = [parameter.detach().clone() for parameter in trainer.discriminator.parameters()]
    trainer.run([])
    after = list(trainer.discriminator.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in [*after, *trainer.generator.parameters()])
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return trainer
