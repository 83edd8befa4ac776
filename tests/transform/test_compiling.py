"""`spectralnorm.compile`: compiled code gets the weights that the model computes with as it is."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.integration.compiled_models import IMAGES, Block, images_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import spectralnorm as sn

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """Counts graphs."""
    return CompileCounterWithBackend("eager")


def trained(call: nn.Module, model: nn.Module, steps: int = 4) -> list[Tensor]:
    """The losses of steps with two uses of every weight."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = call(IMAGES * (step + 1)).square().mean() - call(IMAGES - step).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


OPTIONS = {
    "default": {},
    "cap": {"mode": "cap", "coefficient": 0.7},
    "learnable": {"mode": "learnable", "coefficient": 2.0},
    "bidirectional": {"norm": "bidirectional"},
    "operator": {"norm": "operator", "input_shape": (3, 8, 8)},
    "strict": {"strict": True},
    "forward": {"update": "forward"},
    "manual": {"update": "manual"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_one_graph_and_that_of_the_model_as_it_is(options):
    counter = CompileCounterWithBackend("aot_eager")  # forward and backward are traced ahead of time
    model = sn.add_spectral_norm(images_model(), **options)
    eager = copy.deepcopy(model)
    losses = trained(sn.compile(model, fullgraph=True, backend=counter), model)
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, trained(eager, eager), rtol=1e-4, atol=1e-5)
    for name, expected in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


def test_all_weights_are_renewed_together_and_once_for_two_uses(counter, renewals):
    model = sn.add_spectral_norm(images_model())
    trained(sn.compile(model, fullgraph=True, backend=counter), model, steps=3)
    assert renewals == [3, 3]  # after the first step and after the second


def test_each_mode_is_compiled_once_however_often_it_changes(counter):
    model = sn.add_spectral_norm(images_model())
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    frames = []
    for _ in range(3):
        trained(compiled, model.train(), steps=2)
        with torch.no_grad():
            compiled(IMAGES)
            torch.testing.assert_close(compiled.eval()(IMAGES), model(IMAGES))
        frames.append(counter.frame_count)
    assert frames == [2, 2, 2]  # with grad and without; modes of the normalization are none of the graph's


def test_a_frozen_discriminator_passes_gradients_on(counter):
    model = sn.add_spectral_norm(images_model()).requires_grad_(False)
    compiled, images, expected = sn.compile(model, fullgraph=True, backend=counter), IMAGES.clone(), IMAGES.clone()
    compiled(images.requires_grad_()).sum().backward()
    model(expected.requires_grad_()).sum().backward()
    torch.testing.assert_close(images.grad, expected.grad)


def test_twelve_equal_blocks_share_their_graph(counter):
    model = nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(12)))
    eager = copy.deepcopy(model)
    for index in range(1, 13):
        model[index] = sn.compile(model[index], fullgraph=True, backend=counter)
    for each in (model, eager):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            each(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(model(torch.ones(2, 4)), eager(torch.ones(2, 4)), rtol=1e-4, atol=1e-5)


def test_under_autocast_the_graph_gets_rounded_weights(counter):
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    eager, inputs = copy.deepcopy(model), torch.randn(4, 6)
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    for call, each in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                (call(inputs).float().square().mean() + call(-inputs).float().mean()).backward()
            optimizer.step()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=torch.finfo(torch.bfloat16).eps)
    assert counter.frame_count == 1


class WithHead(nn.Module):
    """Of which the last layer is used under an autocast of its own."""

    def __init__(self, inner: torch.dtype | None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs).relu()
        with torch.autocast("cpu", self.inner, enabled=self.inner is not None):
            return self.head(hidden.float())


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@pytest.mark.parametrize("inner", [None, torch.float16, torch.bfloat16], ids=["off", "float16", "bfloat16"])
@pytest.mark.parametrize("outer", [None, torch.bfloat16], ids=["in none", "in bfloat16"])
def test_each_place_of_use_gets_the_weight_of_its_own_autocast(outer, inner, strict):
    counter = CompileCounterWithBackend("aot_eager")
    model = sn.add_spectral_norm(WithHead(inner), strict=strict)
    eager, inputs = copy.deepcopy(model), torch.randn(4, 6)
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    outputs = {}
    for call, each in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", outer, enabled=outer is not None):
                outputs[call] = call(inputs)
            outputs[call].float().square().mean().backward()
            optimizer.step()
    assert outputs[compiled].dtype == outputs[eager].dtype
    tolerance = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(outputs[compiled], outputs[eager], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()), rtol=0, atol=tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize("outer", [None, torch.float16], ids=["in none", "in float16"])
def test_a_strict_weight_is_bounded_under_an_autocast_that_begins_within(outer, counter):
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(inputs)

    coefficient = 0.7025  # the number of bfloat16 that is nearest is above it
    model = sn.add_spectral_norm(Narrow(), strict=True, coefficient=coefficient)
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    with torch.autocast("cpu", outer, enabled=outer is not None):
        assert 0.69 < abs(float(compiled(torch.ones(1, 1)).detach())) <= coefficient


@pytest.mark.parametrize("options", [{"update": "forward"}, {"update": "step"}], ids=["forward", "step"])
@pytest.mark.parametrize("inner", [None, torch.float16, torch.bfloat16], ids=["off", "float16", "bfloat16"])
def test_a_strict_weight_advances_no_more_for_another_autocast(inner, options, counter):
    model = sn.add_spectral_norm(WithHead(inner), strict=True, **options)
    with torch.no_grad():
        model.head.parametrizations["weight"].original.mul_(1.5).add_(0.1)
    eager, inputs = copy.deepcopy(model), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        sn.compile(model, fullgraph=True, backend=counter)(inputs)
        eager(inputs)
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


