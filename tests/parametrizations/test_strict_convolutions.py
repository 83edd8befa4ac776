"""``strict=True`` of convolutions: the norm of the map of images is never above the coefficient."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm import UserError, spectral_norm
from spectralnorm.transform import load_tracking_state, tracking_state

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), [(7,), (12,)]),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), [(5, 5), (9, 6)]),
    "stride": (lambda: nn.Conv2d(2, 4, 4, stride=2, padding=1), [(6, 6), (8, 5)]),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), [(6, 7)]),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), [(6, 6)]),
    "same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), [(6, 6)]),
    "patches": (lambda: nn.Conv2d(3, 5, 2, stride=2), [(6, 6), (7, 7)]),
    "pointwise": (lambda: nn.Conv2d(4, 5, 1), [(3, 3)]),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), [(5, 6)]),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), [(5, 6)]),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), [(5, 6)]),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), [(4, 4)]),
    "transposed patches": (lambda: nn.ConvTranspose2d(1, 4, 2, stride=2), [(2, 2)]),
    "output padding": (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1), [(4, 3)]),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), [(3, 4, 3)]),
}


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def exact_norm(layer: nn.Module, weight: torch.Tensor, size: tuple[int, ...]) -> float:
    """By SVD, in float64, of what torch's layer does to every unit image; less than what it may be off by: 1e-13."""
    plain = sn.remove_spectral_norm(copy.deepcopy(layer)).double().cpu()
    channels = plain.in_channels
    units = torch.eye(channels * torch.Size(size).numel(), dtype=torch.float64).view(-1, channels, *size)
    with torch.no_grad():
        images = functional_call(plain, {"weight": weight.detach().double().cpu(), "bias": None}, units)
    return torch.linalg.svdvals(images.flatten(1))[0].item() * (1 - 1e-13)


def train(layer: nn.Module, sizes: list[tuple[int, ...]], num_steps: int, look_every: int) -> None:
    optimizer = torch.optim.Adam([raw(layer)], lr=1e-2, eps=1e-4)
    for step in range(num_steps):
        layer.train(step % 3 != 0)
        weight = layer.weight
        if step % look_every == 0:
            norms = [exact_norm(layer, weight, size) for size in sizes]
            assert max(norms) <= 0.8
        optimizer.zero_grad()
        (weight * torch.randn_like(weight)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "sizes"), LAYERS.values(), ids=LAYERS)
class TestTraining:
    def test_norm_is_never_above_the_coefficient(self, make, sizes, dtype, device):
        layer = spectral_norm(make().to(device, dtype), strict=True, coefficient=0.8)
        train(layer, sizes, 12, 3)

    @pytest.mark.sweep
    def test_norm_is_never_above_the_coefficient_in_a_long_training(self, make, sizes, dtype, device):
        layer = spectral_norm(make().to(device, dtype), strict=True, coefficient=0.8)
        train(layer, sizes, 2000, 5)


@pytest.mark.parametrize("kernel", ["noise", "constant"])
def test_bound_is_near_to_the_norm_of_large_images(kernel, device):
    layer = nn.Conv2d(3, 4, 3, padding=1).to(device)
    if kernel == "constant":
        nn.init.constant_(layer.weight, 0.1)
    spectral_norm(layer, strict=True)
    assert 0.9 < exact_norm(layer, layer.weight, (14, 14)) <= 1


@pytest.mark.parametrize("options", [{"strict": True}, {"norm": "operator"}], ids=["strict", "operator"])
def test_the_refusal_of_another_size_promises_all_sizes_of_strict_norms_alone(options):
    layer = spectral_norm(nn.Conv2d(1, 2, 3), input_size=(6, 6), **options)
    with pytest.raises(UserError, match="a strict norm then holds for all sizes, an estimate for the first one"):
        layer(torch.ones(1, 1, 6, 7))


def test_given_input_size_is_nearer_and_another_one_is_refused(device):
    anywhere = spectral_norm(nn.Conv2d(3, 4, 3, padding=1).to(device), strict=True)
    layer = nn.Conv2d(3, 4, 3, padding=1).to(device)
    layer.load_state_dict({"weight": raw(anywhere).detach(), "bias": anywhere.bias.detach()})
    spectral_norm(layer, strict=True, input_size=(6, 6))
    assert exact_norm(anywhere, anywhere.weight, (6, 6)) < exact_norm(layer, layer.weight, (6, 6)) <= 1
    layer(torch.ones(1, 3, 6, 6, device=device))
    with pytest.raises(UserError, match=r"is normalized for inputs of size \(6, 6\), got \(6, 7\)"):
        copy.deepcopy(layer)(torch.ones(1, 3, 6, 7, device=device))
    assert type(sn.remove_spectral_norm(layer)) is nn.Conv2d
    layer(torch.ones(1, 3, 6, 7, device=device))


