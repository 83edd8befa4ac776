"""Laws that hold for every layer, shape, type and option: tried on examples that hypothesis makes up."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectralnorm import add_spectral_norm, monitor, remove_spectral_norm, spectral_norm, summary, update_
from spectralnorm.transform import normalized_weights

small = st.integers(1, 5)
DTYPES = {torch.float64: 1e-4, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    inputs = groups * draw(small)
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    layer = getattr(nn, name)(inputs, groups * draw(small), kernel, stride=stride, dilation=dilation, groups=groups)
    return layer, torch.randn(2, inputs, *[6] * dims)


@st.composite
def recurrent(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    inputs, hidden = draw(small), draw(st.integers(2, 5))
    options = {"num_layers": draw(st.integers(1, 2)), "bidirectional": draw(st.booleans()), "bias": draw(st.booleans())}
    kind = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    return kind(inputs, hidden, **options), torch.randn(3, 2, inputs)


@st.composite
def others(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    first, second = draw(small), draw(small)
    return draw(
        st.sampled_from(
            [
                (nn.Linear(first, second), torch.randn(2, first)),
                (nn.Sequential(nn.LazyLinear(second), nn.ReLU(), nn.Linear(second, 2)), torch.randn(2, first)),
                (nn.Embedding(first, second), torch.arange(first)),
                (nn.EmbeddingBag(first, second), torch.arange(first).view(1, -1)),
                (nn.TransformerEncoderLayer(2 * first, 2, second, dropout=0), torch.randn(3, 2, 2 * first)),
                (nn.LSTMCell(first, second), torch.randn(2, first)),
            ]
        )
    )


def norm_by_svd(module: nn.Module, weight: Tensor) -> float:
    """Norm of the matrix, one block on the diagonal per group, that a layer's documentation describes."""
    is_transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    blocks = weight.detach().double().chunk(getattr(module, "groups", 1))
    whole = torch.block_diag(*((block.transpose(0, 1) if is_transposed else block).flatten(1) for block in blocks))
    return torch.linalg.matrix_norm(whole, 2).item()


def first_tensor(outputs: Tensor | tuple) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else first_tensor(outputs[0])


