"""Recurrent layers: the weights that the fused kernel gets, and what is left in the layer afterwards."""

import copy
import warnings

import pytest
import torch
import torch.fx
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_sequence

from spectralnorm import add_spectral_norm, remove_spectral_norm, spectral_norm

INPUTS = torch.linspace(-2, 2, 40).view(5, 2, 4)
KINDS = [nn.RNN, nn.LSTM, nn.GRU]


def pair(kind: type[nn.RNNBase] = nn.LSTM, **options) -> tuple[nn.RNNBase, nn.RNNBase]:
    """A normalized layer, and a plain one with the same weights in use."""
    layer = add_spectral_norm(kind(4, 3, num_layers=2, bidirectional=True), **options)
    return layer, remove_spectral_norm(copy.deepcopy(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_forward_is_held_behind_it(kind):
    layer, _ = pair(kind)
    layer(INPUTS)[0].sum().backward()
    assert layer._flat_weights == [None] * len(layer._flat_weights_names)
    with pytest.raises(RuntimeError):
        layer(INPUTS[..., :2])
    assert layer._flat_weights == [None] * len(layer._flat_weights_names)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind):
    layer, plain = pair(kind)
    packed = pack_sequence([INPUTS[:, 0], INPUTS[:3, 1]])
    torch.testing.assert_close(layer(packed)[0].data, plain(packed)[0].data)


@pytest.mark.parametrize("kind", KINDS)
def test_flatten_parameters_and_moves_change_nothing(kind):
    layer, plain = pair(kind)
    layer.flatten_parameters()
    layer.to(torch.device("cpu")).apply(lambda module: None)
    torch.testing.assert_close(layer(INPUTS)[0], plain(INPUTS)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_layer_works_after_removal_by_torchs_function(kind):
    layer, plain = pair(kind)
    for name in [name for name in layer._flat_weights_names if name.startswith("weight")]:
        parametrize.remove_parametrizations(layer, name)
        torch.testing.assert_close(layer(INPUTS)[0], plain(INPUTS)[0])
    assert type(layer) is kind
    assert all(isinstance(weight, nn.Parameter) for weight in layer._flat_weights)
    copy.deepcopy(layer)(INPUTS)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None


def test_one_weight_alone_can_be_normalized():
    layer = nn.LSTM(4, 3)
    before = layer.weight_ih_l0.detach().clone()
    spectral_norm(layer, "weight_hh_l0")
    layer(INPUTS)[0].sum().backward()
    assert torch.equal(layer.weight_ih_l0, before)
    assert layer.weight_ih_l0.grad is not None
    assert layer.parametrizations.weight_hh_l0.original.grad is not None


def test_functional_call_uses_the_tensors_it_is_given():
    layer, plain = pair()
    state = {name: 3 * tensor if name.endswith("original") else tensor for name, tensor in layer.state_dict().items()}
    torch.testing.assert_close(functional_call(layer.eval(), state, (INPUTS,))[0], plain(INPUTS)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_layer_computes_the_same():
    layer, plain = pair()
    assert torch.equal(torch.jit.script(nn.Sequential(layer))(INPUTS)[0], plain(INPUTS)[0])


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "from bytecode"])
def test_exported_layer_computes_the_same(strict):
    if strict and torch.__version__ < (2, 10):
        pytest.skip("an older torch refuses to export bytecode that changes an attribute of a module")
    layer, plain = pair()
    exported = torch.export.export(layer.eval(), (INPUTS,), strict=strict).module()
    torch.testing.assert_close(exported(INPUTS)[0], plain(INPUTS)[0])


def test_symbolic_trace_keeps_the_layer_whole():
    layer, plain = pair()
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    torch.testing.assert_close(traced(INPUTS)[0], plain(INPUTS)[0])


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_model_compiles_no_weight_of_a_recurrent_layer():
    model, counter = add_spectral_norm(nn.Sequential(nn.LSTM(4, 3, num_layers=3, bidirectional=True))), CompileCounter()
    plain = remove_spectral_norm(copy.deepcopy(model))
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(compiled(INPUTS)[0], plain(INPUTS)[0])
    compiled(INPUTS)
    assert counter.frame_count <= 2


def test_frozen_layer_passes_gradients_to_its_input():
    layer, plain = pair()
    inputs = [INPUTS.clone().requires_grad_() for _ in range(2)]
    for each, tensor in zip((layer, plain), inputs, strict=True):
        each.requires_grad_(False)(tensor)[0].square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_float32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_cudnn_gets_the_normalized_weights_in_one_piece(kind, grad):
    layer, plain = pair(kind)
    layer.cuda()
    addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    raw = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("error")
        for _ in range(2):
            outputs = layer(INPUTS.cuda())[0]
    torch.testing.assert_close(outputs.cpu(), plain(INPUTS)[0], rtol=1e-3, atol=1e-4)
    if grad:
        outputs.square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.data_ptr() == addresses[name]
        assert torch.equal(parameter, raw[name])
