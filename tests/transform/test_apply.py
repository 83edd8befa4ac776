"""Adding and removing the normalization on whole models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

import spectralnorm as sn
from spectralnorm import UserError, add_spectral_norm, remove_spectral_norm
from spectralnorm.parametrizations import is_normalized, normalization_of
from spectralnorm.transform import normalized_weights


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2))
        self.table = nn.Embedding(5, 18)
        self.heads = nn.ModuleDict({"real": nn.Linear(18, 1), "both": nn.Bilinear(18, 18, 1)})

    def forward(self, images, labels):
        hidden = self.features(images).flatten(1)[:, :18]
        return self.heads["real"](hidden) + self.heads["both"](hidden, self.table(labels))


class HalfByHook(TorchHook):
    """Published code derives caps, and norms of convolutions, from torch's classes."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
        return super().compute_weight(module, do_power_iteration) / 2

    @classmethod
    def of(cls, layer: nn.Module) -> nn.Module:
        nn.utils.spectral_norm(layer)
        (hook,) = layer._forward_pre_hooks.values()
        hook.__class__ = cls
        return layer.eval()


class HalfByParametrization(torch_parametrizations._SpectralNorm):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return super().forward(weight) / 2

    @classmethod
    def of(cls, layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", cls(layer.weight))
        return layer.eval()


INPUTS = torch.linspace(-1, 1, 2 * 3 * 5 * 5).view(2, 3, 5, 5), torch.tensor([1, 4])
NAMES = ["features.0", "features.2", "table", "heads.real", "heads.both"]


def norms(model: nn.Module) -> dict[str, float]:
    return {
        name: torch.linalg.matrix_norm(normalization.weight_matrix(getattr(module, tensor_name)), 2).max().item()
        for name, module, tensor_name, normalization in normalized_weights(model)
    }


class TestAdd:
    def test_every_layer_that_makes_sense_gets_norm_one(self, device):
        model = add_spectral_norm(Nested().to(device))
        assert norms(model) == pytest.approx(dict.fromkeys(NAMES, 1.0), rel=1e-5)
        assert not parametrize.is_parametrized(model.features[1])

    def test_returns_the_model_and_works_for_its_side_effect(self):
        model = Nested()
        assert add_spectral_norm(model) is model

    def test_single_layer_is_a_model_too(self):
        assert is_normalized(add_spectral_norm(nn.Linear(2, 2)))

    def test_second_call_changes_nothing(self):
        model = add_spectral_norm(Nested())
        before = [id(normalization) for *_, normalization in normalized_weights(model)]
        add_spectral_norm(model)
        assert [id(normalization) for *_, normalization in normalized_weights(model)] == before

    @pytest.mark.parametrize(
        ("include", "exclude", "expected"),
        [
            ("features.*", None, ["features.0", "features.2"]),
            (["table", "heads.r*"], None, ["table", "heads.real"]),
            (None, "heads.*", ["features.0", "features.2", "table"]),
            (lambda name, layer: isinstance(layer, nn.Linear), None, ["heads.real"]),
            ("features.*", lambda name, layer: name.endswith("0"), ["features.2"]),
        ],
    )
    def test_patterns_and_predicates_choose(self, include, exclude, expected):
        model = add_spectral_norm(Nested(), include=include, exclude=exclude)
        assert [name for name, *_ in normalized_weights(model)] == expected

    def test_pattern_that_matches_nothing_is_refused_with_the_names_there_are(self):
        with pytest.raises(
            UserError,
            match=r"'feature\.\*' matches no layer.*features\.0, features\.2, table.*names also: features\.1\.weight",
        ):
            add_spectral_norm(Nested(), include="feature.*")

    def test_options_are_passed_on(self):
        model = add_spectral_norm(Nested(), coefficient=0.5, n_power_iterations=3, update="forward")
        normalization = normalization_of(model.heads["real"])
        assert (normalization.coefficient, normalization.n_power_iterations) == (0.5, 3)
        assert norms(model)["table"] == pytest.approx(0.5, rel=1e-2)

    def test_optimizer_made_before_stays_valid(self):
        model = Nested()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        add_spectral_norm(model)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert {id(parameter) for parameter in model.parameters()} == held
        before = model.heads["real"].weight.detach().clone()
        model(*INPUTS).sum().backward()
        optimizer.step()
        assert not torch.equal(model.heads["real"].weight, before)

    def test_layers_that_are_no_linear_map_are_left_alone(self):
        model = add_spectral_norm(nn.Sequential(nn.PReLU(3), nn.LayerNorm(3), nn.BatchNorm1d(3).eval()))
        assert norms(model) == {}

    def test_layer_with_another_parametrization_is_left_alone(self):
        layer = torch_parametrizations.orthogonal(nn.Linear(3, 3))
        add_spectral_norm(nn.Sequential(layer))
        assert normalization_of(layer) is None


READ_DIFFERENTLY = {
    "map": ((nn.Conv1d(4, 4, 3), {"strict": True}), nn.Conv1d(4, 4, 3, stride=2)),
    "matrix": ((nn.Linear(4, 4), {"dim": 1}), nn.Linear(4, 4)),
}


class TestTiedWeights:
    @staticmethod
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight
        return model

    def test_one_normalization_and_one_parameter(self):
        model = add_spectral_norm(self.tied())
        assert normalization_of(model[0]) is normalization_of(model[1])
        assert len(list(model.parameters())) == 1
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
        assert norms(model) == pytest.approx({"0": 1.0, "1": 1.0}, rel=1e-5)

    def test_partner_that_is_normalized_already_is_joined(self):
        model = self.tied()
        sn.spectral_norm(model[0])
        add_spectral_norm(model)
        assert normalization_of(model[0]) is normalization_of(model[1])

    def test_weight_advances_once_per_step_for_both(self):
        model = add_spectral_norm(self.tied())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, model[1].weight)

    def test_removal_bakes_once(self):
        model = add_spectral_norm(self.tied())
        before = model(torch.tensor([1, 2]))
        remove_spectral_norm(model)
        assert model[0].weight is model[1].weight
        assert torch.equal(model(torch.tensor([1, 2])), before)

    def test_views_that_disagree_are_refused_before_anything_is_changed(self):
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        with pytest.raises(UserError, match="0 and 1 share a weight"):
            add_spectral_norm(model)
        assert not any(parametrize.is_parametrized(layer) for layer in model)

    @pytest.mark.parametrize(("normalized", "partner"), READ_DIFFERENTLY.values(), ids=READ_DIFFERENTLY)
    def test_normalization_that_is_not_right_for_a_partner_is_not_joined(self, normalized, partner):
        layer, options = copy.deepcopy(normalized)
        model = nn.Sequential(layer, copy.deepcopy(partner))
        model[1].weight = layer.weight
        sn.spectral_norm(layer, **options)
        with pytest.raises(UserError, match="0 and 1 share a weight"):
            add_spectral_norm(model, n_power_iterations=2)
        assert not is_normalized(model[1])
        assert normalization_of(layer).n_power_iterations == 1
        add_spectral_norm(model, include="0", n_power_iterations=2)
        assert normalization_of(layer).n_power_iterations == 2

    def test_lazy_layers_that_will_read_their_weight_differently_are_refused(self):
        model = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyConvTranspose1d(4, 3))
        model[1].weight = model[0].weight
        with pytest.raises(UserError, match="0 and 1 share a weight"):
            add_spectral_norm(model)
        assert not any(is_normalized(layer) for layer in model)

    def test_each_of_two_normalizations_of_a_weight_is_changed(self):
        model = self.tied()
        sn.spectral_norm(model[0], coefficient=1.0)
        sn.spectral_norm(model[1], coefficient=2.0)
        add_spectral_norm(model, n_power_iterations=3)
        found = [normalization_of(layer) for layer in model]
        assert [(each.coefficient, each.n_power_iterations) for each in found] == [(1.0, 3), (2.0, 3)]


