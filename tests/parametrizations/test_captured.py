"""Training in captured CUDA graphs, by the kernels that renew all weights together."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.parametrizations.memory import is_held_once

from .graphs import Graph, capture, warm_up

pytestmark = pytest.mark.usefixtures("with_triton")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[Callable[[], None]], Graph]:
    return lambda step: capture(step, device, monkeypatch)


class Training:
    """D-steps with two uses of every weight; the inputs lie where a graph reads them."""

    def __init__(self, device: torch.device, *, grouped: bool = False, hidden: int = 9, **options: object) -> None:
        torch.manual_seed(0)
        convolution = nn.Conv2d(2, 12, 2, groups=2 if grouped else 1)
        self.model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(48, hidden)).to(device)
        sn.add_spectral_norm(self.model, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.real, self.fake = torch.randn(2, 4, 2, 3, 3, device=device)
        self.device, self.loss = device, torch.zeros((), device=device)
        self.used: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.real).square().mean() - self.model(self.fake).sigmoid().mean()
        loss.backward()
        self.loss = loss.detach()
        self.optimizer.step()

    def look(self) -> None:
        """A step that leaves the weights alone, and what the model computed with."""
        self.optimizer.zero_grad(set_to_none=True)
        self.used = {name: layer.weight for name, layer in self.layers().items()}
        sum(torch.cos(each).sum() for each in self.used.values()).backward()
        self.grads = {name: raw(layer).grad for name, layer in self.layers().items()}

    def layers(self) -> dict[str, nn.Module]:
        return {name: each for name, each in self.model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))}

    def changed(self, seed: int) -> None:
        """As an optimizer's step that nobody saw."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers().values():
            raw(layer).data.add_(0.02 * torch.randn(raw(layer).shape, generator=generator).to(self.device))


def raw(layer: nn.Module) -> Tensor:
    return layer.parametrizations["weight"].original


def blocks(layer: nn.Module) -> Tensor:
    return raw(layer).detach().double().unflatten(0, (getattr(layer, "groups", 1), -1)).flatten(2)


def exact(layer: nn.Module) -> float:
    return float(torch.linalg.matrix_norm(blocks(layer), 2).amax())


def assert_renewals(graph: Graph, number: int) -> None:
    """By kernels; of a real graph nobody can tell."""
    assert graph.kernels is None or graph.kernels.count("divide_kernel") == number


def assert_divided(training: Training, *, to: float = 1.0, rtol: float = 2e-3) -> None:
    """To a norm; what a change of the weights by some percent leaves of an error after two iterations is below 2e-3."""
    for name, layer in training.layers().items():
        used = training.used[name].detach()
        torch.testing.assert_close(used, to * raw(layer).detach() / exact(layer), rtol=rtol, atol=0)


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
def test_every_replay_is_of_the_weights_as_they_are(grouped: bool, captured: Callable, device: torch.device) -> None:
    training = Training(device, grouped=grouped)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    graph = captured(training.look)
    assert_renewals(graph, 1)
    for seed in range(2):
        training.changed(seed)
        graph.replay()
        assert_divided(training)
        for name, layer in training.layers().items():
            weight, used = raw(layer).detach().double(), training.used[name].detach().double()
            u, v = (each.double() for each in layer.buffers())
            outer = torch.outer(u, v).view_as(weight)
            sigma = (outer * weight).sum()
            torch.testing.assert_close(float(sigma), exact(layer), rtol=2e-3, atol=0)
            grad = -used.sin()
            expected = grad / sigma - (grad * used).sum() / sigma * outer
            scale = float(expected.abs().max())
            torch.testing.assert_close(training.grads[name].double(), expected, rtol=0, atol=1e-5 * scale)


def test_replays_go_on_from_one_another(captured: Callable, device: torch.device) -> None:
    training = Training(device, hidden=40)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    graph = captured(training.look)
    layer = training.model[3]
    raw(layer).data.copy_(torch.randn(40, 48, generator=torch.Generator().manual_seed(3)))
    errors = []
    for _ in range(4):
        graph.replay()
        used = training.used["3"].detach().double()
        errors.append(abs(1 - float(torch.linalg.matrix_norm(used, 2))))
    assert errors[0] > 1e-3  # of another matrix, not found from the directions of the one before
    assert errors[-1] < 1e-2 * errors[0]


def test_a_captured_step_trains_as_one_that_is_not(captured: Callable, device: torch.device) -> None:
    mine, theirs = Training(device), Training(device)
    warm_up(mine, 3, device)
    warm_up(theirs, 3, device)
    graph = captured(mine)
    theirs()
    for _ in range(2):
        graph.replay()
        theirs()
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=2e-3, atol=0)
    for layer, other in zip(mine.layers().values(), theirs.layers().values(), strict=True):
        difference = (raw(layer) - raw(other)).abs().max()
        assert difference < 2e-3 * raw(other).abs().max()


