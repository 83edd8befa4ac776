"""What is certified is what `forward` computes with the weights that the layers use."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectralnorm as sn
from spectralnorm.lipschitz.text import text_above, text_below


def test_chain_is_bounded_by_the_product_of_its_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh()).double()
    norms = [torch.linalg.matrix_norm(model[at].weight, 2).item() for at in (0, 2)]

    certificate = sn.certify(model, (4,))

    assert certificate.upper_bound == pytest.approx(norms[0] * norms[1], rel=1e-6)
    assert certificate.upper_bound >= norms[0] * norms[1]
    assert 0 < certificate.lower_bound <= certificate.upper_bound


def test_weights_are_those_that_a_parametrized_layer_uses():
    ours = sn.spectral_norm(nn.Linear(6, 6))
    theirs = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6), n_power_iterations=100)
    model = nn.Sequential(ours, nn.ReLU(), theirs).eval()

    certificate = sn.certify(model, (6,))

    norms = [torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item() for layer in (ours, theirs)]
    assert certificate.upper_bound == pytest.approx(norms[0] * norms[1], rel=1e-6)


def test_model_stays_as_it_is():
    model = nn.Sequential(sn.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    sn.certify(model, (4,))

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any("forward" in vars(module) for module in model.modules())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, inputs):
        return inputs + torch.tanh(self.branch(inputs))


def test_residual_is_one_plus_its_branch():
    model = Residual()
    norm = torch.linalg.matrix_norm(model.branch.weight.detach().double(), 2).item()

    assert sn.certify(model, (4,)).upper_bound == pytest.approx(1 + norm, rel=1e-6)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(F.relu(self.layer(inputs)))


def test_layer_that_is_used_twice_counts_twice():
    model = Shared()
    norm = torch.linalg.matrix_norm(model.layer.weight.detach().double(), 2).item()

    certificate = sn.certify(model, (4,))

    assert certificate.upper_bound == pytest.approx(norm**2, rel=1e-6)
    assert [line.name for line in certificate.layers] == ["layer", "relu", "layer (2)"]


def test_concatenation_is_the_root_of_the_sum_of_squares():
    class Both(nn.Module):
        def forward(self, inputs):
            return torch.cat([2 * inputs.abs(), 3 * torch.tanh(inputs)], dim=1)

    assert sn.certify(Both(), (4,)).upper_bound == pytest.approx(13**0.5, rel=1e-12)


@dataclass(frozen=True)
class Outputs:
    first: torch.Tensor
    others: tuple
    name: str = "outputs"


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


class Returning(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.make = make

    def forward(self, inputs):
        return self.make(inputs)


RETURNED = {
    "dataclass": (lambda x: Outputs(3 * x, (4 * x.tanh(), None)), 5),
    "dataclass that is passed on": (lambda x: (lambda outputs: outputs.first)(Outputs(2 * x, ())), 2),
    "named tuple": (lambda x: Pair(3 * x, 4 * x.tanh()), 5),
    "named tuple with nothing": (lambda x: Pair(3 * x, None), 3),
    "dictionary": (lambda x: {"a": [3 * x], "b": {"c": 4 * x.tanh()}, "d": 1.0}, 5),
    "same twice": (lambda x: (x, x), 2**0.5),
    "same three times": (lambda x: {"a": x, "b": [x, x]}, 3**0.5),
    "tensor that does not depend on the input": (lambda x: torch.ones(len(x), 2), 0),
}


@pytest.mark.parametrize("name", RETURNED)
def test_all_that_is_returned_counts(name: str):
    make, constant = RETURNED[name]

    certificate = sn.certify(Returning(make), (4,))

    assert certificate.upper_bound == pytest.approx(constant, rel=1e-12)
    assert certificate.lower_bound == pytest.approx(constant, rel=1e-2)


def test_certificate_survives_json_exactly():
    certificate = sn.certify(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (3,))

    assert sn.Certificate.from_json(certificate.to_json()) == certificate
    with pytest.raises(sn.UserError, match="JSON of a certificate"):
        sn.Certificate.from_json("{}")


def test_table_has_a_line_for_every_layer():
    lines = str(sn.certify(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (3,))).splitlines()

    assert [line.split()[:3] for line in lines if line.startswith(("0", "1"))] == [
        ["0", "linear", "3"],
        ["1", "relu", "3"],
    ]


def test_picture_has_a_bar_for_each_bound(tmp_path: Path):
    certificate = sn.certify(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), (3,))

    path = certificate.draw(tmp_path / "bounds.svg")

    titles = [element.text for element in ElementTree.parse(path).getroot().iter() if element.tag.endswith("title")]
    first, _, last = certificate.layers
    assert f"0: at most {text_above(first.upper)}" in titles
    assert f"2: at least {text_below(last.lower)}" in titles
    assert len(titles) == 5
    with pytest.raises(sn.UserError, match=r"ends in .svg"):
        certificate.draw(tmp_path / "bounds.png")
    with pytest.raises(sn.UserError, match=r"Cannot write .*choose another path"):
        certificate.draw(tmp_path / "nowhere" / "bounds.svg")


@pytest.mark.parametrize("name", ["dcgan", "sncnn"])
def test_shipped_discriminators_certify_with_and_without_their_normalization(name: str):
    from spectralnorm.gan.models import ARCHITECTURES

    model = sn.add_spectral_norm(ARCHITECTURES[name].discriminator(image_size=32, channels=3, width=4)).eval()
    kept = sn.certify(model, (3, 32, 32), ascent_steps=5)
    baked = sn.certify(sn.remove_spectral_norm(model), (3, 32, 32), ascent_steps=5)

    assert kept.layers == baked.layers
    assert 0 < kept.lower_bound <= kept.upper_bound < math.inf
    for line in kept.layers:
        assert line.gap is None or 1 <= line.gap < 1.3


def test_bound_for_all_sizes_is_not_below_that_for_one():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())

    given, every = (sn.certify(model, (2, 8, 8), input_sizes=sizes, ascent_steps=0) for sizes in ("given", "all"))

    assert given.upper_bound <= every.upper_bound <= 1.5 * given.upper_bound
    assert "every image size" in str(every)