class Sealed(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("no class may come from this one")


def described(model: nn.Module) -> list[object]:
    """All that adding a normalization could change."""
    hooks = ("_forward_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")
    return [
        [
            *(name, module, type(module), repr(module), module.training),
            *map(list, (module._parameters, module._buffers, module._modules)),
            *(list(getattr(module, kind).values()) for kind in hooks),
            *map(id, module.parameters()),
        ]
        for name, module in model.named_modules()
    ]


LATE = {  # refused when the last layer is reached
    "update of a map's norm": (lambda: nn.Conv2d(3, 3, 3), {"norm": "operator", "update": "manual"}, UserError),
    "complex convolution": (lambda: nn.Conv1d(2, 2, 3, dtype=torch.complex64), {"strict": True}, UserError),
    "class that cannot be derived": (lambda: Sealed(2, 2), {}, TypeError),
}
EARLIER = {
    "plain": lambda: nn.Linear(3, 3),
    "P": lambda: torch_parametrizations.spectral_norm(nn.Linear(3, 3)),
    "O": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "recurrent": lambda: nn.GRU(3, 3),
    "lazy": lambda: nn.LazyLinear(3),
    "lazy that waits": lambda: sn.spectral_norm(nn.LazyLinear(3)),
}


class TestRefusal:
    @pytest.mark.parametrize(("make", "options", "error"), LATE.values(), ids=LATE)
    @pytest.mark.parametrize("earlier", EARLIER.values(), ids=EARLIER)
    def test_leaves_the_model_as_it_was(self, earlier, make, options, error):
        model = nn.Sequential(earlier(), make()).eval()
        before = described(model)
        with pytest.raises(error):
            add_spectral_norm(model, coefficient=2.0, **options)
        assert described(model) == before

    def test_leaves_a_single_layer_as_it_was(self):
        layer = Sealed(2, 2)
        before = described(layer)
        with pytest.raises(TypeError):
            sn.spectral_norm(layer)
        assert described(layer) == before

    def test_leaves_options_and_the_function_as_they_were(self):
        under_hook = nn.utils.spectral_norm(nn.Linear(3, 3))
        model = nn.Sequential(sn.spectral_norm(nn.Linear(3, 3), mode="learnable"), under_hook, Sealed(3, 3)).eval()
        before, state = model(torch.ones(1, 3)), copy.deepcopy(model.state_dict())
        with pytest.raises(TypeError):
            add_spectral_norm(model, coefficient=2.0, n_power_iterations=3)
        assert torch.equal(model(torch.ones(1, 3)), before)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert normalization_of(model[0]).n_power_iterations == 1


class TestTakingOverFromTorch:
    @pytest.mark.parametrize("torchs", [torch_parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["P", "O"])
    def test_model_is_converted_in_place(self, torchs):
        model = nn.Sequential(torchs(nn.Conv2d(3, 4, 3)), torchs(nn.ConvTranspose2d(4, 3, 3)))
        parameters = {id(parameter) for parameter in model.parameters()}
        model(INPUTS[0])
        add_spectral_norm(model)
        assert {id(parameter) for parameter in model.parameters()} == parameters
        assert norms(model) == pytest.approx({"0": 1.0, "1": 1.0}, rel=1e-4)
        plain = add_spectral_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)))
        assert set(model.state_dict()) == set(plain.state_dict())
        model(INPUTS[0]).sum().backward()
        model.load_state_dict(plain.state_dict())
        plain.load_state_dict(model.state_dict())

    @pytest.mark.parametrize("torchs", [torch_parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["P", "O"])
    def test_its_choice_of_dimension_is_kept(self, torchs):
        model = add_spectral_norm(nn.Sequential(torchs(nn.Conv2d(3, 4, 3), dim=1)))
        assert normalization_of(model[0]).view.out_dim == 1

    @pytest.mark.parametrize("torchs", [torch_parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["P", "O"])
    def test_mode_is_kept(self, torchs):
        model = add_spectral_norm(torchs(nn.Linear(3, 3)).eval())
        assert not normalization_of(model).training

    @pytest.mark.parametrize("kind", [HalfByHook, HalfByParametrization])
    def test_a_class_derived_from_torchs_is_left_alone(self, kind):
        model = nn.Sequential(kind.of(nn.Linear(3, 3)), nn.Linear(3, 3))
        before = model[0](torch.ones(2, 3))
        add_spectral_norm(model)
        assert list(sn.monitor(model)) == ["1"]
        assert f"already, by {kind.__name__}" in str(sn.summary(model))
        torch.testing.assert_close(model[0](torch.ones(2, 3)), before)
        with pytest.raises(UserError, match=f"already, by {kind.__name__}"):
            add_spectral_norm(model, include="0*")


class TestRemove:
    def test_function_and_parameter_objects_stay(self):
        model = add_spectral_norm(Nested())
        parameters, before = {id(parameter) for parameter in model.parameters()}, model(*INPUTS)
        assert remove_spectral_norm(model) is model
        assert torch.equal(model(*INPUTS), before)
        assert {id(parameter) for parameter in model.parameters()} == parameters
        assert set(model.state_dict()) == set(Nested().state_dict())
        assert type(model.heads["real"]) is nn.Linear

    def test_adding_again_works(self):
        model = add_spectral_norm(remove_spectral_norm(add_spectral_norm(Nested())))
        assert norms(model) == pytest.approx(dict.fromkeys(NAMES, 1.0), rel=1e-4)

    def test_removed_weight_trains_freely(self):
        model = remove_spectral_norm(add_spectral_norm(nn.Sequential(nn.Linear(3, 3))))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model[0].weight.square().sum().backward()
        optimizer.step()
        assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, rel=1e-4)
        assert model[0].weight.is_leaf

    def test_other_parametrizations_stay(self):
        layer = torch_parametrizations.weight_norm(nn.Linear(3, 3), "bias", dim=None)
        add_spectral_norm(layer)
        remove_spectral_norm(layer)
        assert parametrize.is_parametrized(layer, "bias")
        assert not parametrize.is_parametrized(layer, "weight")

    def test_copy_of_a_model_is_removed_on_its_own(self):
        model = add_spectral_norm(nn.Sequential(nn.Linear(3, 3)))
        copied = remove_spectral_norm(copy.deepcopy(model))
        assert is_normalized(model[0])
        assert torch.equal(copied[0].weight, model[0].weight)
