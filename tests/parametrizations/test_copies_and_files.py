"""Copies, pickles, moves, and state dicts from and to torch's formats."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from spectralnorm import UserError, add_spectral_norm, spectral_norm


def make(normalize=spectral_norm) -> nn.Sequential:
    """A model that has been trained for a few steps."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 20))
    for layer in (model[0], model[2]):
        normalize(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    return model


def norm_of(weight: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


INPUTS = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)


class TestCopies:
    def test_deepcopy_computes_the_same_function_and_is_independent(self):
        model = make()
        before = model(INPUTS)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(INPUTS), before)
        with torch.no_grad():
            copied[2].parametrizations.weight.original.copy_(torch.randn(20, 32))
        assert norm_of(copied[2].weight) == pytest.approx(1, rel=1e-4)
        assert torch.equal(model(INPUTS), before)

    def test_deepcopy_of_a_layer_that_learns_the_size_of_its_images_has_the_same_value(self):
        layer = spectral_norm(nn.Conv2d(3, 4, 3), norm="operator")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(INPUTS).square().sum().backward()
        optimizer.step()
        expected = layer.weight
        assert torch.equal(copy.deepcopy(layer).weight, expected)

    @pytest.mark.parametrize("options", [{}, {"strict": True}, {"update": "forward"}, {"norm": "operator"}], ids=str)
    def test_deepcopy_in_inference_mode_computes_the_same_function(self, options):
        layer = add_spectral_norm(nn.Conv2d(3, 8, 3, padding=1), **options)
        images = torch.randn(2, 3, 8, 8)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        for _ in range(3):
            layer(images).square().sum().sqrt().backward()
            optimizer.step()
        layer.eval()
        with torch.inference_mode():
            expected = layer(images)
            copied = copy.deepcopy(layer)
            torch.testing.assert_close(copied(images), expected)

    def test_deepcopy_trains_on_its_own(self):
        model = make()
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.5)
        copied(INPUTS).square().sum().backward()
        optimizer.step()
        assert not torch.equal(copied(INPUTS), model(INPUTS))
        assert norm_of(copied[2].weight) == pytest.approx(1, abs=0.02)

    def test_deepcopy_after_an_unused_change_is_right(self):
        model = make()
        with torch.no_grad():
            model[2].parametrizations.weight.original.mul_(-7)
        assert norm_of(copy.deepcopy(model)[2].weight) == pytest.approx(1, rel=1e-4)

    def test_average_of_models_has_the_wanted_norm(self):
        model = make()
        average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 4, 4)).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
        average.eval()
        for index in (0, 2):
            assert norm_of(average.module[index].weight) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LSTM(4, 4)], ids=["linear", "lstm"])
    def test_shallow_copy_shares_the_parameters(self, layer):
        layer, inputs = add_spectral_norm(copy.deepcopy(layer)), torch.ones(2, 4)
        copied = copy.copy(layer)
        assert type(copied) is type(layer)
        assert all(mine is its for mine, its in zip(copied.parameters(), layer.parameters(), strict=True))
        assert torch.equal(copied(inputs)[0], layer(inputs)[0])

    @pytest.mark.parametrize("training", [True, False])
    def test_whole_model_can_be_pickled(self, training):
        model = make().train(training)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = pickle.loads(pickle.dumps(model))
        assert type(loaded[2]).__name__ == "ParametrizedLinear"
        assert loaded[2].training == training
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert norm_of(loaded[2].weight) == pytest.approx(1, rel=1e-4)
        parametrize.remove_parametrizations(loaded[2], "weight")
        assert type(loaded[2]) is nn.Linear
        assert norm_of(model[2].weight) == pytest.approx(1, abs=0.05)

    def test_whole_model_can_be_saved_by_torch(self):
        file = io.BytesIO()
        torch.save(make(), file)
        file.seek(0)
        assert norm_of(torch.load(file, weights_only=False)[0].weight) == pytest.approx(1, rel=1e-4)

    def test_moved_model_computes_with_the_new_type(self):
        model = make().double()
        assert model[2].weight.dtype == torch.float64
        assert norm_of(model[2].weight) == pytest.approx(1, rel=1e-4)

    def test_model_made_without_memory_and_filled_later(self):
        with torch.device("meta"):
            layer = spectral_norm(nn.Linear(150, 140))
        layer.to_empty(device="cpu").reset_parameters()
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
        layer(torch.ones(1, 150)).sum().backward()
        assert all(buffer.isfinite().all() for buffer in layer.buffers())


class TestSharedClass:
    def test_layers_of_a_kind_have_one_class(self):
        first, second = spectral_norm(nn.Linear(2, 3)), spectral_norm(nn.Linear(4, 5))
        assert type(first) is type(second)
        assert type(first) is not type(spectral_norm(nn.Conv1d(2, 3, 1)))
        assert isinstance(first, nn.Linear)

    def test_removal_from_one_layer_leaves_the_others_alone(self):
        first, second = spectral_norm(nn.Linear(2, 3)), spectral_norm(nn.Linear(4, 5))
        parametrize.remove_parametrizations(first, "weight")
        assert norm_of(second.weight) == pytest.approx(1, rel=1e-4)
        assert isinstance(first.weight, nn.Parameter)

    def test_other_parametrization_of_one_layer_leaves_the_others_alone(self):
        class Double(nn.Module):
            def forward(self, tensor):
                return 2 * tensor

        first, second = spectral_norm(nn.Linear(2, 3)), spectral_norm(nn.Linear(2, 3))
        bias = first.bias.detach().clone()
        parametrize.register_parametrization(first, "bias", Double())
        assert torch.equal(first.bias, 2 * bias)
        assert isinstance(second.bias, nn.Parameter)
        parametrize.remove_parametrizations(first, "weight")
        assert isinstance(first.weight, nn.Parameter)
        assert torch.equal(first.bias, 2 * bias)
        parametrize.remove_parametrizations(first, "bias")
        assert type(first) is nn.Linear

    def test_parameter_of_a_layer_whose_sibling_normalizes_it_is_ordinary(self):
        spectral_norm(nn.Linear(2, 3), "bias")
        layer = spectral_norm(nn.Linear(2, 3))
        layer.bias = nn.Parameter(torch.ones(3))
        assert torch.equal(layer(torch.zeros(1, 2)), torch.ones(1, 3))


