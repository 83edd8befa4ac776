"""Every layer: the function that it computes, against the plain layer with its weights divided by an SVD's norms."""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations

from spectralnorm import add_spectral_norm, remove_spectral_norm, spectral_norm, summary
from spectralnorm.parametrizations import normalization_of

F64 = torch.float64


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(3, 2, 4))
        self.direction = nn.Parameter(torch.randn(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("oik,bik->bo", self.mixing, inputs) + inputs @ self.direction @ torch.ones(2, 3).to(inputs)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...]


def image(*shape: int) -> tuple[Tensor]:
    return (torch.linspace(-1, 2, 2 * torch.Size(shape).numel(), dtype=F64).sin().view(2, *shape),)


def recurrent(layers: int, directions: int, *, projected: bool = False) -> tuple[str, ...]:
    suffixes = ["", "_reverse"][:directions]
    kinds = ["ih", "hh", "hr"] if projected else ["ih", "hh"]
    return tuple(f"weight_{kind}_l{layer}{end}" for layer in range(layers) for end in suffixes for kind in kinds)


WEIGHT = ("weight",)
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
SEQUENCE = image(5, 4)
INDICES = torch.tensor([[1, 4, 0], [3, 3, 2]])
CASES = {
    "linear": Case(lambda: nn.Linear(4, 3), WEIGHT, image(4)),
    "bilinear": Case(lambda: nn.Bilinear(4, 3, 5), WEIGHT, (*image(4), *image(3))),
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), WEIGHT, image(2, 7)),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, (1, 3), padding="same"), WEIGHT, image(2, 5, 5)),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2, dilation=2), WEIGHT, image(2, 4, 4, 4)),
    "grouped conv2d": Case(lambda: nn.Conv2d(4, 6, 2, groups=2, padding_mode="circular"), WEIGHT, image(4, 5, 5)),
    "depthwise conv1d": Case(lambda: nn.Conv1d(3, 6, 2, groups=3), WEIGHT, image(3, 5)),
    "transposed conv1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), WEIGHT, image(2, 7)),
    "transposed conv2d": Case(lambda: nn.ConvTranspose2d(2, 3, (2, 3)), WEIGHT, image(2, 4, 4)),
    "transposed conv3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2, output_padding=0), WEIGHT, image(2, 3, 3, 3)),
    "grouped transposed conv2d": Case(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), WEIGHT, image(4, 4, 4)),
    "embedding": Case(lambda: nn.Embedding(6, 4, padding_idx=0), WEIGHT, (INDICES,)),
    "sparse embedding": Case(lambda: nn.Embedding(6, 4, sparse=True), WEIGHT, (INDICES,)),
    "embedding bag": Case(lambda: nn.EmbeddingBag(6, 4), WEIGHT, (INDICES,)),
    "attention": Case(lambda: nn.MultiheadAttention(4, 2), ("in_proj_weight", "out_proj.weight"), SEQUENCE * 3),
    "attention of other widths": Case(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=6), SEPARATE, (*SEQUENCE, *image(5, 3), *image(5, 6))
    ),
    "RNN": Case(lambda: nn.RNN(4, 3, 2, nonlinearity="relu"), recurrent(2, 1), SEQUENCE),
    "LSTM": Case(lambda: nn.LSTM(4, 3, 2, bidirectional=True), recurrent(2, 2), SEQUENCE),
    "projected LSTM": Case(lambda: nn.LSTM(4, 3, proj_size=2, bias=False), recurrent(1, 1, projected=True), SEQUENCE),
    "GRU": Case(lambda: nn.GRU(4, 3, bidirectional=True, batch_first=True), recurrent(1, 2), SEQUENCE),
    "RNN cell": Case(lambda: nn.RNNCell(4, 3), ("weight_ih", "weight_hh"), image(4)),
    "LSTM cell": Case(lambda: nn.LSTMCell(4, 3), ("weight_ih", "weight_hh"), image(4)),
    "GRU cell": Case(lambda: nn.GRUCell(4, 3), ("weight_ih", "weight_hh"), image(4)),
    "custom": Case(Custom, ("mixing", "direction"), image(2, 4)),
    "complex linear": Case(lambda: nn.Linear(4, 3, dtype=torch.cdouble), WEIGHT, (image(4)[0] * (1 - 2j),)),
}
UNGROUPED = [name for name in CASES if "group" not in name and "depthwise" not in name]
OPTIONS = {
    "learnable": {"mode": "learnable", "coefficient": 2.0},
    "cap": {"mode": "cap", "coefficient": 0.3},
    "bidirectional": {"norm": "bidirectional"},
    "manual": {"update": "manual"},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, tensor_name = name.rpartition(".")
    return layer.get_submodule(path), tensor_name


def plain_layer(case: Case, device: torch.device) -> nn.Module:
    layer = case.make()
    return layer.to(device) if layer_is_complex(layer) else layer.to(device, F64)


def layer_is_complex(layer: nn.Module) -> bool:
    return any(parameter.is_complex() for parameter in layer.parameters())


def normalized_layer(case: Case, plain: nn.Module, **options) -> nn.Module:
    layer = copy.deepcopy(plain)
    for name in case.names:
        spectral_norm(*owner(layer, name), **options)
    return layer


def outputs_of(layer: nn.Module, case: Case, weights: dict[str, Tensor] | None = None) -> list[Tensor]:
    """All tensors that the layer gives; of the plain layer with ``weights`` in the place of its own."""
    device = next(layer.parameters()).device
    inputs = tuple(tensor.to(device) for tensor in case.inputs)
    found = layer(*inputs) if weights is None else functional_call(layer, weights, inputs)
    flat, rest = [], [found]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor):
            flat.append(item)
        else:
            rest.extend(item)
    return flat


