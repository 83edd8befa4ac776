"""Options of a whole model: per layer, and changed by a second call."""

import re

import pytest
import torch
from torch import nn

import spectralnorm as sn
from spectralnorm import UserError, add_spectral_norm, summary
from spectralnorm.transform import normalized_weights


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
        self.rnn = nn.LSTM(4, 5)
        self.attention = nn.MultiheadAttention(5, 1)
        self.mixing = nn.Parameter(torch.randn(5, 5))
        self.gain = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 2)

    def forward(self, inputs):
        hidden = self.rnn(self.stem(inputs).permute(2, 0, 1))[0]
        return self.head(self.attention(hidden, hidden, hidden)[0] @ self.mixing * self.gain)


INPUTS = torch.linspace(-1, 1, 42).view(2, 3, 7)
DEFAULT = [
    "stem.0",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "attention.in_proj_weight",
    "attention.out_proj",
    "head",
]


def coefficients(model: nn.Module) -> dict[str, float]:
    """The norms of the weights in use, found by SVD."""
    return {
        name: round(torch.linalg.matrix_norm(getattr(module, tensor_name).flatten(1), 2).item(), 3)
        for name, module, tensor_name, _ in normalized_weights(model)
    }


class TestWhichWeights:
    def test_every_known_weight_and_nothing_else_by_default(self):
        assert list(coefficients(add_spectral_norm(Mixed()))) == DEFAULT

    @pytest.mark.parametrize(
        ("include", "expected"),
        [
            ("rnn", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
            ("*.weight_hh_*", ["rnn.weight_hh_l0"]),
            ("attention*", ["attention.in_proj_weight", "attention.out_proj"]),
            ("mixing", ["mixing"]),
            ("*.mixing", ["mixing"]),
            (["head", "mixing"], ["mixing", "head"]),
            ("gain", ["gain"]),
            ("stem.1.weight", ["stem.1"]),
            ("*.weight", ["stem.0", "attention.out_proj", "head"]),
            ("stem*", ["stem.0"]),
            ("*", DEFAULT),
        ],
    )
    def test_globs_name_layers_and_weights(self, include, expected):
        model = Mixed()
        add_spectral_norm(model, include=include)
        assert sorted(name for name, *_ in normalized_weights(model)) == sorted(expected)

    def test_every_glob_of_several_has_to_match(self):
        with pytest.raises(
            UserError, match=r"include='haed' matches no layer.*by their full names also: mixing, gain, stem\.1\.weight"
        ):
            add_spectral_norm(Mixed(), include=["head", "haed"])

    def test_predicate_that_takes_nothing_is_refused(self):
        with pytest.raises(UserError, match="include matches no layer"):
            add_spectral_norm(Mixed(), include=lambda name, layer: False)

    def test_exclude_that_matches_nothing_is_refused(self):
        model = Mixed()
        with pytest.raises(
            UserError, match=r"exclude='haed' matches no layer; those that can be .* are: stem\.0, rnn\."
        ):
            add_spectral_norm(model, exclude=["head", "haed"])
        assert list(normalized_weights(model)) == []

    @pytest.mark.parametrize("option", ["include", "exclude"])
    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (nn.Linear, r"got the class Linear; .* \w+=lambda name, layer: isinstance\(layer, Linear\)"),
            (5, "must be a glob, a list of globs or predicate"),
            ([5], "must be a glob, a list of globs or predicate"),
            (re.compile("head"), r"lambda name, layer: re\.search\(pattern, name\)"),
        ],
        ids=["class", "number", "list of numbers", "regular expression"],
    )
    def test_what_is_no_pattern_is_refused(self, option, pattern, message):
        with pytest.raises(UserError, match=f"^{option} .*{message}"):
            add_spectral_norm(Mixed(), **{option: pattern})

    def test_weight_can_be_excluded_from_its_layer(self):
        model = add_spectral_norm(Mixed(), exclude=["*.weight_ih_l0", "attention.out_proj"])
        assert list(coefficients(model)) == [DEFAULT[0], DEFAULT[2], DEFAULT[3], DEFAULT[5]]

    def test_named_weight_that_cannot_be_normalized_is_refused_with_the_reason(self):
        model = nn.ParameterDict({"scale": torch.ones(())})
        with pytest.raises(UserError, match="scale is a single number"):
            add_spectral_norm(model, include="scale")

    def test_parameters_in_lists_can_be_named(self):
        model = nn.ModuleDict({"bank": nn.ParameterList([torch.randn(3, 4) for _ in range(3)])})
        add_spectral_norm(model, include=["bank.0", "bank.2"])
        norms = [torch.linalg.matrix_norm(matrix, 2).item() for matrix in model["bank"]]
        assert norms[0] == pytest.approx(1, rel=1e-4)
        assert norms[1] > 1.1
        assert norms[2] == pytest.approx(1, rel=1e-4)


