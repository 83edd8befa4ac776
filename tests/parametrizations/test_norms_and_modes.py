"""What ``norm="bidirectional"`` and ``mode="learnable"`` compute, against the formulas written out."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectralnorm import spectral_norm, update_

CONVOLUTIONS = {
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "grouped conv": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed conv": lambda: nn.ConvTranspose1d(8, 12, 3, groups=2),
    "linear": lambda: nn.Linear(5, 7),
    "embedding": lambda: nn.Embedding(9, 4),
    "channels_last conv": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
}


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def mean_of_both_norms(layer: nn.Module, weight: Tensor) -> Tensor:
    """Outputs first and inputs first, of the largest block each."""
    norms = []
    for rows in (0, 1):
        blocks = weight.chunk(getattr(layer, "groups", 1), dim=0)
        matrices = [block.transpose(0, rows).flatten(1) for block in blocks]
        norms.append(torch.stack([torch.linalg.matrix_norm(each, 2) for each in matrices]).amax())
    return (norms[0] + norms[1]) / 2


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
class TestBidirectional:
    def test_weight_is_divided_by_the_mean_of_both_norms(self, make, device):
        layer = spectral_norm(make().double().to(device), norm="bidirectional", coefficient=2.0)
        torch.testing.assert_close(layer.weight, 2 * raw(layer) / mean_of_both_norms(layer, raw(layer)))

    def test_gradient_is_that_of_the_formula(self, make, device):
        layer = spectral_norm(make().double().to(device), norm="bidirectional")
        other = torch.randn_like(raw(layer))
        (layer.weight * other).sum().backward()
        weight = raw(layer).detach().clone().requires_grad_()
        (weight / mean_of_both_norms(layer, weight) * other).sum().backward()
        torch.testing.assert_close(raw(layer).grad, weight.grad, rtol=1e-6, atol=1e-9)

    def test_both_norms_are_followed_while_the_weight_trains(self, make, device):
        layer = spectral_norm(make().double().to(device), norm="bidirectional")
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(20):
            layer.weight.square().mean().backward()
            optimizer.step()
        expected = raw(layer) / mean_of_both_norms(layer, raw(layer))
        torch.testing.assert_close(layer.weight, expected, rtol=1e-3, atol=1e-5)

    def test_state_dict_restores_it_and_the_way_without_keeping_agrees(self, make, device):
        layer = spectral_norm(make().double().to(device), norm="bidirectional")
        update_(layer)
        other = spectral_norm(make().double().to(device), norm="bidirectional")
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other.weight, layer.weight, rtol=1e-5, atol=1e-8)
        state = {name: each.clone() for name, each in layer.state_dict().items()}
        layer.eval()
        expected = layer.weight.detach()
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.weight.detach()))
        seen: list[Tensor] = []
        inputs = torch.zeros(1, dtype=torch.long, device=device)
        if not isinstance(layer, nn.Embedding):
            inputs = torch.ones_like(raw(layer)[:1]) if isinstance(layer, nn.Linear) else _inputs_of(layer)
        functional_call(layer, state, inputs)
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-8)


def _inputs_of(layer: nn.Module) -> Tensor:
    return torch.ones(1, layer.in_channels, *(5 for _ in layer.kernel_size)).to(raw(layer))


class TestLearnable:
    def test_scale_starts_at_the_coefficient_and_is_the_norm(self, device):
        layer = spectral_norm(nn.Linear(6, 5).to(device), mode="learnable", coefficient=3.0)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(3, rel=1e-5)
        with torch.no_grad():
            layer.parametrizations.weight[0].scale.fill_(0.5)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.5, rel=1e-5)
        assert layer.parametrizations.weight[0].coefficient == 0.5

    def test_scale_is_a_parameter_with_the_gradient_of_a_factor(self, device):
        layer = spectral_norm(nn.Linear(6, 5).double().to(device), mode="learnable", coefficient=3.0)
        assert set(dict(layer.named_parameters())) == {
            "bias",
            "parametrizations.weight.original",
            "parametrizations.weight.0.scale",
        }
        other = torch.randn(5, 6, dtype=torch.float64, device=device)
        (layer.weight * other).sum().backward()
        weight = raw(layer).detach().clone().requires_grad_()
        scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
        (scale * weight / torch.linalg.matrix_norm(weight, 2) * other).sum().backward()
        torch.testing.assert_close(layer.parametrizations.weight[0].scale.grad, scale.grad)
        torch.testing.assert_close(raw(layer).grad, weight.grad, rtol=1e-6, atol=1e-9)

    def test_norm_follows_the_scale_while_both_train(self, device):
        layer = spectral_norm(nn.Linear(6, 5).to(device), mode="learnable")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (-layer.weight[0].sum()).backward()
            optimizer.step()
        scale = layer.parametrizations.weight[0].scale.item()
        assert scale > 1.1
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(scale, rel=1e-3)

    @pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
    def test_a_graph_from_before_a_step_can_still_be_used_after_it(self, options, device):
        layer = spectral_norm(nn.Linear(6, 5).to(device), mode="learnable", coefficient=3.0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, **options)
        loss, same = (layer.weight.square().sum() for _ in range(2))
        expected = torch.autograd.grad(same, list(layer.parametrizations.parameters()))
        layer.weight.pow(3).sum().backward()
        optimizer.step()
        found = torch.autograd.grad(loss, list(layer.parametrizations.parameters()))
        torch.testing.assert_close(found, expected)

    def test_state_dict_and_copies_carry_the_scale(self):
        layer = spectral_norm(nn.Linear(6, 5), mode="learnable", coefficient=3.0)
        other = spectral_norm(nn.Linear(6, 5), mode="learnable")
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other.weight, layer.weight)
        assert torch.equal(copy.deepcopy(layer).weight, layer.weight)

    def test_coefficient_that_is_set_is_the_new_scale_of_the_same_parameter(self):
        layer = spectral_norm(nn.Linear(6, 5), mode="learnable")
        scale = layer.parametrizations.weight[0].scale
        layer.parametrizations.weight[0].coefficient = 4.0
        assert layer.parametrizations.weight[0].scale is scale
        assert scale.item() == 4.0

    @staticmethod
    def trained(layer: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            layer(torch.ones(1, 6)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    @pytest.mark.parametrize("update", ["step", "forward", "manual"])
    def test_optimizer_without_the_scale_is_warned_of_once(self, update):
        layer = nn.Linear(6, 5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        spectral_norm(layer, mode="learnable", update=update)
        with pytest.warns(UserWarning, match=r"parametrizations\.weight\.0\.scale by add_param_group") as found:
            self.trained(layer, optimizer)
        assert len(found) == 1

    @pytest.mark.filterwarnings("error")
    def test_optimizer_that_gets_the_scale_or_has_a_second_one_for_it_is_not_warned_of(self):
        first, second = (nn.Linear(6, 5) for _ in range(2))
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, second)]
        scales = [spectral_norm(layer, mode="learnable").parametrizations.weight[0].scale for layer in (first, second)]
        optimizers[0].add_param_group({"params": [scales[0]]})
        self.trained(first, optimizers[0])
        self.trained(second, optimizers[1], torch.optim.Adam([scales[1]]))

    def test_use_in_inference_mode_computes_the_same(self):
        layer, inputs = spectral_norm(nn.Linear(6, 5), mode="learnable", coefficient=3.0), torch.ones(1, 6)
        with torch.inference_mode():
            outputs = layer(inputs)
        torch.testing.assert_close(layer(inputs), outputs.clone())

    def test_writing_into_the_weight_reaches_the_parameter(self):
        layer = spectral_norm(nn.Linear(6, 5), mode="learnable", coefficient=2.0)
        written = nn.init.orthogonal_(layer.weight, gain=7.0).detach().clone()
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(2, rel=1e-5)
        assert torch.equal(raw(layer), written)


def test_changed_coefficient_keeps_what_was_followed():
    layer = spectral_norm(nn.Linear(200, 150))
    normalization = layer.parametrizations.weight[0]
    frame = normalization._kept.triplets[0].frame.rows
    normalization.coefficient = 2.0
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(2, rel=1e-4)
    assert normalization._kept.triplets[0].frame.rows is frame


@pytest.mark.usefixtures("engine_or_kernels")
@pytest.mark.parametrize("mode", ["normalize", "cap"])
def test_a_finite_weight_whose_norm_is_not_is_left_alone(mode, device):
    layer = nn.Linear(64, 64, bias=False).to(device)
    nn.init.constant_(layer.weight, 1e38)
    spectral_norm(layer, mode=mode)
    for _ in range(2):
        assert torch.equal(layer.weight, raw(layer))
        with torch.no_grad():
            raw(layer).neg_()
    layer.weight.sum().backward()
    assert torch.equal(raw(layer).grad, torch.ones_like(raw(layer)))