@given(
    layer_and_inputs=st.one_of(convolutions(), recurrent(), others()),
    dtype=st.sampled_from(list(DTYPES)),
    mode=st.sampled_from(["normalize", "cap"]),
    coefficient=st.floats(0.1, 10),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    training=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_norm_in_use_is_what_was_asked_for_and_removal_keeps_the_function(
    layer_and_inputs, dtype, mode, coefficient, scale, training
):
    model, inputs = layer_and_inputs
    inputs = inputs if inputs.dtype == torch.int64 else inputs.to(dtype)
    model = add_spectral_norm(copy.deepcopy(model).to(dtype), mode=mode, coefficient=coefficient).train(training)
    model(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    before = first_tensor(model(inputs))

    rtol, sigmas = DTYPES[dtype], monitor(model)
    rows = {row.layer: row for row in summary(model).rows if row.sigma is not None}
    weights = list(normalized_weights(model))
    assert rows.keys() == sigmas.keys() == {name for name, *_ in weights}
    for name, module, tensor, _ in weights:
        raw = norm_by_svd(module, module.parametrizations[tensor].original)
        in_use = norm_by_svd(module, getattr(module, tensor))
        assert in_use == pytest.approx(coefficient if mode == "normalize" else min(coefficient, raw), rel=rtol)
        assert (sigmas[name], rows[name].sigma, rows[name].norm) == pytest.approx((raw, raw, in_use), rel=rtol)

    keys = {name for name, _ in remove_spectral_norm(model).named_parameters()}
    assert not any("parametrizations" in key for key in keys)
    torch.testing.assert_close(first_tensor(model(inputs)), before, rtol=0, atol=0)


@st.composite
def small_layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """One weight, and images small enough for the matrix of the whole map."""
    if draw(st.booleans()):
        return nn.Linear(inputs := draw(small), draw(small)), torch.randn(2, inputs)
    dims, groups, transposed = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
    inputs = groups * draw(st.integers(1, 3))
    arguments = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1)), "groups": groups}
    if not transposed:
        arguments["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        arguments["dilation"] = draw(st.integers(1, 2))
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    layer = kind(inputs, groups * draw(st.integers(1, 3)), draw(st.integers(2, 3)), **arguments)
    return layer, torch.randn(2, inputs, *[5] * dims)


@st.composite
def options(draw: st.DrawFn) -> dict[str, object]:
    """Options that are offered together."""
    strict = draw(st.booleans())
    norm = draw(st.sampled_from(["matrix", "operator"] if strict else ["matrix", "operator", "bidirectional"]))
    return {
        "strict": strict,
        "norm": norm,
        "mode": draw(st.sampled_from(["normalize", "cap"] if strict else ["normalize", "cap", "learnable"])),
        "update": draw(st.sampled_from(["step", "forward", "manual"])) if norm != "operator" or strict else "step",
        "coefficient": draw(st.floats(0.1, 10)),
        "n_power_iterations": draw(st.integers(1, 3)),
        "eps": draw(st.sampled_from([1e-12, 1e-6])),
    }


def norm_meant(module: nn.Module, weight: Tensor, inputs: Tensor, chosen: dict[str, object]) -> float:
    """By SVD, the norm of ``weight`` that the options are about; of a map, that of the matrix with a row per pixel."""
    if chosen["norm"] == "bidirectional":
        blocks = weight.detach().double().chunk(getattr(module, "groups", 1))
        norms = [
            max(torch.linalg.matrix_norm(each, 2).item() for each in matrices)
            for matrices in (
                [block.flatten(1) for block in blocks],
                [block.transpose(0, 1).flatten(1) for block in blocks],
            )
        ]
        return sum(norms) / 2
    if isinstance(module, nn.Linear) or (chosen["norm"] == "matrix" and not chosen["strict"]):
        return norm_by_svd(module, weight)
    plain = remove_spectral_norm(copy.deepcopy(module)).double().eval()
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.zero_()
        units = torch.eye(inputs[0].numel(), dtype=torch.float64).view(-1, *inputs.shape[1:])
        return torch.linalg.matrix_norm(plain(units).flatten(1), 2).item()


@given(
    layer_and_inputs=small_layers(),
    chosen=options(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_laws_of_every_option(layer_and_inputs, chosen, dtype, scale):
    plain, inputs = layer_and_inputs
    plain, inputs = copy.deepcopy(plain).to(dtype), inputs.to(dtype)
    with torch.no_grad():
        plain.weight.mul_(scale)
    model = add_spectral_norm(copy.deepcopy(plain), **chosen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(inputs)
        outputs.square().mean().backward()
        assert outputs.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()

    for _ in range(40):  # one iteration at least each; the other rules than "step" do not look for the norm anew
        update_(model)
    model.eval()
    part, raw = model.parametrizations.weight[0], model.parametrizations.weight.original
    found = norm_meant(model, model.weight, inputs, chosen)
    before = norm_meant(model, raw, inputs, chosen)
    wanted = min(part.coefficient, before) if chosen["mode"] == "cap" else part.coefficient
    if chosen["strict"]:
        assert found <= wanted * (1 + 1e-9)
    else:
        assert found == pytest.approx(wanted, rel=2e-2)

    expected = model(inputs)
    assert torch.equal(copy.deepcopy(model)(inputs), expected)
    other = add_spectral_norm(copy.deepcopy(plain), **chosen)
    other(inputs)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(inputs), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    torch.testing.assert_close(remove_spectral_norm(model)(inputs), expected, rtol=0, atol=0)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    dim=st.integers(-4, 3),
    coefficient=st.floats(0.1, 10),
    n_power_iterations=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_dim_counts_the_outputs(shape, dim, coefficient, n_power_iterations):
    layer = nn.ParameterDict({"weight": torch.randn(shape)})
    if not -len(shape) <= dim < len(shape):
        with pytest.raises(IndexError, match=f"dim must lie in .* got {dim}"):
            spectral_norm(layer, dim=dim)
        return
    spectral_norm(layer, "weight", n_power_iterations, dim=dim, coefficient=coefficient)
    matrix = layer.weight.detach().double().movedim(dim, 0).flatten(1)
    assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(coefficient, rel=1e-4)