def test_launches_do_not_grow_with_the_layers(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    # The next frames twice, the norms once, the frames back, the division, the buffers; and the gradient's two.
    of_step = captured(training).kernels
    if of_step is None:
        pytest.skip("launches of a real graph are not seen")
    of_tracking = ["images_kernel", "images_kernel", "others_kernel", "return_kernel"]
    of_division = ["divide_kernel", "store_kernel", "inner_kernel", "gradients_kernel"]
    assert sorted(of_step) == sorted(of_tracking + of_division)


def test_a_second_step_in_one_graph_renews_again(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)

    def both() -> None:
        training()
        training.look()

    graph = captured(both)
    for _ in range(2):
        graph.replay()
        assert_divided(training)
    assert_renewals(graph, 2)


def test_what_one_graph_found_is_not_known_to_another(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    captured(training.look)
    second = captured(training.look)
    training.changed(0)
    second.replay()
    assert_divided(training)


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["zero", "nan"])
def test_a_weight_that_had_no_norm_recovers_at_once(value: float, captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    graph = captured(training.look)
    layer = training.model[3]
    good = raw(layer).detach().clone()
    buffers = [each.clone() for each in layer.buffers()]
    raw(layer).data.fill_(value)
    graph.replay()
    torch.testing.assert_close(training.used["3"].detach(), torch.full_like(good, value), equal_nan=True)
    assert all(map(torch.equal, layer.buffers(), buffers))
    raw(layer).data.copy_(good)
    graph.replay()
    torch.testing.assert_close(training.used["3"].detach(), good / exact(layer), rtol=2e-3, atol=1e-6)


def test_a_frozen_discriminator_is_renewed_and_stays_kept_outside(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    training.model.requires_grad_(False)
    noise = torch.randn(4, 2, 3, 3, device=device).requires_grad_()
    outputs = []

    def of_generator() -> None:
        noise.grad = None
        result = training.model(noise).sum()
        result.backward()
        outputs.append(result.detach())

    warm_up(of_generator, 1, device)
    graph = captured(of_generator)
    for seed in range(2):
        training.changed(seed)
        graph.replay()
        first, last = (raw(layer).detach() / exact(layer) for layer in training.layers().values())
        hidden = torch.nn.functional.conv2d(noise.detach(), first, training.model[0].bias).tanh().flatten(1)
        expected = torch.nn.functional.linear(hidden, last, training.model[3].bias).sum()
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-2, atol=1e-2)
    assert_renewals(graph, 1)
    first, second = training.model[0].weight, training.model[0].weight
    assert first.data_ptr() == second.data_ptr()


def test_what_a_graph_trains_is_computed_at_every_use_outside(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    graph = captured(training)
    for _ in range(2):
        graph.replay()
    training.model.eval()
    for layer in training.layers().values():
        torch.testing.assert_close(layer.weight.detach(), raw(layer).detach() / exact(layer), rtol=5e-3, atol=1e-5)


def test_under_autocast_values_are_rounded_by_the_kernels(captured: Callable, device: torch.device) -> None:
    training = Training(device)

    def step() -> None:
        with torch.autocast(device.type, torch.float16, cache_enabled=False):
            training()

    def look() -> None:
        with torch.autocast(device.type, torch.float16, cache_enabled=False):
            training.look()

    warm_up(step, 3, device)
    warm_up(look, 1, device)
    graph = captured(look)
    assert_renewals(graph, 1)
    training.changed(0)
    for _ in range(2):  # until the norm is known to a thousandth
        graph.replay()
    for name, layer in training.layers().items():
        used = training.used[name].detach()
        assert used.dtype == torch.float16
        torch.testing.assert_close(used.float(), raw(layer).detach() / exact(layer), rtol=2**-11 + 1e-3, atol=1e-6)
        assert training.grads[name].dtype == torch.float32


def test_a_learned_scale_is_in_the_graph(captured: Callable, device: torch.device) -> None:
    training = Training(device, mode="learnable", coefficient=2.0)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    graph = captured(training.look)
    training.changed(0)
    for layer in training.layers().values():
        layer.parametrizations["weight"][0].scale.data.fill_(3.0)
    graph.replay()
    assert_divided(training, to=3.0)


def test_a_loss_may_depend_on_some_of_the_weights(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    first, last = training.layers().values()

    def of_last() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        (0 * first.weight.detach().sum() + torch.cos(last.weight).sum()).backward()

    graph = captured(of_last)
    graph.replay()
    grad = raw(last).grad.clone()
    assert raw(first).grad is None
    of_last()
    torch.testing.assert_close(grad, raw(last).grad, rtol=2e-3, atol=2e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("options", [{"update": "manual"}, {"n_power_iterations": 3}], ids=["update", "iterations"])
def test_options_that_were_changed_between_captures_hold(
    options: dict[str, object], captured: Callable, device: torch.device
) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    captured(training.look)
    sn.add_spectral_norm(training.model, **options)
    buffers = [each.clone() for each in training.model.buffers()]
    graph = captured(training.look)
    graph.replay()
    assert_renewals(graph, 0)
    assert ("update" in options) == all(map(torch.equal, training.model.buffers(), buffers))


def test_what_a_graph_reads_stays_while_the_model_is_there(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    late = nn.Linear(4, 5).to(device)
    sn.add_spectral_norm(late)
    training.optimizer.add_param_group({"params": [*late.parameters()]})
    warm_up(training, 3, device)

    def of_frozen() -> None:
        training.model(training.real)

    training.model.requires_grad_(False)
    graph = captured(of_frozen)
    training.model.requires_grad_(True)
    assert graph.lost() == []
    with torch.no_grad():  # found anew, so that another number of renewals lies behind it than behind the first
        raw(training.model[3]).mul_(2)
    training()
    training()

    def of_all() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        (torch.cos(late.weight).sum() + training.model(training.real).square().mean()).backward()
        training.optimizer.step()

    warm_up(of_all, 2, device)
    of_more = captured(of_all)
    assert_renewals(of_more, 1)
    assert graph.lost() == []


def test_what_a_captured_optimizer_moves_is_not_kept(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    graph = captured(training.optimizer.step)
    for layer in training.layers().values():
        raw(layer).grad.normal_()
    for _ in range(2):
        graph.replay()
        for _ in range(30):  # power iterations, from the vectors of the weight as it was
            training.look()
        assert_divided(training)


def test_nodes_of_eager_steps_do_not_reach_into_a_capture(captured: Callable, device: torch.device) -> None:
    # They hold what adds up the gradients, on the stream of those steps, which a capture may not wait for.
    training = Training(device)
    warm_up(training, 3, device)
    warm_up(training.look, 1, device)
    node, other = (weakref.ref(each.grad_fn) for each in training.used.values())
    training.used = {}
    assert node() is other() is not None

    def step() -> None:
        training.model[0].weight  # noqa: B018
        assert node() is None

    captured(step)


def test_a_weight_that_had_no_norm_before_the_capture_is_not_lost(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    good = {name: raw(layer).detach().clone() for name, layer in training.layers().items()}
    raw(training.model[3]).data.fill_(float("nan"))
    warm_up(training.look, 1, device)
    for name, layer in training.layers().items():
        raw(layer).data.copy_(good[name])
    graph = captured(training.look)
    for _ in range(10):
        graph.replay()
    assert_divided(training)


@pytest.mark.parametrize("warm_ups", [2, 3], ids=["frames on the left", "frames on the right"])
def test_what_is_loaded_between_replays_has_the_norm_that_is_wanted(
    warm_ups: int, captured: Callable, device: torch.device
) -> None:
    training, other = Training(device, grouped=True, hidden=40), Training(device, grouped=True, hidden=40)
    warm_up(training, warm_ups, device)
    warm_up(training.look, 1, device)
    graph = captured(training.look)
    with torch.no_grad():
        for layer in other.layers().values():
            raw(layer).normal_()
    training.model.load_state_dict(other.model.state_dict())
    graph.replay()
    assert_divided(training)


def test_a_weight_that_was_written_to_is_renewed_once(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    captured(training)
    with torch.no_grad():
        raw(training.model[3]).mul_(2)
    graph = captured(training)
    assert_renewals(graph, 1)


def test_what_was_captured_outlives_neither_the_graph_nor_the_model(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    graph = captured(training.look)
    used = {name: each.detach() for name, each in training.used.items()}
    training.optimizer.zero_grad(set_to_none=True)
    training.used, training.grads = {}, {}
    del graph
    training.model(training.real)
    gc.collect()
    assert all(is_held_once(each) for each in used.values())
    weights = [weakref.ref(raw(layer)) for layer in training.layers().values()]
    gc.disable()  # without cycles there is nothing for it to find
    try:
        del training
        assert [each() for each in weights] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("warm_ups", [0, 1], ids=["none", "one"])
def test_without_enough_steps_before_the_graph_finds_the_norms_by_itself(
    warm_ups: int, captured: Callable, device: torch.device
) -> None:
    training = Training(device)
    warm_up(training, warm_ups, device)
    if warm_ups == 0 and device.type == "cuda":
        warm_up(training.look, 1, device)  # the libraries' own preparations
    graph = captured(training)
    assert_renewals(graph, 0)
    for _ in range(10):
        graph.replay()
    training.model.eval()
    for layer in training.layers().values():
        torch.testing.assert_close(layer.weight.detach(), raw(layer).detach() / exact(layer), rtol=2e-2, atol=1e-4)


def test_after_a_change_of_options_another_graph_finds_the_norms_by_itself(
    captured: Callable, device: torch.device
) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    captured(training)
    sn.add_spectral_norm(training.model, coefficient=2.0)
    graph = captured(training.look)
    assert_renewals(graph, 0)
    graph.replay()
    assert_divided(training, to=2.0, rtol=2e-2)


def test_copies_know_nothing_of_graphs(captured: Callable, device: torch.device) -> None:
    training = Training(device)
    warm_up(training, 3, device)
    captured(training)
    for copied in (copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))):
        assert copied[0].parametrizations["weight"][0].in_graphs is None
        torch.testing.assert_close(copied(training.real), training.model(training.real), rtol=1e-3, atol=1e-4)
        assert copied[0].weight.data_ptr() == copied[0].weight.data_ptr()  # kept, because no graph trains it