@pytest.mark.parametrize(
    "options", [{"strict": True, "input_size": (6, 6)}, {"norm": "operator"}], ids=["given", "first"]
)
@pytest.mark.parametrize("has_other", [False, True])
def test_torchs_own_removal_ends_the_interest_in_images(options, has_other):
    layer = nn.Conv2d(2, 3, 3, padding=1)
    if has_other:
        torch_parametrizations.weight_norm(layer, "bias", dim=None)
    spectral_norm(layer, **options)
    parametrize.remove_parametrizations(layer, "weight")
    layer(torch.ones(1, 2, 5, 5))
    if not has_other:
        assert type(layer) is nn.Conv2d
        assert not layer._forward_pre_hooks
        assert not layer._load_state_dict_pre_hooks
    spectral_norm(layer, strict=True, input_size=(5, 5))
    layer(torch.ones(1, 2, 5, 5))
    with pytest.raises(UserError, match=r"is normalized for inputs of size \(5, 5\), got \(6, 6\)"):
        layer(torch.ones(1, 2, 6, 6))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_under_autocast_the_bound_holds_after_the_rounding(autocast, device):
    layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1).to(device), strict=True)
    with torch.autocast(device.type, autocast):
        weight = layer.weight
    assert torch.equal(weight, weight.to(autocast).to(weight.dtype))
    assert 0.85 < exact_norm(layer, weight, (10, 10)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_copies_and_functional_calls_keep_the_bound(dtype, device):
    layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1).to(device, dtype), strict=True)
    layer.load_state_dict({key: torch.randn_like(value) for key, value in layer.state_dict().items()})
    for module, is_training in itertools.product((layer, copy.deepcopy(layer)), (True, False)):
        assert 0.8 < exact_norm(layer, module.train(is_training).weight, (8, 8)) <= 1
        part = module.parametrizations.weight[0]
        weight = torch.randn(4, 3, 3, 3, device=device, dtype=dtype)
        assert 0.7 < exact_norm(layer, part(weight), (8, 8)) <= 1


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.ConvTranspose2d(1, 4, 2, stride=1)])
def test_compiled_layer_keeps_the_bound(make):
    layer = make()
    with torch.no_grad():
        if layer.transposed:  # its norm is above the one with outputs first, as often as can be
            layer.weight.copy_(torch.eye(4).view(1, 4, 2, 2))
    spectral_norm(layer, strict=True)
    value = torch.compile(lambda: layer.weight, backend="aot_eager", fullgraph=True)()
    assert 0.2 < exact_norm(layer, value, (8, 8)) <= 1


def without_overlap(device):
    """Each output channel writes one tap: with outputs first the norm is 1, of the map it is 2."""
    layer = nn.ConvTranspose2d(1, 4, 2, stride=2).to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4).view(1, 4, 2, 2))
    return spectral_norm(layer, strict=True)


def test_transposed_convolution_without_overlap_is_divided_by_the_norm_of_its_own_matrix(device):
    layer = without_overlap(device)
    assert 0.99 < exact_norm(layer, layer.weight, (2, 2)) <= 1


@pytest.mark.usefixtures("vmap_of_bits")
def test_transposed_convolution_without_overlap_is_divided_by_the_same_norm_under_vmap(device):
    layer = without_overlap(device)
    value = torch.vmap(layer.parametrizations.weight[0])(raw(layer)[None])[0]
    assert 0.99 < exact_norm(layer, value, (2, 2)) <= 1


def test_shared_weight_of_two_convolutions_with_different_maps_is_refused():
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2)
    second.weight = first.weight
    with pytest.raises(UserError, match="share a weight"):
        sn.add_spectral_norm(nn.Sequential(first, second), strict=True)


@pytest.mark.parametrize(
    ("input_size", "message"),
    [
        ((4,), "one integer for each of 2 axes"),
        ((2, 2), "large enough for the kernel"),
        ("large", "one positive integer for each axis"),
        ((4, -1), "one positive integer for each axis"),
    ],
)
def test_input_size_that_does_not_fit_is_refused(input_size, message):
    with pytest.raises(UserError, match=message):
        spectral_norm(nn.Conv2d(2, 2, 3), strict=True, input_size=input_size)


