"""``strict=True``: the norm of what a layer computes with is never above the coefficient."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import spectralnorm as sn
from spectralnorm import SpectralNorm, UserError, spectral_norm
from spectralnorm.transform import load_tracking_state, tracking_state

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), "weight"),
    "linear of one batch": (lambda: nn.Linear(40, 24), "weight"),
    "large linear": (lambda: nn.Linear(300, 280), "weight"),
    "one output": (lambda: nn.Linear(7, 1), "weight"),
    "embedding": (lambda: nn.Embedding(10, 4), "weight"),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "weight"),
    "lstm": (lambda: nn.LSTM(5, 6), "weight_hh_l0"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
    "vector": (lambda: nn.Linear(5, 9), "bias"),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact_norm(weight: torch.Tensor) -> float:
    """By SVD in float64, less than what it may be off by: 1e-14."""
    weight = weight.detach().double().cpu()
    return torch.linalg.svdvals(weight.flatten(1) if weight.ndim > 1 else weight[:, None])[0].item() * (1 - 1e-14)


def raw(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    return layer.parametrizations[name].original


def train(layer: nn.Module, name: str, num_steps: int, coefficient: float, loosest: float) -> None:
    """Large steps of Adam; after each the norm is looked at, by turns in training and in evaluation mode."""
    # Adam's usual eps is zero in float16.
    optimizer = torch.optim.Adam([raw(layer, name)], lr=1e-2, eps=1e-4)
    lowest = coefficient
    for step in range(num_steps):
        layer.train(step % 3 != 0)
        weight = getattr(layer, name)
        norm = exact_norm(weight)
        assert norm <= coefficient
        lowest = min(lowest, norm)
        optimizer.zero_grad()
        (weight * torch.randn_like(weight)).sum().backward()
        optimizer.step()
    assert lowest > loosest * coefficient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "name"), LAYERS.values(), ids=LAYERS)
class TestTraining:
    def test_norm_is_never_above_the_coefficient(self, make, name, dtype, device):
        layer = spectral_norm(make().to(device, dtype), name, strict=True, coefficient=0.7)
        train(layer, name, 40, 0.7, loosest=0.9)

    @pytest.mark.sweep
    def test_norm_is_never_above_the_coefficient_in_a_long_training(self, make, name, dtype, device):
        layer = spectral_norm(make().to(device, dtype), name, strict=True, coefficient=0.7)
        train(layer, name, 2000, 0.7, loosest=0.9)


def test_layers_renewed_together_keep_the_bound(device):
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)), nn.Linear(12, 30), nn.Linear(30, 12)).to(device)
    sn.add_spectral_norm(model, strict=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(8, 12, device=device)).square().mean().backward()
        optimizer.step()
        for layer in model:
            assert 0.97 < exact_norm(layer.weight) <= 1


def test_cap_leaves_a_smaller_weight_alone_and_brings_a_larger_one_down(device):
    small, large = nn.Linear(6, 8).to(device), nn.Linear(6, 8).to(device)
    spectral_norm(small, strict=True, mode="cap", coefficient=50.0)
    spectral_norm(large, strict=True, mode="cap", coefficient=0.1)
    assert torch.equal(small.weight, raw(small))
    assert 0.099 < exact_norm(large.weight) <= 0.1


def test_cap_holds_on_both_sides_of_the_coefficient():
    layer = spectral_norm(nn.Linear(6, 8), strict=True, mode="cap")
    norm = exact_norm(raw(layer))
    for scale in (1 - 1e-3, 1 - 1e-6, 1 - 1e-7, 1, 1 + 1e-7, 1 + 1e-6, 1 + 1e-3):
        with torch.no_grad():
            raw(layer).mul_(scale / norm)
        norm = exact_norm(raw(layer))
        assert exact_norm(layer.weight) <= 1


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["noise", "constant", "one large entry"])
def test_under_autocast_the_bound_holds_after_the_rounding(autocast, kind, device):
    layer = nn.Linear(60, 50).to(device)
    with torch.no_grad():
        if kind == "constant":
            layer.weight.fill_(0.337)
        if kind == "one large entry":
            layer.weight[0, 0] = 1000.0
    spectral_norm(layer, strict=True)
    outside = layer.weight
    with torch.autocast(device.type, autocast):
        weight = layer.weight
        assert torch.equal(weight, weight.to(autocast).to(weight.dtype))
        assert 0.9 < exact_norm(weight) <= 1
        inputs = torch.eye(60, device=device)
        assert exact_norm((layer(inputs) - layer(0 * inputs)).T) <= 1
        with torch.no_grad():
            assert torch.equal(layer.weight, weight)
        layer(inputs).sum().backward()
    assert raw(layer).grad.dtype == torch.float32
    assert torch.equal(layer.weight, outside)


def test_write_into_the_value_under_autocast_reaches_the_parameter(device):
    layer = spectral_norm(nn.Linear(6, 8).to(device), strict=True)
    with torch.autocast(device.type, torch.bfloat16):
        nn.init.constant_(layer.weight, 3.0)
        assert exact_norm(layer.weight) <= 1
    assert torch.equal(raw(layer), torch.full_like(raw(layer), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestOtherWays:
    """To a value: none goes around the bound."""

    def test_in_place_writes_loads_and_copies(self, dtype, device):
        layer = spectral_norm(nn.Linear(30, 20).to(device, dtype), strict=True)
        for change in (
            lambda: nn.init.uniform_(layer.weight, -3.0, 3.0),
            lambda: raw(layer).detach().mul_(17).add_(1),
            lambda: (raw(layer).data.normal_(std=5.0), sn.invalidate(layer)),
            lambda: layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}),
            lambda: setattr(layer, "weight", torch.randn_like(raw(layer))),
        ):
            before = layer.weight.detach().clone()
            change()
            for make in (lambda: layer, lambda: copy.deepcopy(layer), layer.eval):
                module = make()
                assert 0.9 < exact_norm(module.weight) <= 1
                # It is seen: the value is that of the numbers which are there now.
                assert not torch.equal(module.weight, before)
                expected = raw(module).double() / exact_norm(raw(module))
                torch.testing.assert_close(module.weight.double(), expected, rtol=2e-2, atol=2e-3)

    def test_averaged_model(self, dtype, device):
        layer = spectral_norm(nn.Linear(30, 20).to(device, dtype), strict=True)
        average = AveragedModel(layer, avg_fn=lambda old, new, _: old * 0.9 + new * 0.1)
        for _ in range(5):
            with torch.no_grad():
                raw(layer).add_(torch.randn_like(raw(layer)))
            average.update_parameters(layer)
            assert 0.9 < exact_norm(average.module.weight) <= 1

    def test_functional_call_uses_the_bound_of_what_it_is_given(self, dtype, device):
        layer = spectral_norm(nn.Linear(30, 20, bias=False).to(device, dtype), strict=True)
        name = "parametrizations.weight.original"
        inputs = torch.eye(30, device=device, dtype=dtype)
        for is_training in (True, False):
            layer.train(is_training)
            for _ in range(3):
                weight = torch.randn(20, 30, device=device, dtype=dtype)
                assert 0.7 < exact_norm(functional_call(layer, {name: weight}, inputs)) <= 1

    @pytest.mark.usefixtures("vmap_of_bits")
    def test_vmap(self, dtype, device):
        layer = spectral_norm(nn.Linear(30, 20, bias=False).to(device, dtype), strict=True).eval()
        weights = torch.randn(4, 20, 30, device=device, dtype=dtype)
        inputs = torch.eye(30, device=device, dtype=dtype)

        def outputs(weight):
            return functional_call(layer, {"parametrizations.weight.original": weight}, inputs)

        assert all(0.7 < exact_norm(each) <= 1 for each in torch.vmap(outputs)(weights))

    @pytest.mark.parametrize("update", ["forward", "manual"])
    def test_other_update_rules(self, update, dtype, device):
        layer = spectral_norm(nn.Linear(30, 20).to(device, dtype), strict=True, update=update)
        for _ in range(3):
            with torch.no_grad():
                raw(layer).copy_(torch.randn_like(raw(layer)))
            assert 0.7 < exact_norm(layer.weight) <= 1


def test_compiled_layer_keeps_the_bound():
    layer = spectral_norm(nn.Linear(30, 20, bias=False), strict=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        with torch.no_grad():
            raw(layer).copy_(torch.randn_like(raw(layer)))
        assert 0.95 < exact_norm(compiled(torch.eye(30))) <= 1


def test_resumed_training_is_the_same_to_the_last_bit():
    def steps(model, optimizer, num):
        torch.manual_seed(num)
        for _ in range(num):
            optimizer.zero_grad()
            model(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()

    def made():
        model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 12)), strict=True)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    model, optimizer = made()
    steps(model, optimizer, 5)
    again, its_optimizer = made()
    again.load_state_dict(model.state_dict())
    load_tracking_state(again, tracking_state(model))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 4)
    steps(again, its_optimizer, 4)
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_monitor_shows_the_guaranteed_bound():
    layer = spectral_norm(nn.Linear(30, 20), strict=True)
    norm = exact_norm(raw(layer))
    assert norm <= sn.monitor(layer)["weight"] < 1.01 * norm
    assert norm <= layer.parametrizations.weight[0].sigma_upper(raw(layer)).item()
    assert "at most" in sn.summary(layer).rows[0].note


class TestGradient:
    @pytest.mark.parametrize("mode", ["normalize", "cap"])
    def test_is_that_of_the_estimate_times_a_constant(self, mode, device):
        """With sigma = u' W v times the bound over its value: u, v and that quotient constant (float64)."""
        layer = spectral_norm(nn.Linear(9, 7).to(device, torch.float64), strict=True, mode=mode, coefficient=0.3)
        normalization, weight = layer.parametrizations.weight[0], raw(layer)
        probe = torch.randn_like(weight)
        (layer.weight * probe).sum().backward()
        u, v = normalization.vectors(weight)
        sigma = u @ weight @ v
        ratio = (normalization.sigma_upper(weight) / sigma).detach()
        (expected,) = torch.autograd.grad((weight / (sigma * ratio / 0.3) * probe).sum(), weight)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-12)

    def test_agrees_with_the_functional_path(self, device):
        layer = spectral_norm(nn.Linear(9, 7, bias=False).to(device, torch.float64), strict=True).eval()
        weight, probe = raw(layer), torch.randn(7, 9, dtype=torch.float64, device=device)
        (kept,) = torch.autograd.grad((layer.weight * probe).sum(), weight)
        copied = weight.detach().clone().requires_grad_()
        inputs = torch.eye(9, dtype=torch.float64, device=device)
        outputs = functional_call(layer, {"parametrizations.weight.original": copied}, inputs)
        (functional,) = torch.autograd.grad((outputs.T * probe).sum(), copied)
        # Each divides by a bound of its own, and by nothing else.
        assert torch.linalg.vector_norm(kept).item() == pytest.approx(torch.linalg.vector_norm(functional).item(), 1e-3)
        directions = [torch.nn.functional.normalize(each.flatten(), dim=0) for each in (kept, functional)]
        torch.testing.assert_close(*directions, rtol=1e-6, atol=1e-9)

    def test_second_derivative_agrees_with_the_formula(self, device):
        layer = spectral_norm(nn.Linear(6, 5).to(device, torch.float64), strict=True)
        normalization, weight = layer.parametrizations.weight[0], raw(layer)
        u, v = (vector.clone() for vector in normalization.vectors(weight))
        ratio = (normalization.sigma_upper(weight) / (u @ weight @ v)).detach()

        def second(value):
            (first,) = torch.autograd.grad(value.pow(3).sum(), weight, create_graph=True)
            return torch.autograd.grad(first.square().sum(), weight)[0]

        torch.testing.assert_close(second(layer.weight), second(weight / (u @ weight @ v * ratio)))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weight_without_a_norm_is_handed_out_as_without_strict(value):
    strict, plain = spectral_norm(nn.Linear(4, 3), strict=True), spectral_norm(nn.Linear(4, 3))
    for layer in (strict, plain):
        with torch.no_grad():
            raw(layer).fill_(value)
    assert torch.equal(strict.weight.nan_to_num(), plain.weight.nan_to_num())
    with torch.no_grad():
        raw(strict).normal_()
    assert exact_norm(strict.weight) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "bidirectional"}, 'strict=True is not offered together with norm="bidirectional"'),
        ({"mode": "learnable"}, 'strict=True is not offered together with mode="learnable"'),
    ],
)
def test_option_without_a_bound_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        SpectralNorm(nn.Linear(2, 2), strict=True, **options)
