"""Taking the normalization off: the model computes what it did before, whoever shares its weights."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import spectralnorm as sn
from spectralnorm import UserError, add_spectral_norm, remove_spectral_norm, spectral_norm
from spectralnorm.parametrizations import is_normalized

TOKENS = torch.tensor([3, 1, 4])


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


def with_plain_partner() -> nn.Sequential:
    model = tied()
    spectral_norm(model[1])
    return model


def with_two_coefficients() -> nn.Sequential:
    model = tied()
    spectral_norm(model[0], coefficient=0.5)
    spectral_norm(model[1], coefficient=2.0)
    return model


def with_partner_under(torchs) -> nn.Sequential:
    model = tied()
    spectral_norm(model[0], coefficient=0.5)
    torchs(model[1])
    return model.eval()


MODELS = {
    "plain partner": with_plain_partner,
    "two coefficients": with_two_coefficients,
    "P": lambda: with_partner_under(torch_parametrizations.spectral_norm),
    "O": lambda: with_partner_under(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_layers_that_compute_with_different_values_get_a_parameter_each(made, device):
    model = made().to(device)
    tokens = TOKENS.to(device)
    shared = next(model.parameters())
    before = [each.detach().clone() for each in (model[0](tokens), model(tokens))]
    with pytest.warns(UserWarning, match="shared a weight with .*own parameter now"):
        remove_spectral_norm(model)
    assert [torch.equal(*pair) for pair in zip((model[0](tokens), model(tokens)), before, strict=True)] == [True, True]
    parameters = list(model.parameters())
    assert len(parameters) == 2
    assert any(parameter is shared for parameter in parameters)
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in parameters)


def test_plain_partner_keeps_the_parameter_and_its_numbers():
    model = with_plain_partner()
    shared, raw = model[0].weight, model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="^1 shared a weight with 0, and computed with another value of it"):
        remove_spectral_norm(model)
    assert model[0].weight is shared
    assert torch.equal(shared, raw)


@pytest.mark.parametrize("options", [{"coefficient": 2.0}, {"mode": "learnable"}], ids=["normalize", "learnable"])
def test_layers_that_share_one_normalization_go_on_sharing(options):
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.tied = nn.Linear(4, 4, bias=False), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            for layer in self.tied:
                layer.weight = self.plain.weight

        def forward(self, inputs):
            return self.tied[1](self.tied[0](self.plain(inputs)))

    model = add_spectral_norm(Three(), include="tied.*", **options)
    before = model(torch.ones(1, 4))
    with pytest.warns(UserWarning, match=r"^tied\.0, tied\.1 shared a weight with plain"):
        remove_spectral_norm(model)
    assert torch.equal(model(torch.ones(1, 4)), before)
    assert model.tied[0].weight is model.tied[1].weight
    assert model.tied[0].weight is not model.plain.weight


@pytest.mark.parametrize("partner", [None, {"mode": "cap", "coefficient": 1e6}], ids=["plain", "another cap"])
def test_layers_that_compute_with_the_same_value_go_on_sharing(partner):
    model = tied()
    spectral_norm(model[1], mode="cap", coefficient=1e5)
    if partner is not None:
        spectral_norm(model[0], **partner)
    before = model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_spectral_norm(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model(TOKENS), before)


def test_recurrent_layer_gets_its_own():
    model = nn.ModuleDict({"cell": nn.Linear(4, 4), "rnn": nn.RNN(4, 4)})
    model["cell"].weight = model["rnn"].weight_hh_l0
    add_spectral_norm(model, include="rnn")
    inputs = torch.linspace(-1, 1, 24).view(3, 2, 4)
    before = model["cell"](inputs), model["rnn"](inputs)[0]
    with pytest.warns(UserWarning, match=r"^rnn\.weight_hh_l0 shared"):
        remove_spectral_norm(model)
    assert torch.equal(model["cell"](inputs), before[0])
    assert torch.equal(model["rnn"](inputs)[0], before[1])
    assert model["rnn"]._flat_weights[1] is model["rnn"].weight_hh_l0


def test_lazy_layer_that_was_loaded_computes_what_it_would_have():
    source = sn.spectral_norm(nn.Linear(5, 3), coefficient=2.0)
    model = sn.spectral_norm(nn.LazyLinear(3), coefficient=2.0)
    model.load_state_dict(source.state_dict())
    remove_spectral_norm(model)
    inputs = torch.ones(1, 5)
    torch.testing.assert_close(model(inputs), source(inputs))
    assert type(model) is nn.Linear
    assert not is_normalized(model)


def test_lazy_partner_that_has_not_run_goes_on_sharing():
    model = nn.Sequential(nn.LazyLinear(3, bias=False), nn.LazyLinear(3, bias=False))
    model[1].weight = model[0].weight
    add_spectral_norm(model, coefficient=2.0)
    model[0](torch.ones(1, 3))
    before = model[0](torch.ones(1, 3))
    remove_spectral_norm(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[1](torch.ones(1, 3)), before)


def test_layer_whose_options_never_fitted_is_left_plain():
    class Outer(nn.modules.lazy.LazyModuleMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.UninitializedParameter()

        def initialize_parameters(self, inputs):
            self.weight.materialize((3, inputs.shape[-1]))
            nn.init.ones_(self.weight)

        def forward(self, inputs):
            return nn.functional.linear(inputs, self.weight)

    layer = spectral_norm(Outer(), dim=2)
    with pytest.raises(IndexError):
        layer(torch.ones(1, 5))
    assert torch.equal(remove_spectral_norm(layer)(torch.ones(1, 5)), torch.full((1, 3), 5.0))


def test_weight_that_cannot_be_read_is_told_before_anything_is_changed():
    model = add_spectral_norm(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model[1].parametrizations.weight.original.data = torch.empty(0)  # as FSDP1 leaves it between uses
    with pytest.raises(UserError, match="summon_full_params"):
        remove_spectral_norm(model)
    assert all(is_normalized(layer) for layer in model)


class TestOneWeightByName:
    """The second argument of torch's function, with which code takes the normalizations of a recurrent layer off."""

    @pytest.fixture
    def layer(self) -> nn.LSTM:
        layer = nn.LSTM(4, 3, bidirectional=True)
        for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
            spectral_norm(layer, name, coefficient=0.5)
        return layer

    @pytest.mark.parametrize("by", ["position", "keyword"])
    def test_goes_and_the_others_stay(self, layer, by):
        inputs = torch.linspace(-1, 1, 24).view(3, 2, 4)
        before = layer(inputs)[0]
        if by == "position":
            assert remove_spectral_norm(layer, "weight_hh_l0") is layer
        else:
            remove_spectral_norm(layer, name="weight_hh_l0")
        assert [is_normalized(layer, name) for name in ("weight_hh_l0", "weight_hh_l0_reverse")] == [False, True]
        assert torch.equal(layer(inputs)[0], before)
        remove_spectral_norm(layer, "weight_hh_l0_reverse")
        assert type(layer) is nn.LSTM
        assert torch.equal(layer(inputs)[0], before)

    def test_that_is_not_normalized_is_refused_as_by_torch(self, layer):
        for module in (layer, nn.Linear(2, 2)):
            with pytest.raises(ValueError, match=r"'weight' of this (LSTM|Linear) is not normalized"):
                remove_spectral_norm(module, name="weight")
        assert is_normalized(layer, "weight_hh_l0")

    def test_is_that_of_the_layer_and_not_of_one_in_it(self):
        model = add_spectral_norm(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(UserError, match="of this Sequential"):
            remove_spectral_norm(model, "weight")
        assert is_normalized(model[0])

    def test_of_a_lazy_layer_waits_no_longer(self):
        layer = remove_spectral_norm(spectral_norm(nn.LazyLinear(3)), "weight")
        layer(torch.ones(1, 5))
        assert not is_normalized(layer)

    def test_that_shares_its_parameter_with_a_normalized_one_gets_its_own(self):
        layer = nn.ParameterDict({"a": torch.randn(3, 3)})
        layer["b"] = layer["a"]
        add_spectral_norm(layer, include=["a", "b"])
        before = layer["b"].detach().clone()
        with pytest.warns(UserWarning, match="^a shared a weight"):
            remove_spectral_norm(layer, "a")
        assert torch.equal(layer["b"], before)
        assert torch.equal(layer["a"], before)