class TestEstimateOfTheMap:
    """``norm="operator"``"""

    @pytest.mark.parametrize(("make", "sizes"), LAYERS.values(), ids=LAYERS)
    def test_norm_of_the_map_is_the_coefficient_at_the_size_of_the_first_image(self, make, sizes, device):
        layer = spectral_norm(make().to(device), norm="operator", coefficient=0.8)
        for size in sizes[:1]:
            layer(torch.ones(1, layer.in_channels, *size, device=device))
            assert exact_norm(layer, layer.weight, size) == pytest.approx(0.8, rel=1e-4)

    @pytest.mark.parametrize(("make", "sizes"), LAYERS.values(), ids=LAYERS)
    def test_norm_stays_near_while_the_weight_moves(self, make, sizes, device):
        layer = spectral_norm(make().to(device), norm="operator", input_size=sizes[0])
        optimizer = torch.optim.Adam([raw(layer)], lr=1e-3)
        images = torch.randn(2, layer.in_channels, *sizes[0], device=device)
        for _ in range(20):
            optimizer.zero_grad()
            layer(images).relu().mean().backward()
            optimizer.step()
            assert exact_norm(layer, layer.weight, sizes[0]) == pytest.approx(1, rel=2e-2)

    def test_gradient_is_that_of_the_norm(self, device):
        layer = spectral_norm(
            nn.Conv2d(2, 3, 3, padding=1).to(device, torch.float64), norm="operator", input_size=(4, 4)
        )
        probe = torch.randn_like(raw(layer))
        (found,) = torch.autograd.grad((layer.weight * probe).sum(), raw(layer))
        weight = raw(layer).detach().clone().requires_grad_()
        units = torch.eye(32, dtype=torch.float64, device=device).view(32, 2, 4, 4)
        norm = torch.linalg.svdvals(nn.functional.conv2d(units, weight, padding=1).flatten(1))[0]
        (expected,) = torch.autograd.grad((weight / norm * probe).sum(), weight)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("update", ["forward", "manual"])
    def test_other_update_rule_is_refused(self, update):
        with pytest.raises(UserError, match="offered with update"):
            spectral_norm(nn.Conv2d(2, 3, 3), norm="operator", update=update)

    def test_state_dict_has_torchs_keys(self):
        layer = spectral_norm(nn.Conv2d(2, 3, 3), norm="operator")
        plain = spectral_norm(nn.Conv2d(2, 3, 3))
        assert layer.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(layer.state_dict())

    def test_of_other_layers_it_is_the_norm_of_the_matrix(self):
        layer = spectral_norm(nn.Linear(5, 6), norm="operator")
        assert torch.linalg.svdvals(layer.weight.detach())[0].item() == pytest.approx(1, rel=1e-5)

    def test_resumed_training_is_the_same_to_the_last_bit(self):
        def steps(model, optimizer, num):
            torch.manual_seed(num)
            for _ in range(num):
                optimizer.zero_grad()
                model(torch.randn(2, 2, 6, 6)).square().mean().backward()
                optimizer.step()

        def made():
            model = spectral_norm(nn.Conv2d(2, 3, 3, padding=1), norm="operator")
            return model, torch.optim.Adam(model.parameters(), lr=1e-2)

        model, optimizer = made()
        steps(model, optimizer, 5)
        again, its_optimizer = made()
        again.load_state_dict(model.state_dict())
        load_tracking_state(again, tracking_state(model))
        its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(model, optimizer, 4)
        steps(again, its_optimizer, 4)
        assert torch.equal(raw(model), raw(again))

    def test_another_coefficient_divides_again_by_the_norm_that_is_known(self):
        layer = spectral_norm(nn.Conv2d(2, 3, 3, padding=1), norm="operator", input_size=(6, 6))
        layer.parametrizations.weight[0].coefficient = 3.0
        assert exact_norm(layer, layer.weight, (6, 6)) == pytest.approx(3, rel=1e-4)
        assert sn.summary(layer).rows[0].norm == pytest.approx(3, rel=1e-4)

    def test_functional_call_divides_by_the_norm_of_what_it_is_given(self):
        layer = spectral_norm(nn.Conv2d(2, 3, 3, padding=1), norm="operator", input_size=(6, 6))
        before = layer.weight
        value = layer.parametrizations.weight[0](torch.randn(3, 2, 3, 3))
        assert exact_norm(layer, value, (6, 6)) == pytest.approx(1, rel=1e-4)
        assert torch.equal(layer.weight, before)
