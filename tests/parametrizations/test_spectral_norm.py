"""Values, options and refusals of one normalized weight."""

import copy
import math
from abc import ABC

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm import SpectralNorm, UserError, spectral_norm

LAYERS = {
    "linear": lambda: nn.Linear(20, 30),
    "large linear": lambda: nn.Linear(200, 150),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "conv1d": lambda: nn.Conv1d(3, 5, 4),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "grouped conv": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise conv": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed conv1d": lambda: nn.ConvTranspose1d(3, 5, 4),
    "transposed conv2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed conv3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "grouped transposed conv": lambda: nn.ConvTranspose2d(8, 12, 3, groups=4),
    "embedding": lambda: nn.Embedding(10, 4),
    "channels_last conv": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "one output": lambda: nn.Linear(7, 1),
}


def exact_norm(layer: nn.Module, weight: torch.Tensor) -> float:
    """By SVD of the matrix (the largest of the blocks) that the layer's shape attributes spell out."""
    weight = weight.detach().double().cpu()
    groups, is_transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    blocks = weight.chunk(groups, dim=0)
    if is_transposed:
        blocks = [block.transpose(0, 1) for block in blocks]
    return max(torch.linalg.matrix_norm(block.flatten(1), 2).item() for block in blocks)


def raw(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    return layer.parametrizations[name].original


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
class TestNormOfEveryLayer:
    def test_fresh_layer_has_norm_one(self, make, dtype, rtol, device):
        layer = spectral_norm(make().to(device, dtype))
        assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=max(rtol, 1e-9))

    def test_sigma_agrees_with_svd_after_convergence(self, make, dtype, rtol, device):
        layer = spectral_norm(make().to(device, dtype))
        optimizer = torch.optim.SGD([raw(layer)], lr=0.0)
        for _ in range(60):
            raw(layer).grad = torch.zeros_like(raw(layer))
            optimizer.step()
            weight = layer.weight
        sigma = sn.monitor(layer)["weight"]
        assert sigma == pytest.approx(exact_norm(layer, raw(layer)), rel=rtol)
        torch.testing.assert_close(weight, raw(layer) / sigma, rtol=rtol, atol=1e-7)

    def test_per_forward_power_iteration_agrees_with_svd_after_convergence(self, make, dtype, rtol, device):
        layer = spectral_norm(make().to(device, dtype), update="forward", n_power_iterations=100)
        for _ in range(30):
            weight = layer.weight
        assert exact_norm(layer, weight) == pytest.approx(1, rel=rtol)


class TestOnItsOwn:
    def test_compute_weight_before_registration(self, device):
        layer = nn.Conv2d(3, 8, 3).to(device)
        weight = SpectralNorm(layer).compute_weight(layer)
        torch.testing.assert_close(weight, layer.weight / exact_norm(layer, layer.weight))
        assert not parametrize.is_parametrized(layer)

    def test_compute_weight_after_registration_is_the_layers_weight(self, device):
        layer = spectral_norm(nn.Linear(5, 6).to(device))
        assert torch.equal(layer.parametrizations.weight[0].compute_weight(layer), layer.weight)

    def test_compute_weight_is_differentiable(self, device):
        layer = nn.Linear(5, 6).to(device)
        SpectralNorm(layer).compute_weight(layer).sum().backward()
        assert layer.weight.grad is not None

    def test_holds_no_parameters_and_only_u_and_v(self):
        normalization = SpectralNorm(nn.Linear(5, 6))
        assert list(normalization.parameters()) == []
        assert {name: tuple(buffer.shape) for name, buffer in normalization.named_buffers()} == {
            "_u": (6,),
            "_v": (5,),
        }


