"""Laws that hold for every layer, shape, type and option: tried on examples that hypothesis makes up."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectralnorm import add_spectral_norm, monitor, remove_spectral_norm, summary
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
