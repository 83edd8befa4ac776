"""``add_spectral_norm(input_shape=...)``: each convolution is normalized for the images that it meets."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import spectralnorm as sn
from spectralnorm import UserError, add_spectral_norm
from spectralnorm.parametrizations import normalization_of


def made() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 5, 4, stride=2, padding=1),
        nn.ConvTranspose2d(5, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(3 * 36, 1),
    )


def exact_norm(layer: nn.Module, size: tuple[int, ...]) -> float:
    """By SVD of what the layer does to every unit image, less than what it may be off by."""
    weight = layer.weight.detach().double().cpu()
    plain = sn.remove_spectral_norm(copy.deepcopy(layer)).double().cpu()
    units = torch.eye(plain.in_channels * torch.Size(size).numel(), dtype=torch.float64).view(
        -1, plain.in_channels, *size
    )
    outputs = functional_call(plain, {"weight": weight, "bias": None}, units).detach()
    return torch.linalg.svdvals(outputs.flatten(1))[0].item() * (1 - 1e-13)


@pytest.mark.parametrize("options", [{"strict": True}, {"norm": "operator"}])
def test_each_convolution_gets_the_size_that_it_meets(options, device):
    model = made().to(device).train()
    statistics = copy.deepcopy(model[1].state_dict())
    add_spectral_norm(model, input_shape=(2, 6, 6), **options)
    sizes = [normalization_of(model[place]).input_size for place in (0, 3, 4)]
    assert sizes == [(6, 6), (6, 6), (3, 3)]
    assert all(torch.equal(value, statistics[name]) for name, value in model[1].state_dict().items())
    assert all(module.training for module in model.modules())
    model(torch.randn(2, 2, 6, 6, device=device))
    for place, size in zip((0, 3, 4), sizes, strict=True):
        limit = 1 if "strict" in options else 1.01
        assert 0.85 < exact_norm(model[place], size) <= limit
    with pytest.raises(UserError, match="normalized for inputs of size"):
        model[0](torch.randn(2, 2, 7, 7, device=device))


def test_a_second_call_changes_nothing_and_another_shape_is_refused():
    model = add_spectral_norm(made(), strict=True, input_shape=(2, 6, 6))
    before = model[0].weight.clone()
    add_spectral_norm(model, strict=True, input_shape=(2, 6, 6))
    assert torch.equal(model[0].weight, before)
    with pytest.raises(UserError, match="input"):
        add_spectral_norm(model, strict=True, input_shape=(2, 8, 8))


def test_certificate_finds_the_same_sizes_and_a_constant_of_one():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 4, stride=2, padding=1), nn.Flatten()
    )
    add_spectral_norm(model, strict=True, input_shape=(2, 8, 8))
    certificate = sn.certify(model.eval(), (2, 8, 8))
    # Each layer's certificate may be looser than its norm by what the torus allows, as the divisor is.
    assert 0.5 < certificate.upper_bound <= 1 + 1e-9


def test_convolution_that_is_not_used_holds_for_all_sizes():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)

        def forward(self, images):
            return self.used(images)

    model = add_spectral_norm(Unused(), strict=True, input_shape=(1, 5, 5))
    assert normalization_of(model.used).input_size == (5, 5)
    assert normalization_of(model.unused).input_size is None


def test_layers_that_wait_for_their_first_images_learn_nothing_of_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    sn.spectral_norm(model[0], norm="operator")
    part = normalization_of(model[0])
    weight = model[0].weight.detach().clone()
    add_spectral_norm(model, include="1", norm="operator", input_shape=(3, 32, 32))
    assert part.learned_size is None
    with pytest.raises(UserError, match="input_size cannot be changed"):
        add_spectral_norm(model, include="0", norm="operator", input_shape=(3, 32, 32))
    assert part.learned_size is None
    assert torch.equal(model[0].weight, weight)
    model[0](torch.randn(1, 3, 8, 8))
    assert part.learned_size == (8, 8)


def test_what_a_forward_leaves_in_the_model_is_not_left_by_that_without_values():
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3)
            self.seen, self.grids = [], {}

        def forward(self, images):
            grid = self.grids.setdefault(images.shape[-1], torch.ones(images.shape[-1], device=images.device))
            self.last = self.layer(images * grid)
            self.seen.append(self.last.shape)
            return self.last

    model = add_spectral_norm(Remembering(), strict=True, input_shape=(1, 9, 9))
    assert not hasattr(model, "last")
    assert (model.seen, model.grids) == ([], {})
    model(torch.ones(1, 1, 9, 9))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_mode_stays_of_layers_that_keep_theirs_elsewhere(training):
    scripted = torch.jit.script(nn.Sequential(nn.Dropout()))
    model = nn.Sequential(nn.Conv2d(1, 1, 3), scripted).train(training)
    add_spectral_norm(model, strict=True, input_shape=(1, 9, 9))
    assert [module.training for module in scripted.modules()] == [training, training]


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3)

    def forward(self, images):
        return self.layer(self.layer(images))


class _ByValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3)

    def forward(self, images):
        return self.layer(images) if images.sum() > 0 else images


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (_Twice(), {"input_shape": (1, 9, 9)}, r"layer reads images of sizes \(9, 9\) and \(7, 7\)"),
        (_ByValues(), {"input_shape": (1, 9, 9)}, "_ByValues with one tensor that has no values, which failed"),
        (nn.Conv2d(3, 1, 3), {"input_shape": (1, 9, 9)}, "which failed"),
        (nn.LazyConv2d(1, 3), {"input_shape": (1, 9, 9)}, "needs weights that have shapes"),
        (nn.Conv2d(1, 1, 3), {"input_shape": (1, -9, 9)}, "input_shape must be positive integers"),
        (nn.Conv2d(1, 1, 3), {"input_shape": "large"}, "input_shape must be positive integers"),
        (nn.Conv2d(1, 1, 3), {"input_shape": (1, 9, 9), "strict": False}, "input_shape is for strict=True"),
        (nn.Conv2d(1, 1, 3), {"input_shape": (1, 9, 9), "input_size": (9, 9)}, "give one of them"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_nothing_is_changed(model, options, message):
    with pytest.raises(UserError, match=message):
        add_spectral_norm(model, **{"strict": True, **options})
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    assert not any(module._forward_pre_hooks for module in model.modules() if not isinstance(module, nn.LazyConv2d))