class TestOptions:
    def test_coefficient_is_the_norm(self):
        layer = spectral_norm(nn.Linear(5, 6), coefficient=0.7)
        assert exact_norm(layer, layer.weight) == pytest.approx(0.7, rel=1e-5)

    def test_coefficient_can_be_changed(self):
        layer = spectral_norm(nn.Linear(5, 6))
        layer.parametrizations.weight[0].coefficient = 3.0
        assert exact_norm(layer, layer.weight) == pytest.approx(3, rel=1e-5)

    def test_cap_leaves_a_small_weight_alone(self):
        layer = nn.Linear(5, 6)
        before = layer.weight.detach().clone()
        spectral_norm(layer, mode="cap", coefficient=100.0)
        assert torch.equal(layer.weight, before)

    def test_cap_brings_a_large_weight_down(self):
        layer = spectral_norm(nn.Linear(5, 6), mode="cap", coefficient=0.01)
        assert exact_norm(layer, layer.weight) == pytest.approx(0.01, rel=1e-5)

    def test_dim_chooses_the_rows(self):
        layer = spectral_norm(nn.Conv2d(4, 6, 3), dim=1)
        matrix = layer.weight.detach().transpose(0, 1).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, rel=1e-5)

    def test_vector_is_divided_by_its_length_and_needs_no_buffers(self):
        layer = spectral_norm(nn.Linear(5, 6), "bias", coefficient=2.0)
        torch.testing.assert_close(layer.bias, 2 * raw(layer, "bias") / raw(layer, "bias").norm())
        assert list(layer.buffers()) == []

    def test_forward_update_reproduces_torch_exactly(self):
        ours, theirs = nn.Linear(20, 30), nn.Linear(20, 30)
        theirs.load_state_dict(ours.state_dict())
        spectral_norm(ours, update="forward", n_power_iterations=2)
        torch_parametrizations.spectral_norm(theirs, n_power_iterations=2)
        ours.load_state_dict(theirs.state_dict())
        for _ in range(5):
            assert torch.equal(ours.weight, theirs.weight)
        for name, buffer in theirs.named_buffers():
            assert torch.equal(ours.get_buffer(name), buffer)

    def test_manual_update_advances_only_when_told(self):
        layer = spectral_norm(nn.Linear(20, 30), update="manual")
        with torch.no_grad():
            raw(layer).copy_(torch.randn(30, 20))
        before = layer.parametrizations.weight[0]._u.clone()
        assert torch.equal(layer.weight, layer.weight)
        assert torch.equal(layer.parametrizations.weight[0]._u, before)
        for _ in range(200):
            sn.update_(layer)
        assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"norm": "nuclear"}, "norm must be one of 'matrix', 'operator', 'bidirectional', got 'nuclear'"),
            ({"mode": "soft"}, "mode must be one of 'normalize', 'cap', 'learnable', got 'soft'"),
            ({"update": "never"}, "update must be one of 'step', 'forward', 'manual', got 'never'"),
            ({"strict": "yes"}, "strict must be True or False, got 'yes'"),
            ({"coefficient": -1.0}, "coefficient must be a positive number, got -1.0"),
            ({"coefficient": math.nan}, "coefficient must be a positive number, got nan"),
            ({"n_power_iterations": 0}, "n_power_iterations must be an integer of at least 1, got 0"),
            ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ],
    )
    def test_value_that_is_not_offered_is_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            spectral_norm(nn.Linear(2, 2), **options)