class TestLayerAtTwoPlaces:
    """It has two names, and each of them is meant."""

    @staticmethod
    def made() -> nn.ModuleDict:
        encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        return nn.ModuleDict({"encoder": encoder, "decoder": nn.Sequential(encoder[0], nn.Linear(2, 2))})

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"include": "decoder.*"}, ["encoder.0", "decoder.1"]),
            ({"include": "decoder.0.weight"}, ["encoder.0"]),
            ({"include": "decoder.0.bias"}, ["encoder.0.bias"]),
            ({"include": lambda name, layer: name == "decoder.0"}, ["encoder.0"]),
            ({"exclude": "decoder.0"}, ["encoder.1", "decoder.1"]),
            ({"exclude": lambda name, layer: name.startswith("decoder")}, ["encoder.1"]),
        ],
        ids=["glob", "weight", "vector", "predicate", "exclude", "excluding predicate"],
    )
    def test_is_chosen_by_either(self, options, expected):
        model = add_spectral_norm(self.made(), **options)
        assert [name for name, *_ in normalized_weights(model)] == expected

    def test_gets_the_coefficient_of_either(self):
        model = add_spectral_norm(self.made(), coefficient={"decoder.0": 2.0, "*": 1.0})
        assert coefficients(model) == {"encoder.0": 2.0, "encoder.1": 1.0, "decoder.1": 1.0}


class TestCoefficientPerLayer:
    def test_first_glob_that_fits_wins_and_the_rest_gets_one(self):
        model = add_spectral_norm(
            Mixed(), coefficient={"rnn.weight_hh_*": 0.5, "rnn": 2.0, "attention*": 3.0, "*out_proj": 9.0}
        )
        assert coefficients(model) == dict(zip(DEFAULT, [1.0, 2.0, 0.5, 3.0, 3.0, 1.0], strict=True))

    def test_glob_that_matches_nothing_is_refused(self):
        model = Mixed()
        with pytest.raises(UserError, match=r"'haed': .* matches none of the weights; those are: stem\.0, rnn\."):
            add_spectral_norm(model, coefficient={"haed": 2.0})
        assert list(normalized_weights(model)) == []

    def test_key_that_is_no_glob_is_refused(self):
        with pytest.raises(UserError, match="coefficient must map globs to numbers, got the key 0; write '0'"):
            add_spectral_norm(nn.Sequential(nn.Linear(2, 2)), coefficient={0: 2.0})

    def test_value_that_cannot_be_is_refused_before_anything_is_changed(self):
        model = Mixed()
        with pytest.raises(UserError, match="coefficient must be a positive number, got -1"):
            add_spectral_norm(model, coefficient={"head": -1})
        assert list(normalized_weights(model)) == []

    def test_shared_weight_with_two_coefficients_is_refused(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        with pytest.raises(UserError, match="1 shares its weight with a layer for which coefficient is another"):
            add_spectral_norm(model, coefficient={"0": 2.0})
        add_spectral_norm(model, coefficient={"*": 2.0})
        assert coefficients(model) == {"0": 2.0, "1": 2.0}


class TestInputSize:
    @staticmethod
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 2), nn.LazyConv2d(2, 3))

    def test_is_given_to_the_layers_that_take_it(self):
        model = add_spectral_norm(self.model()[:3], strict=True, input_size=(8, 8))
        assert [each.input_size for *_, each in normalized_weights(model)] == [(8, 8), None]
        add_spectral_norm(model, input_size=[8, 8])

    def test_waits_with_a_lazy_layer(self):
        model = add_spectral_norm(self.model()[3:], strict=True, input_size=(8, 8))
        model(torch.ones(1, 3, 8, 8))
        assert [each.input_size for *_, each in normalized_weights(model)] == [(8, 8)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, 'input_size is for convolutions with strict=True or norm="operator", and here is none'),
            ({"strict": True, "include": "2"}, "and here is none; leave it out"),
            ({"strict": True, "exclude": "3", "input_size": (8,)}, "one integer for each of 2 axes"),
        ],
        ids=["not strict", "no convolution", "other axes"],
    )
    def test_is_refused_where_it_would_do_nothing(self, options, message):
        model = self.model()
        with pytest.raises(UserError, match=message):
            add_spectral_norm(model, **{"input_size": (8, 8), **options})
        assert list(normalized_weights(model)) == []


