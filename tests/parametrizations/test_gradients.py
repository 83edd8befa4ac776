"""First and second derivatives through the division by sigma, against autograd on the written-out formula."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from spectralnorm import spectral_norm
from spectralnorm.linalg import MatrixView
from spectralnorm.parametrizations.quotient import NormalizedWeights, Quotient, divisor_of
from spectralnorm.parametrizations.weight_clock import watch

VIEWS = {
    "linear": (MatrixView(), (4, 3)),
    "conv": (MatrixView(), (4, 3, 2, 2)),
    "transposed conv": (MatrixView(out_dim=1), (4, 3, 2)),
}
MODES = {"normalize": (2.0, False), "cap above": (0.5, True), "cap below": (50.0, True)}


def vectors_of(view: MatrixView, weight: Tensor) -> tuple[Tensor, Tensor]:
    left, _, right = torch.linalg.svd(view.whole_matrix(weight.detach()), full_matrices=False)
    return left[:, 0], right[0].conj()


@pytest.mark.parametrize(("view", "shape"), VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(("coefficient", "cap"), MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_are_those_of_the_formula_with_constant_vectors(view, shape, coefficient, cap, dtype):
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    u, v = vectors_of(view, weight)

    def written_out(weight: Tensor) -> Tensor:
        sigma = torch.vdot(u, view.whole_matrix(weight) @ v).real
        return weight / divisor_of(sigma, coefficient, cap=cap, eps=1e-12)[0]

    def ours(weight: Tensor) -> Tensor:
        sigma = torch.vdot(u, view.whole_matrix(weight.detach()) @ v).real
        divisor, active = divisor_of(sigma, coefficient, cap=cap, eps=1e-12)
        quotient = Quotient(
            weight=weight,
            moment=watch(weight).now(),
            value=weight.detach() / divisor,
            sigma=sigma,
            divisor=divisor,
            active=active,
            pairs=((u, v),),
            views=(view,),
            flat_v=None,
            coefficient=coefficient,
            cap=cap,
            eps=1e-12,
        )
        return NormalizedWeights.apply([quotient], weight)[0]

    assert torch.autograd.gradcheck(ours, (weight,))
    assert torch.autograd.gradgradcheck(ours, (weight,))
    other = torch.randn(shape, dtype=dtype, requires_grad=True)
    results = []
    for function in (ours, written_out):
        loss = (function(weight) * other).abs().square().sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        results.append((first, *torch.autograd.grad(first.abs().square().sum(), (weight, other))))
    for part, expected in zip(*results, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 4), nn.Conv2d(4, 6, 2, groups=2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose1d(3, 4, 2)],
)
def test_gradient_of_a_layer_is_that_of_the_exact_norm(layer):
    layer = layer.double()
    other = torch.randn_like(layer.weight)
    weight = layer.weight.detach().clone().requires_grad_()
    spectral_norm(layer)
    blocks = weight.chunk(getattr(layer, "groups", 1))
    if getattr(layer, "transposed", False):
        blocks = [block.transpose(0, 1) for block in blocks]
    sigma = torch.stack([torch.linalg.matrix_norm(block.flatten(1), 2) for block in blocks]).amax()
    ((weight / sigma) * other).sum().backward()
    (layer.weight * other).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, weight.grad, rtol=1e-6, atol=1e-8)


def test_gradient_penalty_trains_the_weight_as_if_written_out(device):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double().to(device)
    for layer in (model[0], model[2]):
        spectral_norm(layer)
    model(torch.zeros(1, 6, dtype=torch.float64, device=device)).sum().backward()  # writes u and v to the buffers
    model.zero_grad()
    raw = {name: parameter for name, parameter in model.named_parameters() if name.endswith("original")}

    def penalty(call) -> Tensor:
        inputs = torch.linspace(-1, 1, 12, dtype=torch.float64, device=device).view(2, 6).requires_grad_()
        (gradient,) = torch.autograd.grad(call(inputs).sum(), inputs, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().sum()

    grads = torch.autograd.grad(penalty(model), raw.values())
    # In eval mode with copies in the parameters' place nothing is kept: plain operations with the buffers' u and v.
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in raw.items()}
    model.eval()
    expected = torch.autograd.grad(penalty(lambda inputs: functional_call(model, copies, inputs)), copies.values())
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-9)


def test_gradcheck_of_a_model_by_functional_call():
    layer = spectral_norm(nn.Linear(3, 4).double()).eval()
    names, values = zip(*layer.named_parameters(), strict=True)
    values = tuple(value.detach().clone().requires_grad_() for value in values)
    inputs = torch.randn(2, 3, dtype=torch.float64)

    def call(*parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), inputs)

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_two_forwards_and_one_backward(device):
    layer = spectral_norm(nn.Linear(4, 3).to(device))
    real, fake = torch.randn(2, 5, 4, device=device)
    (layer(real).relu().sum() - layer(fake).sum()).backward()
    together = layer.parametrizations.weight.original.grad.clone()
    layer.zero_grad()
    layer(torch.cat([real, fake])).split(5)[0].relu().sum().backward()
    (-layer(fake).sum()).backward()
    torch.testing.assert_close(together, layer.parametrizations.weight.original.grad)


def test_graph_of_before_an_optimizer_step_can_still_be_used(device):
    layer = spectral_norm(nn.Linear(4, 3).to(device))
    original = layer.parametrizations.weight.original
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    old = layer(torch.ones(1, 4, device=device)).relu().sum()
    (expected,) = torch.autograd.grad(old, original, retain_graph=True)
    layer(torch.ones(1, 4, device=device)).square().sum().backward()
    optimizer.step()
    layer(torch.ones(1, 4, device=device)).sum().backward()
    (again,) = torch.autograd.grad(old, original)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_identical_gradients(use_reentrant, device):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).to(device)
    for layer in (model[0], model[2]):
        spectral_norm(layer)
    inputs = torch.randn(5, 6, device=device, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(inputs).square().sum().backward()
    optimizer.step()  # the next use has a changed weight
    grads = []
    for forward in (lambda: checkpoint(model, inputs, use_reentrant=use_reentrant), lambda: model(inputs)):
        model.zero_grad()
        forward().square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for grad, expected in zip(*grads, strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("size", [5, 300], ids=["small", "large"])
def test_gradients_of_several_outputs_at_once_are_those_one_by_one(size, device):
    """As `torch.autograd.functional.jacobian` with ``vectorize=True`` asks for them."""
    layers = nn.ModuleList(spectral_norm(nn.Linear(size, 4, bias=False)) for _ in range(2)).to(device)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for _ in range(3):
        outputs = sum(layer(torch.ones(size, device=device)) for layer in layers)
        weights = [layer.parametrizations.weight.original for layer in layers]
        rows = torch.eye(4, device=device)
        batched = torch.autograd.grad(outputs, weights, rows, is_grads_batched=True, retain_graph=True)
        for row in range(4):
            alone = torch.autograd.grad(outputs, weights, rows[row], retain_graph=True)
            for several, one in zip(batched, alone, strict=True):
                torch.testing.assert_close(several[row], one)
        outputs.sum().backward()
        optimizer.step()


def test_zero_weight_passes_its_gradient_on_undivided():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    layer.weight.sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.ones(2, 3))
