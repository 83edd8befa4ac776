"""Weights that an optimizer step has moved, renewed together: each one as if alone, and nothing shared by mistake."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import spectralnorm as sn
from spectralnorm import spectral_norm

pytestmark = pytest.mark.usefixtures("engine_or_kernels")


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def norm_of(weight: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


def some_layers() -> nn.ModuleList:
    """Equal small ones, others of their own shape, a large one, grouped and transposed ones."""
    return nn.ModuleList(
        [
            *(nn.Linear(12, 10) for _ in range(4)),
            nn.Linear(300, 260),
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.ConvTranspose2d(4, 6, 3),
            nn.Linear(7, 1),
        ]
    )


def pull(layers: nn.ModuleList, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step of the optimizer with gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter) * parameter.detach().abs().mean()
    optimizer.step()


def test_weights_of_one_optimizer_are_renewed_in_one_go_wherever_they_were_normalized(renewals, device):
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4))).to(device)
    other = spectral_norm(nn.Linear(5, 5).to(device))
    layers = nn.ModuleList([*model, other])
    for layer in layers:
        layer.weight  # noqa: B018
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    pull(layers, optimizer, seed=0)
    for layer in layers:
        layer.weight  # noqa: B018
    assert renewals == [3]


def test_weights_of_another_optimizer_are_left_alone(renewals):
    layers = nn.ModuleList([spectral_norm(nn.Linear(5, 5)) for _ in range(2)])
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        pull(nn.ModuleList([layer]), optimizer, seed=0)
    for layer in layers:
        layer.weight  # noqa: B018
    assert renewals == [1, 1]


def test_together_gives_what_each_weight_alone_gives(device):
    together = sn.add_spectral_norm(some_layers().double().to(device))
    alone = copy.deepcopy(together)
    optimizer = torch.optim.Adam(together.parameters(), lr=1e-2)
    optimizers = [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in alone]
    for step in range(6):
        pull(together, optimizer, seed=step)
        with torch.no_grad():
            for one, other in zip(alone.parameters(), together.parameters(), strict=True):
                one.grad = other.grad.clone()
        for each in optimizers:
            each.step()
        loss = sum(layer.weight.square().sum() * (number + 1) for number, layer in enumerate(together))
        gradients = torch.autograd.grad(loss, [raw(layer) for layer in together])
        for number, (layer, other, gradient) in enumerate(zip(together, alone, gradients, strict=True)):
            torch.testing.assert_close(layer.weight, other.weight, rtol=1e-9, atol=1e-12)
            (expected,) = torch.autograd.grad(other.weight.square().sum() * (number + 1), raw(other))
            torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(
                layer.parametrizations.weight[0]._u, other.parametrizations.weight[0]._u, rtol=1e-6, atol=1e-9
            )


def test_gradient_where_only_some_of_a_batch_are_used():
    layers = nn.ModuleList(spectral_norm(nn.Linear(6, 5).double()) for _ in range(3))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    pull(layers, optimizer, seed=0)
    optimizer.zero_grad()
    weights = [layer.weight for layer in layers]
    (weights[0].square().sum() + weights[2].sum()).backward()
    assert raw(layers[1]).grad is None
    u, v = (getattr(layers[0].parametrizations.weight[0], name) for name in ("_u", "_v"))
    raw_weight = raw(layers[0]).detach().requires_grad_()
    (expected,) = torch.autograd.grad((raw_weight / (u @ raw_weight @ v)).square().sum(), raw_weight)
    torch.testing.assert_close(raw(layers[0]).grad, expected)


def test_layers_may_be_read_in_another_order_at_each_step():
    layers = nn.ModuleList(spectral_norm(nn.Linear(6, 5)) for _ in range(3))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for step, order in enumerate([(0, 1, 2), (0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1)]):
        pull(layers, optimizer, seed=step)
        plain = copy.deepcopy(layers)
        for each in (layers, plain):
            each.zero_grad()
        sum(
            layers[place].weight.square().sum() * (place + 1) + layers[place].weight.sum() for place in order
        ).backward()
        for place in order:
            u, v = (getattr(layers[place].parametrizations.weight[0], name) for name in ("_u", "_v"))
            weight = raw(plain[place])
            ((weight / (u @ weight @ v)).square().sum() * (place + 1) + (weight / (u @ weight @ v)).sum()).backward()
            torch.testing.assert_close(raw(layers[place]).grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_one_weight_that_changes_alone_does_not_take_the_others_with_it(renewals):
    layers = nn.ModuleList(spectral_norm(nn.Linear(20, 20)) for _ in range(3))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    pull(layers, optimizer, seed=0)
    with torch.no_grad():
        raw(layers[1]).mul_(3)
    for layer in layers:
        assert norm_of(layer.weight) == pytest.approx(1, abs=1e-2)
    assert renewals == [2]
    pull(layers, optimizer, seed=1)
    for layer in layers:
        assert norm_of(layer.weight) == pytest.approx(1, abs=1e-2)
    assert renewals == [2, 3]


def test_writing_into_one_weight_of_a_batch_reaches_that_one_alone():
    layers = nn.ModuleList(spectral_norm(nn.Linear(6, 6)) for _ in range(3))
    pull(layers, torch.optim.SGD(layers.parameters(), lr=0.01), seed=0)
    before = [raw(layer).detach().clone() for layer in layers]
    nn.init.orthogonal_(layers[1].weight, gain=2.0)
    for layer, expected in zip(layers, before, strict=True):
        layer.weight  # noqa: B018
        assert torch.equal(raw(layer), expected) == (layer is not layers[1])


@pytest.mark.parametrize("size", [6, 300], ids=["small", "large"])
def test_memory_of_an_old_value_is_not_overwritten_while_somebody_holds_it(size):
    layer = spectral_norm(nn.Linear(size, size))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held = layer.weight.detach()
    expected = held.clone()
    for step in range(3):
        pull(nn.ModuleList([layer]), optimizer, seed=step)
        assert not torch.equal(layer.weight, expected)
    assert torch.equal(held, expected)


@pytest.mark.parametrize("size", [6, 300], ids=["small", "large"])
def test_gradient_that_somebody_holds_is_not_overwritten_by_the_next(size):
    layers = nn.ModuleList(spectral_norm(nn.Linear(size, size)) for _ in range(2))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    pull(layers, optimizer, seed=0)
    held = []
    for step in range(3):
        optimizer.zero_grad()
        (layers[0].weight.square().sum() * (step + 1) + layers[1].weight.sum()).backward()
        held.append((raw(layers[0]).grad, raw(layers[0]).grad.clone()))
        optimizer.step()
    assert all(torch.equal(grad, copied) for grad, copied in held)


def test_memory_of_a_large_value_that_nobody_holds_is_used_again():
    layer = spectral_norm(nn.Linear(300, 300))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.no_grad():
        address = layer.weight.data_ptr()
        pull(nn.ModuleList([layer]), optimizer, seed=0)
        assert layer.weight.data_ptr() == address


@pytest.mark.parametrize("size", [6, 300], ids=["small", "large"])
def test_separate_backwards_add_up_in_any_order(size):
    layer = spectral_norm(nn.Linear(size, size).double())
    real, fake = torch.randn(2, 4, size, dtype=torch.float64)
    (layer(real).relu().sum() - layer(fake).tanh().sum()).backward()
    expected = raw(layer).grad.clone()
    layer.zero_grad()
    losses = [layer(real).relu().sum(), -layer(fake).tanh().sum()]
    losses[1].backward()
    losses[0].backward()
    torch.testing.assert_close(raw(layer).grad, expected)


def test_hook_on_one_use_of_the_weight_does_not_see_the_others():
    layer = spectral_norm(nn.Linear(3, 3))
    first, second = layer.weight, layer.weight
    seen = []
    first.register_hook(lambda grad: seen.append(grad.clone()))
    (first.sum() + 5 * second.sum()).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(3, 3))


@pytest.mark.parametrize("num_uses", [1, 2, 3, 5])
@pytest.mark.parametrize("are_separate", [False, True], ids=["one backward", "one for each"])
def test_any_number_of_uses_has_hooks_of_its_own_and_adds_up(num_uses, are_separate):
    layers = nn.ModuleList(spectral_norm(nn.Linear(6, 5)) for _ in range(3))
    pull(layers, torch.optim.SGD(layers.parameters(), lr=0.1), seed=0)
    plain = copy.deepcopy(layers)
    for each in (layers, plain):
        each.zero_grad()
    seen = []
    losses = []
    for use in range(num_uses):
        weight = layers[1].weight
        weight.register_hook(lambda grad, use=use: None if grad is None else seen.append((use, float(grad.mean()))))
        losses.append((weight * (use + 1)).sum() + layers[2].weight.square().sum())
    for loss in losses if are_separate else [sum(losses)]:
        loss.backward()
    assert sorted(seen) == [(use, use + 1.0) for use in range(num_uses)]
    total = sum(range(num_uses + 1))
    ((plain[1].weight * total).sum() + num_uses * plain[2].weight.square().sum()).backward()
    assert raw(layers[0]).grad is None
    for place in (1, 2):  # in units of what comes back for an entry
        torch.testing.assert_close(raw(layers[place]).grad / total, raw(plain[place]).grad / total)


def test_hook_on_a_use_that_a_backward_does_not_reach_is_given_none():
    # As by torch's own functions of several outputs, such as unbind.
    layer = spectral_norm(nn.Linear(3, 3))
    first, second = layer.weight, layer.weight
    seen = []
    first.register_hook(seen.append)
    first.retain_grad()
    second.sum().backward()
    assert seen == [None]
    assert first.grad is None


def test_hook_on_a_parameter_is_not_called_by_backwards_of_other_layers():
    """Weights that were renewed together share a node of the graph; those with hooks have one of their own."""
    layers = nn.ModuleList(spectral_norm(nn.Linear(4, 4)) for _ in range(3))
    seen = []
    for place in (0, 1):
        raw(layers[place]).register_hook(lambda grad, place=place: seen.append((place, float(grad.mean()))))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    pull(layers, optimizer, seed=0)
    for first in (0, 1, 2):
        layers.zero_grad()
        layers[first].weight.sum().backward()
        pull(layers, optimizer, seed=first)
    assert [place for place, _ in seen] == [0, 1]


def test_a_step_that_follows_a_gradient_moves_no_weight_of_other_layers():
    """Optimizers that step within the backward hang on hooks that are called when a gradient is there."""
    layers = nn.ModuleList(spectral_norm(nn.Linear(4, 4)) for _ in range(3))
    pull(layers, torch.optim.SGD(layers.parameters(), lr=0.1), seed=0)
    assert all(raw(layer).grad is not None for layer in layers)  # and stays, as where it is accumulated
    for layer in layers[:2]:
        optimizer = torch.optim.SGD([raw(layer)], lr=0.1)
        raw(layer).register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    before = [raw(layer).detach().clone() for layer in layers]
    layers[0].weight.sum().backward()
    assert [torch.equal(raw(layer), old) for layer, old in zip(layers, before, strict=True)] == [False, True, True]


def test_second_derivative_after_the_weight_has_changed_is_refused():
    layer = spectral_norm(nn.Linear(3, 3))
    loss = layer(torch.ones(1, 3)).square().sum()
    with torch.no_grad():
        raw(layer).mul_(2)
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        torch.autograd.grad(loss, raw(layer), create_graph=True)


def test_what_is_kept_of_one_model_does_not_hold_the_weights_of_another():
    layers = [spectral_norm(nn.Linear(6, 6)) for _ in range(2)]
    optimizer = torch.optim.SGD([raw(layer) for layer in layers], lr=0.1)
    for is_training in (True, False):
        pull(nn.ModuleList(layers), optimizer, seed=0)
        with torch.set_grad_enabled(is_training):
            for layer in layers:
                layer.weight  # noqa: B018
    found = [weakref.ref(each) for each in (raw(layers[0]), *layers[0].buffers())]
    del layers[0], layer, optimizer
    gc.collect()
    assert [each() for each in found] == [None, None, None]


def test_nothing_of_a_model_outlives_it():
    layers = nn.ModuleList(spectral_norm(nn.Linear(6, 6)) for _ in range(2))
    pull(layers, torch.optim.SGD(layers.parameters(), lr=0.1), seed=0)
    layers[0](torch.ones(1, 6)).sum().backward()
    gc.collect()
    gc.disable()  # without cycles there is nothing for it to find
    try:
        normalization, weight = layers[0].parametrizations.weight[0], raw(layers[1])
        found = [weakref.ref(each) for each in (normalization, weight, normalization._kept.quotient.value)]
        del layers, normalization, weight
        assert [each() for each in found] == [None, None, None]
    finally:
        gc.enable()
