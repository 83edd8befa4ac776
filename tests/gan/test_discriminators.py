"""The discriminator of a run or file, and the class that its certificate is for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spectralnorm import add_spectral_norm, certify
from spectralnorm.cli import main
from spectralnorm.errors import UserError
from spectralnorm.gan.discriminators import discriminator_of_file, of_steepest_class
from spectralnorm.gan.models.resnet import ProjectionHead, ResNetDiscriminator
from spectralnorm.gan.recipes import make_config
from spectralnorm.lipschitz import Certificate


class _Projection(nn.Module):
    """The head of `resnet` and `sagan` behind features that take no time."""

    def __init__(self, num_classes: int | None):
        super().__init__()
        self.features = nn.Linear(3, 6)
        self.head = ProjectionHead(6, num_classes=num_classes)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.features(inputs).relu(), labels)


def _projection(num_classes: int | None = 4) -> _Projection:
    torch.manual_seed(0)
    return _Projection(num_classes).eval()


def _resnet(num_classes: int | None = 4) -> ResNetDiscriminator:
    torch.manual_seed(0)
    return ResNetDiscriminator(image_size=32, channels=1, width=2, num_classes=num_classes).eval()


def _bound(model: nn.Module, num_classes: int) -> float:
    return certify(model, (3,), num_classes=num_classes, ascent_steps=0).upper_bound


def test_steepest_class_has_the_longest_sum_of_both_rows_and_not_the_longest_embedding():
    discriminator = _projection()
    with torch.no_grad():
        psi = discriminator.head.dense.weight[0]
        discriminator.head.embedding.weight.copy_(torch.stack([-2 * psi, 1.5 * psi, 0 * psi, psi]))

    model, num_classes = of_steepest_class(discriminator)

    assert num_classes == 1
    assert _bound(model, num_classes) == pytest.approx(_bound(discriminator, 4), rel=1e-9)


def test_steepest_class_is_that_of_the_weights_as_they_are_used():
    discriminator = _projection()
    with torch.no_grad():
        psi = 100 * discriminator.head.dense.weight[0]
        discriminator.head.dense.weight.copy_(psi[None])
        side = psi.roll(1) - (psi.roll(1) @ psi) / (psi @ psi) * psi
        discriminator.head.embedding.weight.copy_(torch.stack([0.02 * psi, side, -psi, 0 * psi]))
    add_spectral_norm(discriminator, include="head.dense").eval()

    model, num_classes = of_steepest_class(discriminator)

    assert _bound(model, num_classes) == pytest.approx(_bound(discriminator, 4), rel=1e-9)


def test_classes_that_rounding_cannot_tell_apart_are_all_certified():
    discriminator = _projection()
    with torch.no_grad():
        psi = discriminator.head.dense.weight[0].zero_()
        row = torch.randn_like(psi)
        discriminator.head.embedding.weight.copy_(torch.stack([row, -row, row, 0.5 * row]))

    model, num_classes = of_steepest_class(discriminator)

    assert num_classes == 2  # the third is the first
    assert _bound(model, num_classes) == pytest.approx(_bound(discriminator, 4), rel=1e-9)


def test_model_without_classes_has_no_steepest_one():
    with pytest.raises(UserError, match="no projection of classes"):
        of_steepest_class(_projection(None))


def _saved(discriminator: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in discriminator.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("recipe", ["sngan-projection-cifar10", "sngan-resnet-cifar10"])  # also with --conditional
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
def test_number_of_classes_is_that_of_the_file(normalized: bool, recipe: str, tmp_path: Path):
    discriminator = _resnet()
    if normalized:
        add_spectral_norm(discriminator).eval()
    path = _saved(discriminator, tmp_path / "weights.safetensors")

    loaded, config = discriminator_of_file(path, make_config(recipe, channels=1, discriminator_width=2))

    assert config.conditional
    assert config.class_names == ("0", "1", "2", "3")
    images, labels = torch.randn(4, 1, 32, 32), torch.arange(4)
    assert torch.allclose(loaded(images, labels), discriminator(images, labels), rtol=1e-4, atol=1e-6)


def test_file_of_a_conditional_recipe_is_certified(tmp_path: Path):
    path = _saved(_resnet(), tmp_path / "weights.safetensors")

    words = ["--recipe", "sngan-projection-cifar10", "--channels", "1", "--discriminator-width", "2"]
    assert main(["certify", str(path), *words]) == 0

    assert Certificate.from_json((tmp_path / "certificate.json").read_text()).upper_bound > 0


def test_file_without_classes_is_told_to_have_none(tmp_path: Path):
    path = _saved(_resnet(None), tmp_path / "weights.safetensors")

    with pytest.raises(UserError, match="no embedding of classes"):
        discriminator_of_file(path, make_config("sngan-projection-cifar10", channels=1, discriminator_width=2))
