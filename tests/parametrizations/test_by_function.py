"""Weights as functions: orthogonal, capped, rescaled. What the layer uses, against SVD."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm import parametrizations
from spectralnorm.errors import UserError
from spectralnorm.linalg.convolution import ConvolutionGeometry

REGISTER = [
    parametrizations.bjorck,
    parametrizations.cayley,
    parametrizations.soft_cap,
    parametrizations.almost_orthogonal,
]
CONVOLUTIONS = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "stride": 2}, (9,)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (5, 6)),
    (nn.Conv2d, {"kernel_size": 4, "padding": 1, "stride": 2, "groups": 2}, (6, 6)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 4)),
    (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2}, (3, 4)),
    (nn.Conv3d, {"kernel_size": 2}, (3, 3, 3)),
]
SVD = 1e-12


def _norm(layer, size=None):
    weight = layer.weight.detach().double()
    if size is None:
        return torch.linalg.matrix_norm(weight, 2)
    geometry = ConvolutionGeometry.of(layer)
    count = geometry.channels(weight)[0] * torch.Size(size).numel()
    basis = torch.eye(count, dtype=torch.float64, device=weight.device).reshape(count, -1, *size)
    return torch.linalg.matrix_norm(geometry.apply(basis, weight).flatten(1), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coefficient", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("register", REGISTER)
def test_a_dense_layers_norm_stays_below_the_coefficient(register, coefficient, dtype, device):
    for shape in [(8, 8), (30, 12), (12, 30), (1, 20)]:
        for scale in (1e-2, 1.0, 1e2):
            layer = nn.Linear(*shape, device=device)
            with torch.no_grad():
                layer.weight.mul_(scale)
            register(layer.to(dtype), coefficient=coefficient)
            assert layer.weight.dtype == dtype
            assert _norm(layer) <= coefficient * (1 + SVD)


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize(("kind", "options", "size"), CONVOLUTIONS)
def test_a_convolutions_norm_stays_below_the_coefficient(kind, options, size, register, device):
    for coefficient in (1.0, 0.7):
        for fill in (None, 1.0):
            layer = kind(4, 6, **options, device=device)
            if fill is not None:
                nn.init.constant_(layer.weight, fill)
            register(layer, coefficient=coefficient)
            assert _norm(layer, size) <= coefficient * (1 + SVD)
            assert _norm(layer, size) > 0.1 * coefficient


def test_bjorck_and_cayley_make_a_patchifying_convolution_orthogonal(device):
    for register in (parametrizations.bjorck, parametrizations.cayley):
        layer = register(nn.Conv2d(3, 8, 4, stride=4, device=device, dtype=torch.float64))
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-2, atol=0)


@pytest.mark.parametrize("register", REGISTER)
def test_gradients_reach_the_raw_weight_and_training_keeps_the_norm(register, device):
    layer = register(nn.Linear(10, 10, device=device))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    inputs, targets = torch.randn(2, 32, 10, device=device)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        assert _norm(layer) <= 1 + SVD
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("register", REGISTER)
def test_gradients_are_the_parametrizations(register, device):
    dense = register(nn.Linear(3, 4, device=device, dtype=torch.float64))
    convolution = register(nn.Conv1d(2, 3, 3, device=device, dtype=torch.float64))
    for layer in (dense, convolution):
        parts = layer.parametrizations.weight
        # The last division is by one but for rounding, and by a constant.
        assert torch.autograd.gradcheck(parts[0], parts.original, atol=1e-4)


@pytest.mark.parametrize("register", REGISTER)
def test_they_are_saved_and_baked_like_any_parametrization(register, device):
    layer = register(nn.Conv2d(3, 4, 3, device=device))
    twin = register(nn.Conv2d(3, 4, 3, device=device))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    pickle.loads(pickle.dumps(layer.parametrizations.weight[0]))
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)


def test_they_tell_what_they_are():
    assert "bjorck, num_iterations=7, coefficient=2.0" in repr(
        parametrizations.bjorck(nn.Linear(2, 2), num_iterations=7, coefficient=2.0)
    )


def test_a_whole_model_normalized_afterwards_leaves_them_alone(device):
    model = nn.Sequential(parametrizations.cayley(nn.Linear(4, 4, device=device)), nn.Linear(4, 4, device=device))
    before = model[0].weight.detach().clone()
    sn.add_spectral_norm(model)
    assert torch.equal(model[0].weight, before)
    assert parametrizations.is_normalized(model[1])


@pytest.mark.parametrize("register", REGISTER)
def test_what_cannot_be_done_is_refused(register):
    with pytest.raises(UserError, match="must be a matrix or the kernel"):
        register(nn.BatchNorm1d(3))
    with pytest.raises(UserError, match="has no weight 'wait'"):
        register(nn.Linear(3, 3), "wait")
    with pytest.raises(UserError, match="coefficient must be positive"):
        register(nn.Linear(3, 3), coefficient=-1.0)
