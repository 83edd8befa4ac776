"""`summary`, `monitor`, `invalidate`, `update_` and the walk that they share."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import spectralnorm as sn
from spectralnorm.transform import normalized_weights


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    with torch.no_grad():
        layers[0].weight.copy_(torch.eye(4, 3) * 5)
    return layers


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(4).view(2, 2), requires_grad=False)


class TestSummary:
    def test_rows_tell_what_is_normalized_and_why_the_rest_is_not(self):
        layers = sn.add_spectral_norm(model(), exclude="2.*", coefficient=2.0)
        first, batch_norm, last = sn.summary(layers).rows
        assert (first.layer, first.kind, first.shape, first.note) == ("0", "Linear", (4, 3), "normalize to 2")
        assert first.sigma == pytest.approx(5)
        assert first.norm == pytest.approx(2)
        assert (batch_norm.sigma, batch_norm.norm) == (None, None)
        assert batch_norm.note == "a vector, not a matrix"
        assert (last.layer, last.note) == ("2.0", "not normalized")

    def test_prints_as_a_table(self):
        lines = str(sn.summary(sn.add_spectral_norm(model()))).splitlines()
        assert lines[0].split() == ["layer", "type", "shape", "sigma", "norm"]
        assert lines[1].split()[:5] == ["0", "Linear", "4x3", "5.000", "1.000"]
        assert lines[-1] == "2 of 3 weights normalized"

    def test_leaves_buffers_and_values_alone(self):
        layers = sn.add_spectral_norm(model())
        before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
        sn.summary(layers)
        for name, tensor in layers.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_norm_is_measured_and_not_assumed(self):
        layer = sn.spectral_norm(nn.Linear(30, 30), update="manual")
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(torch.randn(30, 30))
        (row,) = sn.summary(layer).rows
        expected = torch.linalg.matrix_norm(layer.weight, 2).item()
        assert row.norm == pytest.approx(expected, rel=1e-4)
        assert row.norm > 1.01

    def test_names_what_stands_in_the_way(self):
        layers = nn.Sequential(
            torch_parametrizations.orthogonal(nn.Linear(3, 3)),
            torch_parametrizations.weight_norm(nn.Linear(3, 2)),
            nn.ParameterList([torch.ones(()), torch.ones(2, 2), torch.ones(0, 2)]),
            Integers(),
            nn.ParameterList([nn.UninitializedParameter()]),
        )
        assert [row.note for row in sn.summary(sn.add_spectral_norm(layers)).rows] == [
            "is parametrized already, by _Orthogonal",
            "is parametrized already, by _WeightNorm",
            "is a single number",
            "not a known weight of ParameterList; include can name it",
            "is empty",
            "holds torch.int64, not real or complex numbers",
            "has no shape yet: run one forward first",
        ]

    def test_model_without_weights(self):
        assert str(sn.summary(nn.ReLU())).endswith("0 of 0 weights normalized")


class TestMonitor:
    def test_gives_the_norm_of_each_raw_weight(self, device):
        found = sn.monitor(sn.add_spectral_norm(model().to(device)))
        assert list(found) == ["0", "2.0"]
        assert found["0"] == pytest.approx(5)

    def test_model_without_normalized_weights(self):
        assert sn.monitor(model()) == {}

    def test_follows_the_weight(self):
        layers = sn.add_spectral_norm(model())
        with torch.no_grad():
            layers[0].parametrizations.weight.original.mul_(2)
        assert sn.monitor(layers)["0"] == pytest.approx(10)

    @pytest.mark.parametrize("update", ["forward", "manual"])
    def test_works_for_every_update_rule(self, update):
        assert sn.monitor(sn.add_spectral_norm(model(), update=update))["0"] == pytest.approx(5)

    def test_vector_has_its_length(self):
        layer = sn.spectral_norm(nn.Linear(2, 3), "bias")
        expected = layer.parametrizations.bias.original.norm().item()
        assert sn.monitor(layer) == pytest.approx({"bias": expected})


def test_walk_names_layers_and_weights():
    layers = sn.add_spectral_norm(model())
    sn.spectral_norm(layers[0], "bias")
    found = [(name, tensor_name) for name, _, tensor_name, _ in normalized_weights(layers)]
    assert found == [("0", "weight"), ("0.bias", "bias"), ("2.0", "weight")]


def test_invalidate_makes_a_hidden_write_seen():
    layers = sn.add_spectral_norm(model())
    layers[0].parametrizations.weight.original.data.mul_(-3)
    sn.invalidate(layers)
    assert sn.monitor(layers)["0"] == pytest.approx(15)
    torch.testing.assert_close(layers[0].weight, torch.eye(4, 3) * -1)


def test_update_advances_a_weight_that_has_not_changed():
    layer = sn.spectral_norm(nn.Linear(30, 30))
    before = layer.weight.detach()
    sn.update_(layer)
    assert layer.weight.data_ptr() != before.data_ptr()
    torch.testing.assert_close(layer.weight, before, rtol=1e-4, atol=1e-5)


def test_update_advances_a_weight_that_layers_share_once():
    weight, change = torch.randn(30, 30), torch.randn(30, 30)
    vectors = []
    for num_layers in (1, 2):
        layers = nn.Sequential(*(nn.Linear(30, 30) for _ in range(num_layers)))
        layers[0].weight = layers[-1].weight = nn.Parameter(weight.clone())
        sn.add_spectral_norm(layers, update="manual")
        with torch.no_grad():
            layers[0].parametrizations.weight.original.add_(change)
        sn.update_(layers)
        vectors.append(layers[0].parametrizations.weight[0]._u)
    assert torch.equal(*vectors)


def test_a_name_that_the_library_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'spectralnorm' has no attribute 'nothing'"):
        sn.nothing  # noqa: B018