def loss_of(outputs: list[Tensor]) -> Tensor:
    return sum(
        (output.abs().square() * torch.arange(1, output.numel() + 1).to(output.real).view_as(output)).sum()
        for output in outputs
    )


def norm_by_svd(module: nn.Module, weight: Tensor) -> Tensor:
    """u^H W v with the first singular vectors of the matrix that the layer's documentation describes."""
    if weight.ndim == 1:
        return weight.norm()
    groups = getattr(module, "groups", 1)
    blocks = []
    for block in weight.split(weight.shape[0] // groups):
        matrix = block.transpose(0, 1).flatten(1) if getattr(module, "transposed", False) else block.flatten(1)
        left, _, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
        blocks.append((left[:, 0].conj() @ matrix @ right[0].conj()).real)
    return torch.stack(blocks).max()


def divided_weights(layer: nn.Module, case: Case, plain: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The raw weights as leaves, and divided by their norms, by name."""
    raw = {name: raw_weight(layer, name).detach().clone().requires_grad_() for name in case.names}
    return raw, {name: weight / norm_by_svd(owner(plain, name)[0], weight) for name, weight in raw.items()}


def raw_weight(layer: nn.Module, name: str) -> nn.Parameter:
    module, tensor_name = owner(layer, name)
    return module.parametrizations[tensor_name].original


@pytest.mark.filterwarnings("ignore:LSTM with projections")
class TestEveryLayer:
    @every_case
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
    def test_computes_with_weights_of_norm_one(self, case, training, grad, device):
        plain = plain_layer(case, device)
        layer = normalized_layer(case, plain).train(training)
        _, weights = divided_weights(layer, case, plain)
        with torch.set_grad_enabled(grad):
            found, again = outputs_of(layer, case), outputs_of(layer, case)
            torch.testing.assert_close(found, outputs_of(plain.train(training), case, weights), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, again, rtol=0, atol=0)

    @every_case
    def test_gradients_are_those_of_the_quotient_with_constant_vectors(self, case, device):
        plain = plain_layer(case, device)
        layer = normalized_layer(case, plain)
        raw, weights = divided_weights(layer, case, plain)
        loss_of(outputs_of(layer, case)).backward()
        loss_of(outputs_of(plain, case, weights)).backward()
        for name in case.names:
            torch.testing.assert_close(raw_weight(layer, name).grad, raw[name].grad, rtol=1e-3, atol=1e-4)

    @every_case
    def test_optimizer_step_changes_what_is_computed(self, case, device):
        plain = plain_layer(case, device)
        layer = normalized_layer(case, plain)
        before = outputs_of(layer, case)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        loss_of(before).backward()
        optimizer.step()
        _, weights = divided_weights(layer, case, plain)
        for name, weight in weights.items():
            torch.testing.assert_close(getattr(*owner(layer, name)), weight, rtol=1e-3, atol=1e-4)
        state = {**layer.state_dict(), **weights}
        expected = outputs_of(plain, case, {name: state[name] for name, _ in plain.named_parameters()})
        torch.testing.assert_close(outputs_of(layer, case), expected, rtol=1e-2, atol=1e-3)
        assert not torch.equal(outputs_of(layer, case)[0], before[0])

    @every_case
    def test_state_dict_carries_the_function(self, case, device):
        layer, other = (normalized_layer(case, plain_layer(case, device)) for _ in range(2))
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(outputs_of(other, case), outputs_of(layer, case), rtol=1e-4, atol=1e-6)

    @every_case
    def test_plain_state_dict_is_loaded_and_normalized(self, case, device):
        plain, layer = plain_layer(case, device), normalized_layer(case, plain_layer(case, device))
        layer.load_state_dict(plain.state_dict())
        _, weights = divided_weights(layer, case, plain)
        torch.testing.assert_close(outputs_of(layer, case), outputs_of(plain, case, weights), rtol=1e-4, atol=1e-5)

    @every_case
    def test_removal_leaves_function_class_and_parameters(self, case, device):
        plain = plain_layer(case, device)
        layer = copy.deepcopy(plain)
        parameters = {id(parameter) for parameter in layer.parameters()}
        for name in case.names:
            spectral_norm(*owner(layer, name))
        before = outputs_of(layer, case)
        assert remove_spectral_norm(layer) is layer
        torch.testing.assert_close(outputs_of(layer, case), before, rtol=0, atol=0)
        assert type(layer) is type(plain)
        assert {id(parameter) for parameter in layer.parameters()} == parameters
        assert layer.state_dict().keys() == plain.state_dict().keys()

    @every_case
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
    )
    def test_copy_computes_the_same_and_trains_alone(self, case, copied, device):
        layer = normalized_layer(case, plain_layer(case, device))
        before = outputs_of(layer, case)
        other = copied(layer)
        torch.testing.assert_close(outputs_of(other, case), before, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            raw_weight(other, case.names[0]).neg_()
        assert not all(map(torch.equal, outputs_of(other, case), before))
        torch.testing.assert_close(outputs_of(layer, case), before, rtol=0, atol=0)

    @pytest.mark.parametrize("name", [name for name in CASES if "complex" not in name])
    def test_move_and_cast_keep_the_function(self, name, device):
        case = CASES[name]
        layer = normalized_layer(case, plain_layer(case, device))
        before = outputs_of(layer, case)
        layer.float().double()
        torch.testing.assert_close(outputs_of(layer, case), before, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", UNGROUPED)
    def test_torchs_parametrization_computes_the_same_from_the_same_state(self, name, device):
        case = CASES[name]
        plain = plain_layer(case, device)
        ours, theirs = normalized_layer(case, plain), copy.deepcopy(plain)
        for each in case.names:
            torch_parametrizations.spectral_norm(*owner(theirs, each))
        outputs_of(ours, case)  # in training mode: the vectors reach the buffers
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(outputs_of(theirs.eval(), case), outputs_of(ours.eval(), case), rtol=1e-4, atol=1e-5)

    # Torch takes the norm of a complex weight as a complex number and sends gradient along its imaginary part.
    @pytest.mark.parametrize("name", [name for name in UNGROUPED if "complex" not in name])
    def test_per_forward_update_follows_torchs_parametrization_in_training(self, name, device):
        case = CASES[name]
        plain = plain_layer(case, device)
        ours, theirs = normalized_layer(case, plain, update="forward"), copy.deepcopy(plain)
        for each in case.names:
            torch_parametrizations.spectral_norm(*owner(theirs, each))
        theirs.load_state_dict(ours.state_dict())
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (ours, theirs)]
        for _ in range(3):
            losses = [loss_of(outputs_of(layer, case)) for layer in (ours, theirs)]
            torch.testing.assert_close(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())

    @pytest.mark.parametrize("name", [name for name in UNGROUPED if "complex" not in name])
    def test_per_forward_update_follows_torchs_parametrization_for_50_steps_in_float32(self, name, device):
        case = CASES[name]
        case = case._replace(inputs=tuple(each.float() if each.is_floating_point() else each for each in case.inputs))
        plain = case.make().to(device)
        ours, theirs = normalized_layer(case, plain, update="forward"), copy.deepcopy(plain)
        for each in case.names:
            torch_parametrizations.spectral_norm(*owner(theirs, each))
        theirs.load_state_dict(ours.state_dict())
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (ours, theirs)]
        before = copy.deepcopy(ours.state_dict())
        for _ in range(50):
            for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                sum(output.square().mean() for output in outputs_of(layer, case)).backward()
                optimizer.step()
        assert not all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)

    @every_case
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_trains_with_every_option(self, case, options, device):
        layer = normalized_layer(case, plain_layer(case, device), **options)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        before = [raw_weight(layer, name).detach().clone() for name in case.names]
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(outputs_of(layer, case)).backward()
            grads = [parameter.grad for parameter in layer.parameters()]
            assert all(
                grad.coalesce().values().isfinite().all() if grad.is_sparse else grad.isfinite().all() for grad in grads
            )
            optimizer.step()
        assert all(each.isfinite().all() for each in outputs_of(layer, case))
        assert not all(map(torch.equal, before, (raw_weight(layer, name) for name in case.names)))

    @pytest.mark.parametrize("torchs", [torch_parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["P", "O"])
    @pytest.mark.parametrize("name", UNGROUPED)
    def test_what_torch_normalized_is_taken_over(self, name, torchs, device):
        case = CASES[name]
        plain = plain_layer(case, device)
        layer = copy.deepcopy(plain)
        parameters = {id(parameter) for parameter in layer.parameters()}
        names = [each for each in case.names if each != "direction"]  # the hook knows no vectors
        for each in names:
            torchs(*owner(layer, each), n_power_iterations=2, eps=1e-8)
        add_spectral_norm(layer)
        normalization = normalization_of(*owner(layer, names[0]))
        assert (normalization.n_power_iterations, normalization.eps) == (2, 1e-8)
        assert {id(parameter) for parameter in layer.parameters()} == parameters
        _, weights = divided_weights(layer, case._replace(names=names), plain)
        torch.testing.assert_close(outputs_of(layer, case), outputs_of(plain, case, weights), rtol=1e-4, atol=1e-5)
        loss_of(outputs_of(layer, case)).backward()
        assert all(raw_weight(layer, each).grad is not None for each in names)

    @every_case
    def test_whole_model_call_finds_its_weights(self, case, device):
        layer = plain_layer(case, device)
        include = list(case.names) if isinstance(layer, Custom) else None
        rows = {row.layer: row for row in summary(add_spectral_norm(layer, include=include)).rows}
        found = {name for name, row in rows.items() if row.norm is not None}
        assert found == {name.removesuffix(".weight") for name in case.names}
        assert [rows[name].norm for name in found] == pytest.approx([1] * len(found), rel=1e-4)


def test_gradient_of_a_complex_weight_is_that_of_its_true_norm():
    layer = spectral_norm(nn.Linear(4, 3, dtype=torch.cdouble))
    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    factors = torch.randn(3, 4, dtype=torch.cdouble)
    (layer.weight * factors).real.sum().backward()
    (weight / torch.linalg.matrix_norm(weight, 2) * factors).real.sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, weight.grad)


class TestEmbedding:
    def test_row_of_the_padding_index_stays_zero(self):
        layer = spectral_norm(nn.Embedding(5, 3, padding_idx=2))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(3):
            layer(torch.tensor([0, 2, 4])).square().sum().backward()
            optimizer.step()
        assert layer.weight[2].count_nonzero() == 0

    @pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
    def test_rows_scaled_to_max_norm_do_not_reach_the_parameter(self, make):
        layer = spectral_norm(make(5, 3, max_norm=0.1))
        twin = torch_parametrizations.spectral_norm(make(5, 3, max_norm=0.1))
        before = layer.parametrizations.weight.original.detach().clone()
        twin.load_state_dict(layer.state_dict())
        outputs = layer(INDICES)
        outputs.square().sum().backward()
        torch.testing.assert_close(outputs, twin.eval()(INDICES), rtol=1e-3, atol=1e-5)
        layer(INDICES)
        assert torch.equal(layer.parametrizations.weight.original, before)
        assert layer.parametrizations.weight.original.grad.isfinite().all()


class TestFusedAttention:
    """In eval mode without grad torch hands the weights of a whole layer to one kernel."""

    @pytest.mark.parametrize(
        ("make", "kernel"),
        [
            (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "_transformer_encoder_layer_fwd"),
            (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "_native_multi_head_attention"),
        ],
    )
    def test_kernel_gets_the_normalized_weights(self, make, kernel, monkeypatch, device):
        layer = add_spectral_norm(make().to(device)).eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(7)
        calls, original = [], getattr(torch, kernel)
        monkeypatch.setattr(torch, kernel, lambda *args: calls.append(args) or original(*args))
        inputs = torch.randn(2, 5, 8, device=device)
        arguments = (inputs,) if kernel.startswith("_transformer") else (inputs, inputs, inputs)
        with torch.no_grad():
            outputs = layer(*arguments)
        assert len(calls) == 1
        matrices = [each for each in calls[0] if isinstance(each, Tensor) and each.ndim == 2]
        assert [torch.linalg.matrix_norm(matrix, 2).item() for matrix in matrices] == pytest.approx(
            [1] * len(matrices), rel=1e-4
        )
        assert len(matrices) in (2, 4)
        remove_spectral_norm(layer)
        torch.testing.assert_close(layer(*arguments)[0], outputs[0], rtol=1e-4, atol=1e-5)


class TestSharedClass:
    def test_layer_with_fewer_normalized_weights_works_beside_one_with_more(self):
        more = spectral_norm(spectral_norm(nn.Linear(3, 2)), "bias")
        fewer = spectral_norm(nn.Linear(3, 2))
        assert type(fewer) is type(more)
        bias = fewer.bias
        del fewer.bias
        with pytest.raises(AttributeError):
            fewer.bias  # noqa: B018
        fewer.bias = torch.ones(2)  # as DataParallel and FSDP put plain tensors in a parameter's place
        assert torch.equal(fewer(torch.zeros(3)), torch.ones(2))
        del fewer.bias
        fewer.bias = bias
        assert fewer.bias is bias
        assert more.bias.norm().item() == pytest.approx(1)