class TestRegistration:
    def test_works_with_torchs_own_functions(self):
        layer = spectral_norm(nn.Linear(5, 6))
        parameter, weight = raw(layer), layer.weight.detach().clone()
        assert parametrize.is_parametrized(layer, "weight")
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Linear
        assert layer.weight is parameter
        assert torch.equal(layer.weight, weight)

    def test_removal_without_baking_gives_the_raw_weight_back(self):
        layer = nn.Linear(5, 6)
        before = layer.weight.detach().clone()
        spectral_norm(layer)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        assert torch.equal(layer.weight, before)

    def test_registering_twice_is_refused(self):
        with pytest.raises(UserError, match="normalized already"):
            spectral_norm(spectral_norm(nn.Linear(2, 2)))

    @pytest.mark.parametrize("torchs", [torch_parametrizations.spectral_norm, nn.utils.spectral_norm])
    def test_weight_that_torch_normalizes_is_refused(self, torchs):
        with pytest.raises(UserError, match="normalized already"):
            spectral_norm(torchs(nn.Linear(2, 2)))

    def test_two_weights_of_one_layer(self):
        layer = spectral_norm(spectral_norm(nn.GRUCell(3, 4), "weight_ih"), "weight_hh")
        for weight in (layer.weight_ih, layer.weight_hh):
            assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=1e-5)

    def test_missing_weight_is_refused_with_the_names_there_are(self):
        with pytest.raises(UserError, match="no weight 'kernel'; its parameters are: weight, bias"):
            spectral_norm(nn.Linear(2, 2), "kernel")

    def test_weight_without_a_shape_is_refused(self):
        layer = nn.ParameterDict({"table": nn.UninitializedParameter()})
        with pytest.raises(UserError, match="run one forward"):
            spectral_norm(layer, "table")

    def test_single_number_is_refused(self):
        with pytest.raises(UserError, match="'scale' of ParameterDict is a single number"):
            spectral_norm(nn.ParameterDict({"scale": torch.ones(())}), "scale")

    def test_loop_over_modules_that_comes_to_the_parametrizations_is_told_so(self):
        layer = spectral_norm(nn.Linear(2, 2))
        _, *found = (module for module in layer.modules() if hasattr(module, "weight"))
        assert found == [layer.parametrizations]
        with pytest.raises(UserError, match=r"ModuleDict holds the parametrizations .* list\(model\.modules\(\)\)"):
            spectral_norm(found[0])

    @pytest.mark.parametrize("normalize", [spectral_norm, SpectralNorm])
    def test_weight_in_the_layers_place_is_refused(self, normalize):
        with pytest.raises(UserError, match="got Parameter; give the layer whose weight it is"):
            normalize(nn.Linear(2, 2).weight)

    def test_normalization_that_is_called_as_the_layer_is_refused(self):
        with pytest.raises(UserError, match="216 entries, but 384 are here; inputs are for the layer"):
            SpectralNorm(nn.Conv2d(3, 8, 3))(torch.ones(2, 3, 8, 8))

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_weight_that_a_hook_computes_is_refused(self):
        with pytest.raises(UserError, match="computed and not a parameter"):
            spectral_norm(nn.utils.weight_norm(nn.Linear(2, 2)))

    def test_dim_outside_of_the_weight_is_refused(self):
        with pytest.raises(IndexError, match="got 2"):
            spectral_norm(nn.Linear(2, 2), dim=2)

    def test_assigning_sets_the_raw_weight_without_sharing_memory(self):
        layer, value = spectral_norm(nn.Linear(2, 2)), torch.diag(torch.tensor([4.0, 2.0]))
        parameter = raw(layer)
        layer.weight = value
        value.zero_()
        assert raw(layer) is parameter
        torch.testing.assert_close(layer.weight, torch.diag(torch.tensor([1.0, 0.5])))

    @pytest.mark.parametrize("value", [torch.ones(3, 3), None, [[1.0]]], ids=["shape", "none", "list"])
    def test_assigning_what_is_no_tensor_of_its_shape_is_refused(self, value):
        layer = spectral_norm(nn.Linear(3, 2))
        with pytest.raises(UserError, match=r"^'weight' of this Linear .* takes a tensor of shape \(2, 3\), got "):
            layer.weight = value

    def test_assigning_another_parameter_is_refused(self):
        layer = spectral_norm(nn.Linear(3, 2))
        with pytest.raises(UserError, match=r"^'weight' of this Linear is normalized and cannot be another parameter"):
            layer.weight = nn.Linear(3, 2).weight
        layer.bias = nn.Linear(3, 2).bias

    def test_class_of_the_layer_can_be_derived_from_together_with_an_abstract_one(self):
        layer = spectral_norm(nn.Linear(3, 2))

        class Patched(type(layer), ABC):
            pass

        patched = Patched.__new__(Patched)
        patched.__dict__.update(layer.__dict__)
        assert torch.equal(patched.weight, layer.weight)

    def test_deleting_is_refused(self):
        layer = spectral_norm(nn.Linear(3, 2))
        with pytest.raises(AttributeError, match=r"'weight' of this Linear is normalized; remove_spectral_norm first"):
            del layer.weight
        assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=1e-4)

    def test_weight_may_be_elsewhere_but_for_the_time_of_a_forward_that_was_replaced(self):
        layer = spectral_norm(nn.Linear(5, 6)).eval()
        expected, parts = layer.weight.detach().clone(), layer.parametrizations.weight
        numbers, forward = parts.original.detach(), parts.forward

        def with_numbers():
            parts.original = nn.Parameter(numbers)
            try:
                return forward()
            finally:
                parts.original = nn.Parameter(numbers.to("meta"))

        parts.original, parts.forward = nn.Parameter(numbers.to("meta")), with_numbers
        for _ in range(2):
            torch.testing.assert_close(layer.weight, expected)

    def test_forward_of_the_normalization_may_be_replaced(self):
        layer = spectral_norm(nn.Linear(5, 6))
        normalization = layer.parametrizations.weight[0]
        forward = normalization.forward
        normalization.forward = lambda weight: 2 * forward(weight)
        assert exact_norm(layer, layer.weight) == pytest.approx(2, rel=1e-4)

    def test_other_parametrization_on_top_is_applied(self):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        layer = spectral_norm(nn.Linear(5, 6))
        parametrize.register_parametrization(layer, "weight", Double())
        assert exact_norm(layer, layer.weight) == pytest.approx(2, rel=1e-5)

    def test_other_parametrization_below_is_applied_first(self):
        layer = nn.Linear(5, 6)
        torch_parametrizations.weight_norm(layer)
        spectral_norm(layer)
        assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=1e-3)