class TestStateDict:
    def test_keys_and_shapes_are_those_of_torch(self):
        ours, theirs = make(), make(torch_parametrizations.spectral_norm)
        shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, theirs)]
        assert list(shapes[0]) == list(shapes[1])
        assert shapes[0] == shapes[1]

    def test_keys_of_grouped_and_transposed_layers_have_torchs_shapes(self):
        for layer in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose1d(3, 5, 2)):
            theirs = torch_parametrizations.spectral_norm(copy.deepcopy(layer))
            spectral_norm(layer).load_state_dict(theirs.state_dict())
            theirs.load_state_dict(layer.state_dict())

    def test_torchs_parametrization_loads_strictly_and_is_refined(self):
        theirs, ours = make(torch_parametrizations.spectral_norm), make()
        ours.load_state_dict(theirs.state_dict())
        ours.eval(), theirs.eval()
        assert norm_of(ours[2].weight) == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(ours(INPUTS), theirs(INPUTS), rtol=0.1, atol=0.1)

    def test_ours_loads_strictly_into_torchs_and_computes_the_same(self):
        theirs, ours = make(torch_parametrizations.spectral_norm), make()
        ours(INPUTS)  # writes u and v to the buffers
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(theirs.eval()(INPUTS), ours.eval()(INPUTS))

    def test_torchs_hook_format_loads_strictly(self):
        theirs, ours = make(nn.utils.spectral_norm), make()
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours[2].parametrizations.weight.original, theirs[2].weight_orig)
        assert torch.equal(ours[2].parametrizations.weight[0]._u, theirs[2].weight_u)
        assert norm_of(ours[2].weight) == pytest.approx(1, rel=1e-4)

    def test_plain_weights_load_strictly_and_bring_good_vectors(self):
        plain, ours = make(lambda layer: layer), make()
        ours.load_state_dict(plain.state_dict())
        original = ours[2].parametrizations.weight.original
        assert torch.equal(original, plain[2].weight)
        assert norm_of(ours[2].weight) == pytest.approx(1, rel=1e-4)
        u, v = (buffer for _, buffer in ours[2].parametrizations.weight[0].named_buffers())
        assert (u @ original @ v).item() == pytest.approx(norm_of(original), rel=0.05)

    def test_copied_and_pickled_layers_load_plain_weights_too(self):
        plain = nn.Linear(4, 3)
        for layer in (copy.deepcopy(spectral_norm(nn.Linear(4, 3))), pickle.loads(pickle.dumps(make()[2]))):
            weights = nn.Linear(layer.in_features, layer.out_features)
            layer.load_state_dict(weights.state_dict())
            assert torch.equal(layer.parametrizations.weight.original, weights.weight)
        assert plain.weight.shape == (3, 4)

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
    @pytest.mark.parametrize(
        "source",
        [lambda layer: layer, torch_parametrizations.spectral_norm, nn.utils.spectral_norm, spectral_norm],
        ids=["plain", "P", "O", "ours"],
    )
    def test_scale_that_no_other_format_has_starts_at_the_coefficient(self, source, strict):
        layer = spectral_norm(nn.Linear(4, 3), mode="learnable", coefficient=2.0)
        scale = layer.parametrizations.weight[0].scale
        with torch.no_grad():
            scale.fill_(7.0)
        layer.load_state_dict(source(nn.Linear(4, 3)).state_dict(), strict=strict)
        assert scale.item() == 2
        assert norm_of(layer.weight) == pytest.approx(2, rel=1e-4)

    def test_scale_of_a_vector_starts_at_the_coefficient_too(self):
        layer = spectral_norm(nn.Linear(4, 3), "bias", mode="learnable", coefficient=2.0)
        layer.load_state_dict(nn.Linear(4, 3).state_dict())
        assert layer.bias.norm().item() == pytest.approx(2)

    def test_scale_is_unexpected_where_none_is_learned(self):
        state = spectral_norm(nn.Linear(4, 3), mode="learnable").state_dict()
        with pytest.raises(RuntimeError, match=r"Unexpected key.*parametrizations\.weight\.0\.scale"):
            spectral_norm(nn.Linear(4, 3)).load_state_dict(state)

    def test_missing_weight_is_reported(self):
        with pytest.raises(RuntimeError, match=r"parametrizations\.weight\.original"):
            spectral_norm(nn.Linear(4, 3)).load_state_dict({"bias": torch.zeros(3)})

    def test_loading_does_not_change_the_dictionary(self):
        state = nn.Linear(4, 3).state_dict()
        spectral_norm(nn.Linear(4, 3)).load_state_dict(state)
        assert list(state) == ["weight", "bias"]

    def test_after_removal_only_plain_weights_load(self):
        layer = spectral_norm(nn.Linear(4, 3))
        parametrize.remove_parametrizations(layer, "weight")
        layer.load_state_dict(nn.Linear(4, 3).state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):
            layer.load_state_dict(spectral_norm(nn.Linear(4, 3)).state_dict())

    def test_error_is_one_that_users_can_catch(self):
        assert issubclass(UserError, ValueError)
