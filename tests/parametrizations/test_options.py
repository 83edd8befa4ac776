"""Changing the options of a normalization that is there."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectralnorm import SpectralNorm, UserError, add_spectral_norm, spectral_norm
from spectralnorm.parametrizations import engine, normalization_of


def norm_of(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight, 2).item()


def layer_of(**options) -> tuple[nn.Linear, SpectralNorm]:
    layer = spectral_norm(nn.Linear(40, 30), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(30, 40))  # the buffers keep the vectors of what was there before
    normalization = normalization_of(layer)
    assert normalization is not None
    return layer, normalization


@pytest.mark.parametrize("update", ["step", "forward", "manual"])
def test_coefficient_scales_what_is_computed(update):
    layer, normalization = layer_of(update=update)
    before = layer.eval().weight.detach().clone()
    normalization.coefficient = 3.0
    torch.testing.assert_close(layer.weight, 3 * before)
    normalization.set_options(coefficient=1)
    torch.testing.assert_close(layer.weight, before)


def test_mode_is_changed_and_changed_back():
    layer, normalization = layer_of()
    normalization.set_options(mode="cap", coefficient=1e6)
    torch.testing.assert_close(layer.weight, layer.parametrizations.weight.original)
    normalization.set_options(mode="normalize")
    assert norm_of(layer.weight) == pytest.approx(1e6, rel=1e-4)


@pytest.mark.parametrize("changes", [{"coefficient": 2.0}, {"mode": "cap"}, {"n_power_iterations": 3}, {}])
def test_cheap_change_does_not_look_for_the_norm_again(changes, monkeypatch):
    layer, normalization = layer_of()
    layer(torch.ones(40))
    vectors = normalization._u.clone()
    monkeypatch.setattr(SpectralNorm, "refined", lambda *_, **__: pytest.fail("the norm was computed anew"))
    monkeypatch.setattr(engine, "refresh_together", lambda *_, **__: pytest.fail("the norm was followed"))
    normalization.set_options(**changes)
    layer(torch.ones(40)).sum().backward()
    assert norm_of(layer.weight) == pytest.approx(changes.get("coefficient", 1), rel=1e-4)
    assert torch.equal(normalization._u, vectors)


def test_change_between_step_and_use_goes_on_from_the_same_vectors():
    layer, normalization = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    layer(torch.ones(40)).sum().backward()
    optimizer.step()
    normalization.set_options(coefficient=2.0)
    assert norm_of(layer.weight) == pytest.approx(2, rel=1e-3)
    assert normalization._kept.age == 1


def test_write_into_the_weight_is_not_lost_by_a_change():
    layer, normalization = layer_of()
    nn.init.constant_(layer.weight, 3.0)
    normalization.set_options(coefficient=2.0)
    assert norm_of(layer.weight) == pytest.approx(2, rel=1e-4)
    torch.testing.assert_close(layer.parametrizations.weight.original.detach(), torch.full((30, 40), 3.0))


@pytest.mark.parametrize("before", ["step", "forward", "manual"])
@pytest.mark.parametrize("after", ["step", "forward", "manual"])
def test_update_rule_is_changed_without_a_jump(before, after):
    layer, normalization = layer_of()
    normalization.set_options(update=before)
    layer.eval()
    weight = layer.weight.detach().clone()
    normalization.set_options(update=after)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-4, atol=1e-6)
    assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
    fresh = spectral_norm(nn.Linear(40, 30), update=after)
    assert (normalization._kept is None) == (normalization_of(fresh)._kept is None)


def test_norm_up_to_a_larger_eps_counts_as_zero():
    layer, normalization = layer_of()
    normalization.set_options(eps=1e9)
    torch.testing.assert_close(layer.weight, layer.parametrizations.weight.original)


def test_graph_from_before_a_change_stays_usable():
    layer, normalization = layer_of()
    loss = layer(torch.ones(40)).square().sum()
    normalization.set_options(coefficient=7.0)
    other = spectral_norm(nn.Linear(40, 30))
    other.load_state_dict(layer.state_dict())
    loss.backward()
    other(torch.ones(40)).square().sum().backward()
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad, other.parametrizations.weight.original.grad, rtol=1e-3, atol=1e-5
    )


def test_vector_takes_another_coefficient():
    layer = spectral_norm(nn.Linear(2, 3), "bias")
    normalization_of(layer, "bias").set_options(coefficient=2.0)
    assert layer.bias.norm().item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficient": 2.0, "mode": "halve"}, "mode must be one of"),
        ({"coefficient": 0}, "coefficient must be a positive number, got 0"),
        ({"mode": "cap", "update": "never"}, "update must be one of"),
        ({"n_power_iterations": 0}, "n_power_iterations must be an integer of at least 1"),
        ({"strict": True}, "strict cannot be changed from False to True in place"),
    ],
)
def test_refused_change_changes_nothing(changes, message):
    layer, normalization = layer_of()
    before = layer.weight.detach().clone()
    with pytest.raises(UserError, match=message):
        normalization.set_options(**changes)
    assert torch.equal(layer.weight, before)
    assert (normalization.coefficient, normalization.mode, normalization.update) == (1, "normalize", "step")


INTEGER, POSITIVE = "n_power_iterations must be an integer of at least 1, got ", "must be a positive number, got "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_power_iterations": 1.5}, INTEGER + "1.5"),
        ({"n_power_iterations": "2"}, INTEGER + "'2'"),
        ({"n_power_iterations": None}, INTEGER + "None"),
        ({"n_power_iterations": True}, INTEGER + "True"),
        ({"eps": "1e-3"}, POSITIVE + "'1e-3'"),
        ({"eps": None}, POSITIVE + "None"),
        ({"eps": math.inf}, POSITIVE + "inf"),
        ({"coefficient": True}, POSITIVE + "True"),
        ({"coefficient": {"*": 1.0}}, POSITIVE),
        ({"dim": 1.5}, "dim must be None or an integer, the weight's output dimension, got 1.5"),
        ({"dim": "0"}, "dim must be None or an integer, the weight's output dimension, got '0'"),
        ({"input_size": (8, 8)}, r"input_size is for convolutions with strict=True or norm=\"operator\""),
        ({"input_size": (8, 8), "strict": True}, "not for 'weight' of this Linear with strict=True"),
    ],
    ids=lambda each: str(each) if isinstance(each, dict) else "",
)
def test_slip_is_named(options, message):
    with pytest.raises(UserError, match=message):
        spectral_norm(nn.Linear(3, 2), **options)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear, "got the class Linear; make one of it first"),
        ("layer", r"takes a torch\.nn\.Module, got str\."),
        (None, "got NoneType"),
        ([nn.Linear(2, 2)], r"got list; put layers into a torch\.nn\.ModuleList"),
    ],
    ids=["class", "string", "None", "list"],
)
@pytest.mark.parametrize("normalize", [spectral_norm, add_spectral_norm])
def test_what_is_no_module_is_refused(normalize, module, message):
    with pytest.raises(UserError, match=message):
        normalize(module)


def test_input_size_of_other_axes_is_refused():
    with pytest.raises(UserError, match="input_size must have one integer for each of 2 axes"):
        spectral_norm(nn.Conv2d(2, 3, 3), strict=True, input_size=(8,))


def test_numbers_of_numpy_are_numbers():
    layer = spectral_norm(
        nn.Conv2d(2, 3, 3),
        n_power_iterations=np.int64(2),
        eps=np.float32(1e-6),
        dim=np.int32(0),
        coefficient=np.float32(2),
        strict=True,
        input_size=[np.int64(8), 8],
    )
    found = normalization_of(layer)
    found.set_options(coefficient=np.float16(0.5), n_power_iterations=np.int8(1), input_size=[8, 8])
    values = (found.n_power_iterations, found.eps, found.coefficient, found.input_size)
    assert [type(value) for value in (*values[:3], *found.input_size)] == [int, float, float, int, int]
    assert values == (1, pytest.approx(1e-6), 0.5, (8, 8))


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'coeficient'"):
        spectral_norm(nn.Linear(2, 2), coeficient=2.0)