class TestRandomness:
    @pytest.mark.parametrize("options", [{}, {"strict": True}, {"norm": "operator"}], ids=["plain", "strict", "map"])
    def test_another_default_device_changes_nothing(self, options):
        layer, inputs = nn.Conv2d(2, 140, 9, padding=4), torch.ones(1, 2, 9, 9)
        other = copy.deepcopy(layer)
        spectral_norm(other, **options)
        with torch.device("meta"):
            spectral_norm(layer, **options)
            for each in (layer, other):
                optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
                for _ in range(3):
                    each(inputs).sum().backward()
                    optimizer.step()
        assert torch.equal(layer.weight, other.weight)

    def test_construction_and_use_leave_the_global_generator_alone(self):
        layer = nn.Linear(150, 150)
        state = torch.get_rng_state()
        spectral_norm(layer)
        layer(torch.ones(1, 150)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        layer.weight  # noqa: B018
        assert torch.equal(torch.get_rng_state(), state)

    def test_vectors_depend_on_the_weight_alone(self):
        first = nn.Linear(150, 140)
        second = nn.Linear(150, 140)
        second.load_state_dict(first.state_dict())
        torch.manual_seed(7)
        for (name, buffer), (_, other) in zip(
            spectral_norm(first).named_buffers(), spectral_norm(second).named_buffers(), strict=True
        ):
            assert torch.equal(buffer, other), name


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
    @pytest.mark.parametrize("scale", [1.0, 1000.0])
    def test_half_types_have_norm_one_up_to_rounding(self, dtype, tolerance, scale, device):
        layer = nn.Linear(64, 64).to(device)
        with torch.no_grad():
            layer.weight.mul_(scale)
        spectral_norm(layer.to(dtype))
        assert layer.weight.dtype == dtype
        assert exact_norm(layer, layer.weight) == pytest.approx(1, abs=tolerance)
        layer.weight.sum().backward()
        assert raw(layer).grad.dtype == dtype
        assert raw(layer).grad.isfinite().all()

    def test_estimate_is_not_made_in_autocasts_precision(self):
        layer = spectral_norm(nn.Linear(200, 200))
        with torch.no_grad():
            raw(layer).mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            _ = layer.weight
        assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=1e-5)

    @pytest.mark.parametrize("update", ["step", "forward", "manual"])
    def test_layer_of_fake_tensors_has_shapes_and_no_numbers(self, update):
        with FakeTensorMode():
            layer = spectral_norm(nn.Conv2d(4, 6, 3, groups=2), update=update)
            layer(torch.ones(2, 4, 5, 5)).sum().backward()
            assert raw(layer).grad.shape == (6, 2, 3, 3)

    @pytest.mark.parametrize("update", ["step", "forward", "manual"])
    def test_layer_made_in_inference_mode(self, update):
        with torch.inference_mode():
            layer = spectral_norm(nn.Linear(20, 30), update=update)
            assert exact_norm(layer, layer.weight) == pytest.approx(1, rel=1e-5)

    def test_complex_weight(self):
        layer = nn.Linear(5, 6, dtype=torch.complex64)
        spectral_norm(layer)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-5)
