"""SLL and CPL: what they compute, and that no input's difference grows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralnorm.errors import UserError
from spectralnorm.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

LINEAR, CONVOLUTIONS = [SLLLinear, CPLLinear], [SLLConv2d, CPLConv2d]
ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.LeakyReLU(0.5)]


def _randomize(layer, scale):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.weight.mul_(scale)


def _cases(kinds, device):
    for kind in kinds:
        for activation in ACTIVATIONS:
            for scale in (1e-3, 1.0, 30.0):
                layer = kind(3, hidden=5, activation=activation, device=device, dtype=torch.float64)
                _randomize(layer, scale)
                yield layer


def test_dense_layers_stretch_nowhere(device):
    for layer in _cases(LINEAR, device):
        samples = torch.randn(200, 3, dtype=torch.float64, device=device) / layer.weight.detach().std()
        norms = torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(layer))(samples), 2)
        assert norms.amax() <= 1 + 1e-12
        before = torch.pdist(samples)
        assert (torch.pdist(layer(samples)) <= before * (1 + 1e-12)).all()


def test_convolutions_stretch_nowhere(device):
    for layer in _cases(CONVOLUTIONS, device):
        samples = torch.randn(3, 3, 4, 5, dtype=torch.float64, device=device) / layer.weight.detach().std()
        assert all(_one(layer, sample) <= 1 + 1e-12 for sample in samples)
        first, second = samples, samples + torch.randn_like(samples) * 1e-2
        before = (first - second).flatten(1).norm(dim=1)
        assert ((layer(first) - layer(second)).flatten(1).norm(dim=1) <= before * (1 + 1e-12)).all()


def _one(layer, sample):
    jacobian = torch.autograd.functional.jacobian(lambda inputs: layer(inputs[None])[0], sample)
    return torch.linalg.matrix_norm(jacobian.reshape(sample.numel(), -1), 2)


def test_a_smooth_kernel_on_a_large_image_does_not_stretch_either(device):
    # All ones: patches add up, the norm of the convolution is near to its bound for all sizes.
    for kind in CONVOLUTIONS:
        layer = kind(1, device=device, dtype=torch.float64, activation=nn.Identity())
        nn.init.ones_(layer.weight)
        assert 0.9 < _one(layer, torch.randn(1, 14, 14, dtype=torch.float64, device=device)) <= 1 + 1e-12


@pytest.mark.parametrize("kind", LINEAR)
def test_dense_layers_are_the_papers_formula(kind, device):
    layer = kind(4, hidden=6, device=device, dtype=torch.float64)
    _randomize(layer, 1.0)
    weight, inputs = layer.weight, torch.randn(7, 4, dtype=torch.float64, device=device)
    if kind is SLLLinear:
        shares = layer.log_shares.exp()
        squares = ((weight @ weight.mT).abs() * shares / shares[:, None]).sum(1)
    else:
        squares = torch.linalg.matrix_norm(weight, 2).square().expand(6)
    expected = inputs - 2 * (F.relu(inputs @ weight.mT + layer.bias) / squares) @ weight
    tolerance = {} if kind is SLLLinear else {"rtol": 1e-3, "atol": 1e-3}  # the bound is not the norm
    torch.testing.assert_close(layer(inputs), expected, **tolerance)


@pytest.mark.parametrize("kind", [SLLLinear, SLLConv2d])
def test_gradients_of_sll_are_the_functions(kind, device):
    layer = kind(2, hidden=3, activation=nn.Tanh(), device=device, dtype=torch.float64)
    _randomize(layer, 1.0)
    shape = (2, 2) if kind is SLLLinear else (1, 2, 3, 3)
    inputs = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(inputs, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), inputs)

    assert torch.autograd.gradcheck(function, (inputs, *values))


@pytest.mark.parametrize("kind", [CPLLinear, CPLConv2d])
def test_gradients_of_cpl_go_through_the_norm(kind, device):
    layer = kind(3, hidden=2, activation=nn.Tanh(), device=device, dtype=torch.float64)
    _randomize(layer, 0.2)
    with torch.no_grad():  # one direction that leads clearly
        layer.weight[0] += 1.0
    inputs = torch.randn((4, 3) if kind is CPLLinear else (2, 3, 6, 6), dtype=torch.float64, device=device)
    layer(inputs).square().sum().backward()
    found = (layer.weight.grad * layer.weight).sum()  # along the weight itself, where the norm changes most
    weight, step, values = layer.weight.detach().clone(), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            layer.weight.copy_(weight * (1 + sign * step))
            values.append(layer(inputs).square().sum())
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", LINEAR + CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_weights_leave_inputs_alone_with_finite_gradients(kind, dtype, device):
    layer = kind(2, device=device, dtype=dtype)
    nn.init.zeros_(layer.weight)
    inputs = torch.randn(3, 2, 4, 4, device=device, dtype=dtype)
    inputs = inputs if kind in CONVOLUTIONS else inputs[..., 0, 0]
    outputs = layer(inputs)
    torch.testing.assert_close(outputs, inputs)
    outputs.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", LINEAR)
def test_the_step_is_rounded_up_in_half_types(kind, device):
    for _ in range(20):
        layer = kind(6, device=device, dtype=torch.bfloat16)
        _randomize(layer, 1.0)
        step = layer._steps().double().expand(6)
        weight = layer.weight.double()
        if kind is SLLLinear:  # diag(t) - W W^T stays positive
            assert torch.linalg.eigvalsh(torch.diag(2 * step) - weight @ weight.mT).amin() >= -1e-10
        else:
            assert 2 * step[0] >= torch.linalg.matrix_norm(weight, 2).square() * (1 - 1e-12)


def test_training_learns_and_never_stretches(device):
    network = nn.Sequential(*(SLLLinear(8, device=device) for _ in range(3)))
    inputs = torch.randn(64, 8, device=device)
    targets = inputs.abs() * 0.5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    jacobians = torch.func.vmap(torch.func.jacrev(network.double()))(inputs.double())
    assert torch.linalg.matrix_norm(jacobians, 2).amax() <= 1 + 1e-12


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sizes_that_do_not_fit_are_refused(kind):
    with pytest.raises(UserError, match="kernel_size must be odd"):
        kind(3, 4)
    with pytest.raises(UserError, match="must be positive"):
        kind(0)
