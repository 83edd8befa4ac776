"""`optimizer_step`: what the user says is a step of training is followed as one of an optimizer."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn

INPUTS = torch.linspace(-1, 1, 5 * 150).view(5, 150)


def model(**options) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(150, 140), nn.ReLU(), nn.Linear(140, 30), nn.Linear(30, 1))
    return sn.add_spectral_norm(layers, **options)


def lose(layers: nn.Module) -> Tensor:
    layers.zero_grad()
    loss = layers(INPUTS).square().sum()
    loss.backward()
    return loss.detach()


def by_hand(layers: nn.Module) -> None:
    with torch.no_grad(), sn.optimizer_step(layers):
        for parameter in layers.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)


def through_data(layers: nn.Module) -> None:
    with sn.optimizer_step(layers):
        for parameter in layers.parameters():
            parameter.data.sub_(parameter.grad, alpha=0.1)


def by_new_storage(layers: nn.Module) -> None:
    with sn.optimizer_step(layers):
        for parameter in layers.parameters():
            parameter.data = parameter.data.sub(parameter.grad, alpha=0.1)


def by_optimizer(layers: nn.Module) -> None:
    torch.optim.SGD(layers.parameters(), lr=0.1).step()


def by_optimizer_within(layers: nn.Module) -> None:
    with sn.optimizer_step(layers):
        by_optimizer(layers)


def in_two_halves(layers: nn.Module) -> None:
    with torch.no_grad(), sn.optimizer_step(layers):
        for parameter in layers.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
            parameter.add_(1)
            parameter.sub_(1)


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def refuse_refinement(monkeypatch) -> None:
    monkeypatch.setattr(sn.SpectralNorm, "refined", lambda *_: pytest.fail("the norm was computed anew"))


@pytest.mark.parametrize("update", [by_hand, through_data, by_new_storage, by_optimizer_within, in_two_halves])
@pytest.mark.parametrize("options", [{}, {"strict": True}, {"mode": "learnable"}], ids=["plain", "strict", "learnable"])
def test_any_update_is_followed_as_an_optimizers_step(update, options, monkeypatch):
    mine, theirs = model(**options), model(**options)
    refuse_refinement(monkeypatch)
    for _ in range(4):
        torch.testing.assert_close(lose(mine), lose(theirs))
        update(mine)
        by_optimizer(theirs)
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], expected)


def test_without_it_the_norm_of_a_weight_that_moved_far_is_computed_anew(monkeypatch):
    layers, seen, refined = model(), [], sn.SpectralNorm.refined
    monkeypatch.setattr(sn.SpectralNorm, "refined", lambda *args: seen.append(args) or refined(*args))
    lose(layers)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.sub_(parameter.grad).mul_(2)
    lose(layers)
    assert len(seen) == 3


def test_a_write_before_it_is_not_taken_for_the_step():
    layers = model()
    lose(layers)
    with torch.no_grad():
        raw(layers[0]).copy_(3 * torch.randn(140, 150))
    by_hand(layers)
    norm = torch.linalg.matrix_norm(layers[0].weight.detach().double(), 2)
    assert float(norm) == pytest.approx(1, rel=1e-4)


def test_other_models_are_left_alone():
    layers = model()
    other = copy.deepcopy(layers)
    before = other[0].weight
    lose(layers)
    by_hand(layers)
    assert other[0].weight.data_ptr() == before.data_ptr()
    assert torch.equal(other[0].weight, before)


def test_a_weight_that_layers_share_is_one(renewals):
    first, second, third = (nn.Linear(6, 6) for _ in range(3))
    third.weight = second.weight
    layers = sn.add_spectral_norm(nn.Sequential(first, second, third))
    for _ in range(3):
        layers.zero_grad()
        layers(torch.ones(1, 6)).sum().backward()
        by_hand(layers)
    layers(torch.ones(1, 6))
    assert renewals == [2, 2, 2]


def test_a_step_that_raised_is_one_all_the_same():
    layers = model()
    lose(layers)
    before = layers[0].weight.detach().clone()

    def stopped():
        with sn.optimizer_step(layers):
            raw(layers[0]).data.mul_(1.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    torch.testing.assert_close(layers[0].weight, before)  # not 1.5 times it


def test_uses_within_it_are_of_the_weight_as_it_is_then():
    layers = model()
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
    lose(layers)
    with sn.optimizer_step(layers):
        for _ in range(2):
            optimizer.step()
            lose(layers)
        optimizer.step()
    refined = copy.deepcopy(layers)
    sn.invalidate(refined)
    torch.testing.assert_close(layers[0].weight, refined[0].weight)
    optimizer.step()
    norm = torch.linalg.matrix_norm(layers[0].weight.detach().double(), 2)
    assert float(norm) == pytest.approx(1, rel=1e-2)


def test_a_learned_scale_that_is_updated_within_is_not_missed():
    layers = model(mode="learnable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            lose(layers)
            by_hand(layers)
        lose(layers)


def test_sharpness_aware_steps_follow_the_weight_there_and_back(monkeypatch):
    layers = model()
    refuse_refinement(monkeypatch)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    for _ in range(4):
        lose(layers)
        moves = [0.05 * parameter.grad.clone() for parameter in layers.parameters()]
        with torch.no_grad(), sn.optimizer_step(layers):
            for parameter, move in zip(layers.parameters(), moves, strict=True):
                parameter.add_(move)
        lose(layers)
        with torch.no_grad(), sn.optimizer_step(layers):
            for parameter, move in zip(layers.parameters(), moves, strict=True):
                parameter.sub_(move)
            optimizer.step()
    norm = torch.linalg.matrix_norm(layers[0].weight.detach().double(), 2)
    assert float(norm) == pytest.approx(1, rel=1e-2)


def test_a_model_without_normalized_weights_is_nothing_to_count():
    plain = nn.Linear(2, 2)
    with torch.no_grad(), sn.optimizer_step(plain):
        plain.weight.zero_()
    assert not plain.weight.any()