class Several(nn.Module):
    """Layers with several weights, in one of which torch's compiler does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)
        self.table = nn.Embedding(10, 8, max_norm=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        sequence = self.table(tokens)
        mixed, _ = self.attention(sequence, sequence, sequence, need_weights=False)
        return self.recurrent(mixed)[0]


def test_layers_with_several_weights_are_those_of_the_model_as_it_is():
    model = sn.add_spectral_norm(Several())
    eager, tokens = copy.deepcopy(model), torch.arange(10).view(2, 5)
    compiled = sn.compile(model, backend="aot_eager")
    for call, each in ((compiled, model), (eager, eager)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            call(tokens).square().mean().backward()
            optimizer.step()
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_a_recurrent_layer_that_advances_at_every_use_advances_once_per_forward(counter):
    model = sn.add_spectral_norm(nn.Sequential(nn.LSTM(4, 3)), update="forward")
    for parts in model[0].parametrizations.values():
        nn.init.normal_(parts.original)  # so that the vectors have somewhere to go
    eager, inputs = copy.deepcopy(model), torch.randn(5, 2, 4)
    torch.testing.assert_close(sn.compile(model, backend=counter)(inputs), eager(inputs))
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


def test_a_weight_under_another_parametrization_too_is_handed_over_as_a_whole(counter):
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = sn.spectral_norm(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    inputs = torch.randn(3, 4)
    compiled = sn.compile(layer, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(inputs), layer(inputs))


def test_nothing_of_a_graph_is_held_between_calls(counter):
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)))
    compiled = sn.compile(model, backend=counter)
    compiled(torch.ones(2, 4))
    assert model[0]._handed_over is None
    assert model[2]._handed_over is None
    with pytest.raises(RuntimeError):
        compiled(torch.ones(2, 3))  # of four numbers
    assert model[0]._handed_over is None
    pickle.dumps(model)


def test_threads_that_call_one_model_do_not_take_weights_from_each_other(counter):
    """Without its weights code would be compiled anew with the norm in its graph, which is refused for this one."""
    model = sn.add_spectral_norm(images_model(), norm="operator", input_shape=(3, 8, 8)).eval()
    compiled, parameters = sn.compile(model, fullgraph=True, backend=counter), list(model.parameters())

    def gradients(call: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(call(IMAGES).square().sum(), parameters))

    def outputs(call: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [call(IMAGES)]

    jobs = [gradients, outputs, outputs]
    expected = [job(model) for job in jobs]
    for job in jobs:
        job(compiled)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as threads:
            found = list(threads.map(lambda job: [job(compiled) for _ in range(50)], jobs))
    finally:
        sys.setswitchinterval(interval)
    for of_thread, each in zip(found, expected, strict=True):
        torch.testing.assert_close(of_thread, [each] * 50)


def test_the_model_stays_as_it_is_and_copies_of_the_compiled_one_compute_with_their_own_weights(counter):
    model = sn.add_spectral_norm(images_model())
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    first = compiled(IMAGES)
    copied = copy.deepcopy(compiled)
    with torch.no_grad():
        for layer in (copied._orig_mod[0], copied._orig_mod[4]):
            layer.parametrizations["weight"].original.normal_()
    torch.testing.assert_close(compiled(IMAGES), first)
    torch.testing.assert_close(copied(IMAGES), copied._orig_mod(IMAGES))
    assert not torch.allclose(copied(IMAGES), first)
    frames = counter.frame_count
    torch.testing.assert_close(model(IMAGES), first)
    assert counter.frame_count == frames


def test_what_has_been_compiled_is_compiled_from_the_model_itself(counter):
    model = sn.add_spectral_norm(images_model(), norm="operator", input_shape=(3, 8, 8))
    compiled = sn.compile(torch.compile(model), fullgraph=True, backend=counter)
    assert compiled._orig_mod is model
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert counter.frame_count == 1


def test_inside_of_another_graph_it_is_what_torch_compiles(counter):
    model = sn.add_spectral_norm(images_model())
    whole = torch.compile(nn.Sequential(sn.compile(model), nn.Tanh()), fullgraph=True, backend=counter)
    torch.testing.assert_close(whole(IMAGES), model(IMAGES).tanh(), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_lazy", [False, True], ids=["size of images", "lazy"])
def test_a_first_call_that_teaches_something_is_not_compiled(is_lazy, counter):
    model = nn.Sequential(nn.LazyConv2d(4, 3) if is_lazy else nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    sn.add_spectral_norm(model, **({} if is_lazy else {"norm": "operator"}))
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    outputs = compiled(IMAGES)
    assert counter.frame_count == 0
    torch.testing.assert_close(outputs, model(IMAGES))
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert counter.frame_count == 1


def test_what_is_normalized_later_is_compiled_as_by_torch(counter):
    model = images_model()
    sn.spectral_norm(model[0])
    compiled = sn.compile(model, fullgraph=True, backend=counter)
    sn.spectral_norm(model[4])
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    sn.remove_spectral_norm(model)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_a_model_without_normalized_weights_is_compiled_all_the_same(counter):
    model = images_model()
    torch.testing.assert_close(sn.compile(model, backend=counter)(IMAGES), model(IMAGES))
    assert counter.frame_count == 1


def test_what_is_no_module_is_refused():
    with pytest.raises(sn.UserError, match=r"compile takes a torch\.nn\.Module, got function"):
        sn.compile(lambda inputs: inputs)
