"""What is handed out under autocast: the weight rounded once for all of its uses."""

import pytest
import torch
from torch import nn

from spectralnorm import add_spectral_norm, export_state_dict, remove_spectral_norm, spectral_norm

LAYERS = {
    "linear": (lambda: nn.Linear(9, 10), (4, 9)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7)),
}


def raw(layer):
    return layer.parametrizations.weight.original


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_all_uses_of_a_weight_share_one_rounding(name, dtype, device):
    make, shape = LAYERS[name]
    layer = spectral_norm(make().to(device))
    x = torch.randn(shape, device=device)
    full = layer.weight.detach().clone()
    with torch.autocast(device.type, dtype):
        first, second = layer.weight, layer.weight
        with torch.no_grad():
            third = layer.weight
        assert first.dtype == dtype
        assert torch.equal(first, full.to(dtype))
        assert first.data_ptr() == second.data_ptr() == third.data_ptr()
        assert layer(x).dtype == dtype
        with torch.autocast(device.type, enabled=False):
            assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, full)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_a_weight_that_is_rounded_at_every_use(name, device):
    make, shape = LAYERS[name]
    layer = spectral_norm(make().to(device))
    real, fake = torch.randn(2, *shape, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        (layer(real).float().square().mean() - layer(fake).float().mean()).backward()
    mine = raw(layer).grad.clone()
    raw(layer).grad = None
    tensors = {"weight": layer.weight, "bias": layer.bias}
    with torch.autocast(device.type, torch.bfloat16):
        score, other = (torch.func.functional_call(make().to(device), tensors, image) for image in (real, fake))
        (score.float().square().mean() - other.float().mean()).backward()
    # What comes from two uses is added in bfloat16 here and in float32 there: one rounding of a sum.
    largest = float(raw(layer).grad.abs().max())
    torch.testing.assert_close(mine, raw(layer).grad, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps * largest)
    assert mine.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", ["step", "forward"])
@pytest.mark.parametrize("name", LAYERS)
def test_vectors_of_a_training_under_autocast_are_not_rounded(name, update, dtype, device):
    make, shape = LAYERS[name]
    layer = spectral_norm(make().to(device), update=update)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = layer(torch.randn(shape, device=device)).float().square().mean()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype):  # written to the buffers in here, at the first use after a step
        layer(torch.randn(shape, device=device))
    normalization = layer.parametrizations.weight[0]
    u, v = normalization._u.double(), normalization._v.double()
    torch.testing.assert_close(u.norm().item(), 1.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(v.norm().item(), 1.0, rtol=0, atol=1e-6)
    weight = raw(layer).detach().double()
    blocks = normalization.weight_matrix(weight)
    matrix = blocks if blocks.ndim == 2 else torch.block_diag(*blocks)
    if normalization.view.groups > 1:  # whole vectors have one part for each block along one side alone
        v = torch.cat([v if float(part.norm()) > 0.5 else 0 * v for part in u.unflatten(0, (3, -1))])
    torch.testing.assert_close((u @ matrix @ v).item(), normalization.sigma(raw(layer)).item(), rtol=1e-5, atol=0)


def test_separate_backwards_steps_and_evaluation_follow_the_weight(device):
    model = add_spectral_norm(nn.Sequential(nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 1))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 9, device=device)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            real = model(x).sum()
            fake = model(-x).square().sum()
        real.backward()
        fake.backward()
        optimizer.step()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            seen.append(model[0].weight.clone())
        assert torch.equal(seen[-1], model[0].weight.detach().to(torch.bfloat16))
    assert not torch.equal(seen[0], seen[1])


def test_second_derivatives_go_through_the_rounded_weight(device):
    layer = spectral_norm(nn.Linear(9, 3).to(device))
    x = torch.randn(4, 9, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        (slope,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert raw(layer).grad.abs().sum() > 0


def test_a_write_into_the_rounded_weight_reaches_the_parameter(device):
    layer = spectral_norm(nn.Linear(6, 8).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        nn.init.constant_(layer.weight, 3.0)
        assert float(torch.linalg.matrix_norm(layer.weight.float(), 2)) == pytest.approx(1, abs=1e-2)
    assert torch.equal(raw(layer), torch.full_like(raw(layer), 3.0))


def test_layers_that_autocast_does_not_round_for_keep_their_type(device):
    class Scaled(nn.Linear):
        def forward(self, x):
            return x * self.weight[0]

    own, table = spectral_norm(Scaled(6, 8).to(device)), spectral_norm(nn.Embedding(6, 8).to(device))
    learned = spectral_norm(nn.Linear(6, 8).to(device), mode="learnable")
    frozen = spectral_norm(nn.Linear(6, 8).to(device)).requires_grad_(False)
    with torch.autocast(device.type, torch.bfloat16):
        assert own.weight.dtype == table.weight.dtype == learned.weight.dtype == torch.float32
        assert frozen.weight.dtype == torch.bfloat16
        assert not frozen.weight.requires_grad


@pytest.mark.parametrize("make", [nn.Linear, lambda _, size: nn.LazyLinear(size)], ids=["ordinary", "lazy"])
def test_normalizing_and_baking_under_it_round_nothing(make, device):
    inputs = torch.randn(4, 9, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        layer = spectral_norm(make(9, 10).to(device))
        layer(inputs)
        baked = export_state_dict(layer, "plain")["weight"]
    weight = layer.weight.detach().clone()
    assert torch.linalg.matrix_norm(weight, 2) == pytest.approx(1, rel=1e-4)
    assert torch.equal(baked, weight)
    with torch.autocast(device.type, torch.bfloat16):
        remove_spectral_norm(layer)
    assert torch.equal(layer.weight, weight)
