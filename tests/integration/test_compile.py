"""`torch.compile`: one graph per mode, compiled once, that computes what torch's own algorithm computes step by step.

Inside a compiled graph nothing is kept: each forward in training with grad is one change of the weight, as in torch.
"""

import copy
import shutil
from inspect import signature

import pytest
import torch
from tests.integration.compiled_models import IMAGES, Block, images_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations as torch_parametrizations

from spectralnorm import add_spectral_norm, monitor, spectral_norm
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """Counts graphs, and runs them with their forward and backward traced ahead of time."""
    return CompileCounterWithBackend("aot_eager")


def torchs(model: nn.Module) -> nn.Module:
    """The same model under torch's parametrization, in the same state."""
    theirs = images_model()
    for layer in theirs:
        if hasattr(layer, "weight"):
            torch_parametrizations.spectral_norm(layer)
    theirs.load_state_dict(model.state_dict())
    return theirs


def trained(call, model: nn.Module, num_steps: int = 4) -> list[Tensor]:
    """The losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = call(IMAGES * (step + 1)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_training_is_one_graph_and_the_same_as_torchs_algorithm(counter):
    model = add_spectral_norm(images_model())
    theirs = torchs(model)
    losses = trained(torch.compile(model, fullgraph=True, backend=counter), model)
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, trained(theirs, theirs), rtol=1e-4, atol=1e-5)
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


OPTIONS = {
    "cap": {"mode": "cap", "coefficient": 0.7},
    "learnable": {"mode": "learnable", "coefficient": 2.0},
    "bidirectional": {"norm": "bidirectional"},
    "forward": {"update": "forward"},
    "manual": {"update": "manual"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_one_graph_too(counter, options):
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(12, 3))
    add_spectral_norm(model, **options)
    eager, inputs = copy.deepcopy(model), torch.randn(2, 4, 4)
    if "mode" in options:
        model(inputs)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(inputs).sum().backward()
    eager(inputs).sum().backward()
    torch.testing.assert_close(compiled(inputs), eager(inputs), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


def test_each_mode_is_compiled_once_however_often_it_changes(counter):
    model = add_spectral_norm(images_model())
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    frames = []
    for _ in range(3):
        trained(compiled, model.train(), num_steps=2)
        with torch.no_grad():
            compiled(IMAGES)
            model.eval()
            compiled(IMAGES)
        frames.append(counter.frame_count)
    assert frames == [3, 3, 3]  # training, training without grad, evaluation


def test_evaluation_after_compiled_training_is_that_of_the_vectors(counter):
    model = add_spectral_norm(images_model())
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    trained(compiled, model)
    torch.testing.assert_close(compiled.eval()(IMAGES), torchs(model).eval()(IMAGES), rtol=1e-4, atol=1e-5)


def test_compiled_evaluation_writes_nothing(counter):
    model = add_spectral_norm(images_model()).eval()
    before = copy.deepcopy(model.state_dict())
    torch.compile(model, fullgraph=True, backend=counter)(IMAGES).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class WrittenOut(torch.optim.Optimizer):
    """Of the user's own: its compiled step is one graph, which one of torch's never is."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_step_of_a_compiled_optimizer_is_one_of_an_optimizer(kind, counter, monkeypatch):
    model = add_spectral_norm(images_model())
    eager = copy.deepcopy(model)
    optimizer, eager_optimizer = (kind(each.parameters(), lr=1e-3) for each in (model, eager))
    monkeypatch.setattr(SpectralNorm, "refined", lambda *_: pytest.fail("the norm was computed anew"))
    steps = torch.compile(optimizer.step, backend="aot_eager"), eager_optimizer.step
    for _ in range(3):
        for each, step in zip((model, eager), steps, strict=True):
            each.zero_grad()
            each(IMAGES).square().sum().backward()
            step()
    torch.testing.assert_close(model(IMAGES), eager(IMAGES), rtol=1e-5, atol=1e-6)


