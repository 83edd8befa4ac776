"""Within `torch.nn.utils.parametrize.cached` all uses of a weight are one tensor, until the weight changes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from spectralnorm import spectral_norm


def raw(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def test_gradient_of_the_layers_weight_can_be_asked_for():
    layer, inputs = spectral_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    with parametrize.cached():
        outputs = layer(inputs)
        (gradient,) = torch.autograd.grad(outputs.sum(), layer.weight)
    torch.testing.assert_close(gradient, inputs.sum(0).expand(3, 4))


def test_each_use_is_the_same_tensor_and_another_one_later():
    layer = spectral_norm(nn.Linear(4, 3))
    with parametrize.cached():
        first = layer.weight
        assert layer.weight is first
    assert layer.weight is not first


def test_backwards_of_several_uses_can_be_separate():
    layer, inputs = spectral_norm(nn.Linear(4, 3)), torch.randn(2, 5, 4)
    (layer(inputs[0]).square().sum() + layer(inputs[1]).sum()).backward()
    together = raw(layer).grad.clone()
    layer.zero_grad()
    with parametrize.cached():
        layer(inputs[0]).square().sum().backward()
        layer(inputs[1]).sum().backward()
    torch.testing.assert_close(raw(layer).grad, together)


def test_step_within_is_seen():
    layer, inputs = spectral_norm(nn.Linear(4, 3)), torch.randn(5, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with parametrize.cached():
        before = layer.weight
        layer(inputs).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(layer.weight, before)
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-2)


def test_write_within_is_seen():
    layer = spectral_norm(nn.Linear(4, 4))
    with parametrize.cached():
        nn.init.eye_(layer.weight)
        assert torch.equal(layer.weight, torch.eye(4))
        assert torch.equal(raw(layer), torch.eye(4))


def test_uses_with_and_without_grad_are_apart():
    layer = spectral_norm(nn.Linear(4, 3))
    with parametrize.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        first = layer.weight
        assert first.requires_grad
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert layer.weight is first


def test_autocast_within_gets_its_type():
    layer = spectral_norm(nn.Linear(4, 3))
    with parametrize.cached():
        assert layer.weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer.weight
            assert rounded.dtype == torch.bfloat16
            assert layer.weight is rounded
        assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("options", [{"mode": "learnable"}, {"update": "forward"}], ids=["learnable", "forward"])
def test_other_options_can_go_backward_from_each_use(options):
    layer = spectral_norm(nn.Linear(4, 3), **options)
    with parametrize.cached():
        for _ in range(2):
            layer(torch.randn(5, 4)).sum().backward()
    assert raw(layer).grad.abs().sum() > 0


def test_weight_that_others_make_is_computed_once():
    layer = spectral_norm(torch_parametrizations.weight_norm(nn.Linear(40, 30)))
    with parametrize.cached():
        first = layer.weight
        assert layer.weight is first
        vectors = layer.parametrizations.weight[1]._u.clone()
        layer(torch.randn(5, 40))
        assert torch.equal(layer.parametrizations.weight[1]._u, vectors)
        with torch.no_grad():
            assert layer.weight is not first
