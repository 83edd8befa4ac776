"""A weight that other parametrizations make before it is normalized: all that can be asked of it is of what they make.

They may have several parameters, as torch's weight normalization, or one of another shape.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm.transform.tracking import load_tracking_state, tracking_state


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 5 * (weight.triu() + weight.triu(1).mT)


class Reshaped(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return numbers.view(6, 6)


def weight_normalized() -> nn.Linear:
    return torch_parametrizations.weight_norm(nn.Linear(6, 6))


def symmetric() -> nn.Linear:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def from_vector() -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.randn(36))
    parametrize.register_parametrization(layer, "weight", Reshaped(), unsafe=True)
    return layer


@pytest.fixture(params=[weight_normalized, symmetric, from_vector])
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    return request.param()


def norm_of(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach(), 2).item()


def with_torchs(layer: nn.Linear) -> nn.Linear:
    torch_parametrizations.spectral_norm(layer)
    return layer


NORMALIZED_BY = {"ours": sn.spectral_norm, "torchs": lambda layer: sn.add_spectral_norm(with_torchs(layer))}


@pytest.mark.parametrize("normalized", NORMALIZED_BY.values(), ids=NORMALIZED_BY)
def test_new_layer_has_norm_one_in_evaluation(layer, normalized):
    assert norm_of(normalized(layer).eval().weight) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("update", ["forward", "manual"])
def test_other_updates_start_from_the_norm_of_what_is_normalized(layer, update):
    assert norm_of(sn.spectral_norm(layer, update=update).eval().weight) == pytest.approx(1, rel=1e-4)


def test_parametrization_that_is_not_registered_normalizes_what_the_layer_computes_with(layer):
    assert norm_of(sn.SpectralNorm(layer).eval().compute_weight(layer)) == pytest.approx(1, rel=1e-4)


def test_tables_tell_the_norm_that_is_divided_by(layer):
    divided_by = norm_of(layer.weight)
    model = nn.Sequential(sn.spectral_norm(layer))
    (row,) = sn.summary(model).rows
    assert sn.monitor(model) == pytest.approx({"0": divided_by}, rel=1e-4)
    assert (row.sigma, row.norm) == pytest.approx((divided_by, 1), rel=1e-4)
    assert row.shape == (6, 6)


def test_update_by_hand_follows_what_is_normalized(layer):
    sn.spectral_norm(layer, update="manual")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(200):
        sn.update_(layer)
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-3)


def test_update_that_is_written_out_is_a_step(layer):
    sn.spectral_norm(layer)
    before = [parameter.clone() for parameter in layer.parameters()]
    with torch.no_grad(), sn.optimizer_step(layer):
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    assert all(not torch.equal(*pair) for pair in zip(before, layer.parameters(), strict=True))
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-3)


def test_same_call_again_changes_the_coefficient(layer):
    model = nn.Sequential(sn.spectral_norm(layer))
    sn.add_spectral_norm(model, coefficient=2.0)
    assert norm_of(layer.eval().weight) == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("name", [None, "weight"])
def test_removal_keeps_the_function(layer, name):
    model, inputs = nn.Sequential(sn.spectral_norm(layer)).eval(), torch.eye(6)
    before = model(inputs)
    sn.remove_spectral_norm(layer if name else model, name)
    torch.testing.assert_close(model(inputs), before)
    assert type(layer) is nn.Linear
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_replica_of_data_parallel_has_the_weight(layer):
    sn.spectral_norm(layer).eval()
    assert layer._replicate_for_data_parallel().parametrizations is layer.parametrizations


def test_tracking_state_leaves_it_out(layer):
    model = nn.Sequential(sn.spectral_norm(layer), sn.spectral_norm(nn.Linear(6, 6)))
    state = tracking_state(model)
    assert {key.split("/")[0] for key in state} == {"1"}
    other = copy.deepcopy(model)
    load_tracking_state(other, state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in tracking_state(other).items())


def test_parameter_that_another_layer_uses_as_it_is_gets_a_normalization_of_its_own():
    layer, other = symmetric(), nn.Linear(6, 6)
    other.weight = layer.parametrizations.weight.original
    model = nn.Sequential(sn.spectral_norm(layer), other)
    sn.add_spectral_norm(model)
    assert other.parametrizations.weight[0] is not layer.parametrizations.weight[1]
    assert [norm_of(each.eval().weight) for each in model] == pytest.approx([1, 1], rel=1e-4)
