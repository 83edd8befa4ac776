"""Normalized models are loaded, moved and averaged like any other model, for every kind of layer."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.optim.swa_utils import AveragedModel

from spectralnorm import add_spectral_norm, remove_spectral_norm, spectral_norm
from spectralnorm.linalg import view_of

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed 2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(7, 4),
    "bag": lambda: nn.EmbeddingBag(7, 4),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
SOURCES = {
    "plain": lambda layer: layer,
    "torch": torch_parametrizations.spectral_norm,
    "torch-hook": nn.utils.spectral_norm,
}


def norm_of(layer: nn.Module) -> float:
    """Norm of the weight in use, by SVD."""
    weight = layer.weight.detach().double()
    return torch.linalg.matrix_norm(view_of(layer, weight).matrix(weight), 2).max().item()


def norm_by_its_vectors(layer: nn.Module) -> float:
    """Norm of the weight that exported and compiled code computes with: raw / (u^T W v), from the buffers."""
    given = raw(layer).detach().clone()  # another tensor in the parameter's place: nothing is kept of it
    weight = layer.eval().parametrizations.weight[0](given).double()
    return torch.linalg.matrix_norm(view_of(layer, weight).matrix(weight), 2).max().item()


def raw(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def load_by_copy(layer: nn.Module, path) -> nn.Module:
    layer.load_state_dict(torch.load(path))
    return layer


def load_by_assignment(layer: nn.Module, path) -> nn.Module:
    layer.load_state_dict(torch.load(path), assign=True)
    return layer


def load_from_the_mapped_file(layer: nn.Module, path) -> nn.Module:
    layer.load_state_dict(torch.load(path, mmap=True), assign=True)
    return layer


def load_after_to_empty(layer: nn.Module, path) -> nn.Module:
    layer = layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(torch.load(path))
    return layer


def load_into_no_memory(layer: nn.Module, path) -> nn.Module:
    layer = layer.to("meta")
    layer.load_state_dict(torch.load(path), assign=True)
    return layer


WAYS = (load_by_copy, load_by_assignment, load_from_the_mapped_file, load_after_to_empty, load_into_no_memory)


class TestLoading:
    @each_layer
    @pytest.mark.parametrize("source", SOURCES)
    def test_every_layer_loads_every_format_strictly(self, make, source, tmp_path):
        other = SOURCES[source](make())
        weight = other.get_parameter({"plain": "weight", "torch-hook": "weight_orig"}.get(source, OURS)).detach()
        torch.save(other.state_dict(), tmp_path / "model.pt")
        for way in WAYS:
            layer = way(spectral_norm(make()), tmp_path / "model.pt")
            assert torch.equal(raw(layer), weight)
            assert norm_of(layer) == pytest.approx(1, rel=1e-4)
            assert norm_of(layer.eval()) == pytest.approx(1, rel=1e-4)
            assert all(buffer.isfinite().all() for buffer in layer.buffers())

    @each_layer
    @pytest.mark.parametrize("update", ["step", "forward", "manual"])
    def test_vectors_that_come_with_plain_weights_are_those_of_the_norm(self, make, update):
        layer = spectral_norm(make(), update=update)
        layer.load_state_dict(make().state_dict())
        assert norm_by_its_vectors(layer) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("kind", ["grouped conv", "grouped transposed"])
    @pytest.mark.parametrize("source", ["torch", "torch-hook"])
    def test_vectors_of_torchs_reading_of_groups_are_replaced_by_those_of_the_norm(self, kind, source):
        layer, other = spectral_norm(LAYERS[kind]()), SOURCES[source](LAYERS[kind]())
        layer.load_state_dict(other.state_dict())
        assert norm_by_its_vectors(layer) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("kind", ["conv2d", "grouped conv"])
    def test_own_state_is_loaded_to_the_last_bit(self, kind):
        layer, other = spectral_norm(LAYERS[kind]()), spectral_norm(LAYERS[kind]())
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            other(torch.ones(1, 4, 5, 5)).square().sum().backward()
            optimizer.step()
        layer.load_state_dict(other.state_dict())
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])

    @pytest.mark.parametrize("source", SOURCES)
    def test_file_of_another_shape_is_refused_by_torchs_own_error(self, source):
        layer, other = spectral_norm(nn.Conv2d(4, 6, 3, groups=2)), SOURCES[source](nn.Conv2d(3, 5, 3))
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict(other.state_dict())

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("source", SOURCES)
    def test_loaded_layer_trains(self, way, source, tmp_path):
        torch.save(SOURCES[source](nn.Linear(6, 5)).state_dict(), tmp_path / "model.pt")
        layer = way(spectral_norm(nn.Linear(6, 5)), tmp_path / "model.pt")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        before = raw(layer).detach().clone()
        layer(torch.ones(1, 6)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(raw(layer), before)
        assert norm_of(layer) == pytest.approx(1, abs=1e-2)

    def test_training_from_a_mapped_file_does_not_write_to_it(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save(nn.Linear(6, 5).state_dict(), path)
        content = path.read_bytes()
        layer = load_from_the_mapped_file(spectral_norm(nn.Linear(6, 5)), path)
        nn.init.normal_(layer.weight)
        layer(torch.ones(1, 6)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert path.read_bytes() == content

    @pytest.mark.parametrize("update", ["forward", "manual"])
    def test_rules_that_do_not_refine_get_good_vectors_with_plain_weights(self, update):
        other, layer = nn.Linear(6, 5), spectral_norm(nn.Linear(6, 5), update=update)
        layer.load_state_dict(other.state_dict())
        assert norm_of(layer.eval()) == pytest.approx(1, rel=0.05)


OURS = "parametrizations.weight.original"


def test_model_saved_whole_is_read_by_a_process_that_never_made_one(tmp_path):
    model = add_spectral_norm(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(6, 4)))
    inputs = torch.linspace(-1, 1, 8).view(2, 2, 2)
    torch.save({"model": model, "inputs": inputs, "outputs": model(inputs)}, tmp_path / "all.pt")
    code = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); model = saved['model'];"
        "outputs = model(saved['inputs']); torch.testing.assert_close(outputs, saved['outputs']);"
        "outputs.sum().backward(); print(type(model[2]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "all.pt"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ParametrizedLinear"


@each_layer
def test_memory_comes_later(make):
    with torch.device("meta"):
        layer = spectral_norm(make())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert norm_of(layer) == pytest.approx(1, rel=1e-4)
    assert norm_of(layer.eval()) == pytest.approx(1, rel=1e-4)
    remove_spectral_norm(layer)
    assert norm_of(layer) == pytest.approx(1, rel=1e-4)


@each_layer
@pytest.mark.parametrize(("move", "tolerance"), [("half", 1e-3), ("bfloat16", 1e-2), ("double", 1e-4)])
def test_types_can_be_changed_and_changed_back(make, move, tolerance):
    layer = spectral_norm(make())
    before = raw(layer).detach().clone()
    getattr(layer, move)()
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {layer.weight.dtype}
    assert norm_of(layer) == pytest.approx(1, abs=tolerance)
    layer.float()
    assert norm_of(layer) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(raw(layer).detach(), before, rtol=tolerance, atol=tolerance)


class TestChannelsLast:
    @staticmethod
    def pair(make) -> tuple[nn.Module, nn.Module]:
        layer = make()
        return spectral_norm(copy.deepcopy(layer)), spectral_norm(layer.to(memory_format=torch.channels_last))

    @pytest.mark.parametrize("kind", ["conv2d", "grouped conv", "transposed 2d", "grouped transposed"])
    def test_numbers_are_the_same_and_the_layout_stays(self, kind):
        contiguous, last = self.pair(LAYERS[kind])
        inputs = torch.randn(2, 4, 6, 6)
        for _ in range(3):
            grads = []
            for layer, batch in ((contiguous, inputs), (last, inputs.to(memory_format=torch.channels_last))):
                optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
                optimizer.zero_grad()
                layer(batch).square().sum().backward()
                grads.append(raw(layer).grad.clone())
                optimizer.step()
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(last.weight, contiguous.weight, rtol=1e-4, atol=1e-5)
            for tensor in (raw(last), raw(last).grad, last.weight, last.eval().weight):
                assert tensor.is_contiguous(memory_format=torch.channels_last)
            last.train()

    def test_moving_later_is_the_same(self):
        layer = spectral_norm(nn.Conv2d(4, 6, 3))
        before = layer.weight.detach().clone()
        layer.to(memory_format=torch.channels_last)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(layer.weight, before, rtol=1e-4, atol=1e-6)


def critic() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1))


def test_gradient_penalty_is_that_of_the_formula_written_out():
    """WGAN-GP (Gulrajani et al. 2017, eq. 3) through W / (u^T W v), with the vectors of an SVD held constant."""
    model = add_spectral_norm(critic().double())
    weights = [raw(model[index]) for index in (0, 3, 5)]
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    inputs = torch.randn(3, 2, 6, dtype=torch.float64)

    def written_out(batch: Tensor) -> Tensor:
        divided = []
        for weight in copies:
            left, _, right = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
            divided.append(weight / (left[:, 0] @ weight.flatten(1) @ right[0]))
        hidden = F.conv1d(batch, divided[0], model[0].bias).tanh().flatten(1)
        return F.linear(F.linear(hidden, divided[1], model[3].bias).tanh(), divided[2], model[5].bias)

    def loss(call) -> Tensor:
        batch = inputs.clone().requires_grad_()
        scores = call(batch)
        (slope,) = torch.autograd.grad(scores.sum(), batch, create_graph=True)
        return scores.mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()

    for _ in range(2):  # a second time from what is kept
        grads, expected = torch.autograd.grad(loss(model), weights), torch.autograd.grad(loss(written_out), copies)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_average_of_models_is_the_normalized_average_of_the_raw_weights(use_buffers):
    model = add_spectral_norm(critic())
    average = AveragedModel(model, use_buffers=use_buffers)
    seen = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append(raw(model[3]).detach().clone())
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(average.module[3].weight, mean / torch.linalg.matrix_norm(mean, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call_computes_with_the_given_weights_and_their_gradients(training):
    model = add_spectral_norm(critic()).train(training)
    inputs = torch.randn(4, 2, 6)
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    outputs = functional_call(model, given, inputs)
    outputs.sum().backward()
    expected = model(inputs)
    expected.sum().backward()
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(given[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "learnable"}, {"norm": "bidirectional"}], ids=["matrix", "learnable", "bidirectional"]
)
@pytest.mark.parametrize("kind", ["conv2d", "grouped conv", "grouped transposed"])
def test_stacked_layers_under_vmap_give_each_ones_outputs_and_gradients(kind, options):
    layers, inputs = [spectral_norm(LAYERS[kind](), **options) for _ in range(3)], torch.randn(2, 4, 5, 5)
    state, skeleton = stack_module_state(layers), copy.deepcopy(layers[0]).to("meta")

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), inputs).square().sum()

    grads, losses = vmap(grad_and_value(loss))(*state)
    for index, layer in enumerate(layers):
        expected = layer(inputs).square().sum()
        expected.backward()
        torch.testing.assert_close(losses[index], expected.detach(), rtol=1e-4, atol=1e-4)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(grads[name][index], parameter.grad, rtol=1e-3, atol=1e-3)