def test_compiled_step_of_an_optimizer_that_is_not_torchs_stays_one_graph(counter):
    model = add_spectral_norm(images_model())
    optimizer = WrittenOut(model.parameters())
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        before = model[4].weight.detach().clone()
        step()
        assert not torch.equal(model[4].weight, before)
        norm = torch.linalg.matrix_norm(model[4].weight.detach(), 2).item()
        assert norm == pytest.approx(1, abs=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++")
def test_two_uses_before_one_backward_end_in_a_single_logit_as_discriminators_do():
    layer, theirs = spectral_norm(nn.Linear(6, 1)), torch_parametrizations.spectral_norm(nn.Linear(6, 1))
    theirs.load_state_dict(layer.state_dict())
    compiled, inputs = torch.compile(layer, fullgraph=True), torch.randn(2, 3, 6)
    for call in (compiled, theirs):
        (call(inputs[0]).square().mean() - call(inputs[1]).mean()).backward()
    for parameter, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["zero", "nan"])
def test_a_weight_without_a_norm_leaves_the_buffers_alone(value, counter):
    layer = spectral_norm(nn.Linear(6, 4))
    good, before = layer.parametrizations.weight.original.detach().clone(), copy.deepcopy(dict(layer.named_buffers()))
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    layer.parametrizations.weight.original.data.fill_(value)
    compiled(torch.ones(2, 6)).sum().backward()
    assert all(torch.equal(each, before[name]) for name, each in layer.named_buffers())
    layer.parametrizations.weight.original.data.copy_(good)
    compiled(torch.ones(2, 6))
    torch.testing.assert_close(compiled(torch.ones(2, 6)), layer(torch.ones(2, 6)), rtol=1e-3, atol=1e-4)


def twelve_blocks(**options: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *(Block(**options) for _ in range(12)))


def test_twelve_equal_blocks_share_their_graph(counter):
    model, eager = twelve_blocks(), twelve_blocks(update="forward")
    eager.load_state_dict(model.state_dict())
    for block in model[1:]:
        block.compile(fullgraph=True, backend=counter)
    for each in (model, eager):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            each(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1
    outputs = model.eval()(torch.ones(2, 4))
    assert counter.frame_count == 2
    torch.testing.assert_close(outputs, eager.eval()(torch.ones(2, 4)), rtol=1e-4, atol=1e-5)


def test_operator_norm_breaks_the_graph_and_is_what_it_is_without():
    models = [nn.Sequential(spectral_norm(nn.Conv2d(2, 3, 3), norm="operator"), nn.ReLU()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    runs = models[0], torch.compile(models[1], backend="eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    images = torch.randn(2, 2, 6, 6)
    for _ in range(3):
        for run, optimizer in zip(runs, optimizers, strict=True):
            optimizer.zero_grad()
            run(images).square().sum().backward()
            optimizer.step()
    for model in models:
        model.eval()
    torch.testing.assert_close(runs[1](images), runs[0](images))
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
    assert monitor(models[1]) == monitor(models[0])


@pytest.mark.skipif("reason" not in signature(torch.compiler.disable).parameters, reason="torch names none")
def test_one_graph_with_an_operator_norm_is_refused_for_a_reason_that_is_named():
    compiled = torch.compile(spectral_norm(nn.Conv2d(2, 3, 3), norm="operator"), backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match='norm="operator" of a convolution needs ordinary execution'
    ):
        compiled(torch.randn(2, 2, 6, 6))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++")
def test_code_of_the_default_compiler_agrees():
    layer, theirs = spectral_norm(nn.Linear(5, 4)), torch_parametrizations.spectral_norm(nn.Linear(5, 4))
    theirs.load_state_dict(layer.state_dict())
    compiled, inputs = torch.compile(layer, fullgraph=True), torch.randn(3, 5)
    for _ in range(2):
        outputs, expected = compiled(inputs), theirs(inputs)
        outputs.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    for parameter, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)