class TestSecondCall:
    def test_changes_only_the_options_that_are_given(self):
        model = add_spectral_norm(Mixed(), coefficient=2.0, n_power_iterations=3)
        add_spectral_norm(model, mode="cap", eps=1e-9)
        for *_, found in normalized_weights(model):
            assert (found.coefficient, found.n_power_iterations, found.mode, found.eps) == (2, 3, "cap", 1e-9)

    def test_changes_only_the_weights_that_are_meant(self):
        model = add_spectral_norm(Mixed())
        add_spectral_norm(model, include="rnn", coefficient=2.0)
        add_spectral_norm(model, coefficient={"head": 3.0})
        assert coefficients(model) == dict(zip(DEFAULT, [1.0, 2.0, 2.0, 1.0, 1.0, 3.0], strict=True))

    def test_reaches_weights_that_were_named_before(self):
        model = add_spectral_norm(Mixed(), include=["mixing", "gain"])
        sn.spectral_norm(model.head, "bias")
        add_spectral_norm(model, coefficient=2.0, exclude=[*DEFAULT[:-1], "head.weight"])
        assert {name: value.coefficient for name, *_, value in normalized_weights(model)} == {
            "mixing": 2.0,
            "gain": 2.0,
            "head.bias": 2.0,
        }

    def test_keeps_parameters_and_optimizer(self):
        model = add_spectral_norm(Mixed())
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(INPUTS).sum().backward()
        optimizer.step()
        add_spectral_norm(model, coefficient=2.0, update="forward", mode="cap", n_power_iterations=2)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        before = model.head.weight.detach().clone()
        model(INPUTS).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.head.weight, before)

    def test_refused_call_changes_nothing(self):
        model = add_spectral_norm(Mixed())
        with pytest.raises(UserError, match="mode must be one of"):
            add_spectral_norm(model, coefficient=2.0, mode="halve")
        assert set(coefficients(model).values()) == {1.0}

    def test_unknown_option_is_refused_even_without_a_weight(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'dim'"):
            add_spectral_norm(nn.ReLU(), dim=1)


def test_summary_names_every_weight_and_tells_what_is_shared():
    model = add_spectral_norm(Mixed())
    model.tail = nn.Linear(5, 5, bias=False)
    model.tail.weight = model.mixing
    rows = {row.layer: (row.kind, row.note) for row in summary(model).rows}
    assert rows == {
        "mixing": ("Mixed", "not a known weight of Mixed; include can name it"),
        "gain": ("Mixed", "a vector, not a matrix"),
        "stem.0": ("Conv1d", "normalize to 1"),
        "stem.1": ("BatchNorm1d", "a vector, not a matrix"),
        "rnn.weight_ih_l0": ("LSTM", "normalize to 1"),
        "rnn.weight_hh_l0": ("LSTM", "normalize to 1"),
        "attention.in_proj_weight": ("MultiheadAttention", "normalize to 1"),
        "attention.out_proj": ("NonDynamicallyQuantizableLinear", "normalize to 1"),
        "head": ("Linear", "normalize to 1"),
        "tail": ("Linear", "not normalized, shared with mixing"),
    }


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_layer_is_skipped_with_the_reason():
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    model = nn.Sequential(quantized.Linear(3, 2), nn.Linear(2, 2))
    rows = summary(add_spectral_norm(model)).rows
    assert [row.note for row in rows] == ["holds torch.qint8, not real or complex numbers", "normalize to 1"]
