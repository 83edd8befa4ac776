import copy

import pytest
import torch
from torch import nn

from spectralnorm import UserError, add_spectral_norm
from spectralnorm.transform import load_tracking_state, tracking_state


def _model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 1))
    return add_spectral_norm(layers).to(device)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, device: torch.device) -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6, generator=random).to(device)).square().mean().backward()
        optimizer.step()


def test_a_restored_model_goes_on_to_the_last_bit(device: torch.device):
    model = _model(device)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.5), 5, device)
    saved = copy.deepcopy(model.state_dict()), {k: v.clone() for k, v in tracking_state(model).items()}
    assert saved[1]

    restored = _model(device)
    restored.load_state_dict(saved[0])
    load_tracking_state(restored, saved[1])
    for each in (model, restored):
        _train(each, torch.optim.SGD(each.parameters(), lr=0.5), 5, device)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_tracking_is_restored_in_inference_mode(device: torch.device):
    model = _model(device)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.5), 5, device)
    restored = copy.deepcopy(model)
    with torch.inference_mode():
        load_tracking_state(restored, tracking_state(model))
    for each in (model, restored):
        _train(each, torch.optim.SGD(each.parameters(), lr=0.5), 5, device)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_a_model_without_normalization_has_nothing_to_track(device: torch.device):
    model = nn.Linear(3, 2, device=device)
    assert tracking_state(model) == {}
    load_tracking_state(model, {})


def test_layers_that_are_not_named_find_their_norms_anew(device: torch.device):
    model = _model(device)
    load_tracking_state(model, {})
    weight = model[3].weight.detach()
    assert abs(torch.linalg.matrix_norm(weight.double(), 2).item() - 1) < 1e-4


@pytest.mark.parametrize("other", [{"size": 5}, {"norm": "bidirectional"}], ids=["shape", "norm"])
def test_state_of_another_model_is_refused_before_anything_is_restored(other):
    def made(size: int = 3, norm: str = "matrix") -> nn.Module:
        layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(size, 3))
        return add_spectral_norm(add_spectral_norm(layers, include="0"), norm=norm, exclude="0")

    torch.manual_seed(0)
    state = tracking_state(made())
    model = made(**other)
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(
        UserError, match="The tracking state has vectors of 1 for a weight of another shape, or another"
    ):
        load_tracking_state(model, state)
    assert [torch.equal(layer.weight, kept) for layer, kept in zip(model, before, strict=True)] == [True, True]
