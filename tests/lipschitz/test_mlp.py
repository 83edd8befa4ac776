"""Dense networks as a whole: between what inputs show and the product of the norms, with every multiplier."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import spectralnorm as sn
from spectralnorm.lipschitz import mlp, mlp_bound

ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SELU()]


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [3, *(int(n) for n in torch.randint(2, 12, (1 + seed % 3,))), 1 + seed % 2]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), ACTIVATIONS[seed % len(ACTIVATIONS)]]
    return nn.Sequential(*(layers if seed % 5 == 0 else layers[:-1]))


@pytest.mark.parametrize("seed", range(12))
def test_bound_is_above_every_slope_and_not_above_the_product(seed: int):
    model = _network(seed)
    found = mlp_bound(model, (3,), steps=40)

    certificate = sn.certify(model, (3,), ascent_steps=20)
    model.double()
    points = torch.randn(300, 3, dtype=torch.float64) * torch.logspace(-1, 1, 300, dtype=torch.float64)[:, None]
    jacobians = torch.func.vmap(torch.func.jacrev(model))(points)
    steepest = torch.linalg.matrix_norm(jacobians, 2).max().item()

    assert max(steepest * (1 - 1e-12), certificate.lower_bound) <= found <= certificate.upper_bound


@pytest.mark.parametrize("exponents", [(-400, -400), (-900, -60), (500, 500), (900, -900)])
def test_bound_of_weights_far_from_one_is_that_of_weights_near_one(exponents: tuple[int, int]):
    model = _network(1).double()
    expected = mlp_bound(model, (3,), steps=40)

    with torch.no_grad():
        for layer, exponent in zip((model[0], model[2]), exponents, strict=True):
            layer.weight *= 2.0**exponent

    assert mlp_bound(model, (3,), steps=40) == math.ldexp(expected, sum(exponents))


def test_bound_of_the_least_weights_is_not_zero():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 2.0**-537)

    assert mlp_bound(model, (1,)) >= 2.0**-1074


def test_one_neuron_of_each_sign_attains_the_bound():
    # |x| = relu(x) + relu(-x): the product of the norms is 2, the truth is 1.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    model[2].weight.data = torch.ones(1, 2)

    assert sn.certify(model, (1,)).upper_bound == pytest.approx(2, rel=1e-6)
    assert 1 <= mlp_bound(model, (1,), steps=0) <= 2.0001
    wide = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    assert mlp_bound(wide, (8,)) < 0.75 * sn.certify(wide, (8,), ascent_steps=0).upper_bound


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.2, 1.0), (-1.0, 1.0), (0.0, 0.25)])
def test_each_step_is_above_the_inequality_for_every_diagonal_of_slopes(slopes: tuple[float, float]):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix = root @ root.mT
    diagonal = 2 * torch.linalg.eigvalsh(matrix)[-1] * (1 + torch.rand(6, dtype=torch.float64))

    above = mlp._through_above(matrix, diagonal, slopes)

    assert above is not None
    low, high = slopes
    for _ in range(200):
        slope = low + (high - low) * torch.rand(6, dtype=torch.float64).round()
        gap = above - slope[:, None] * matrix * slope
        assert torch.linalg.eigvalsh(gap)[0] > -1e-9


def _script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "dense_networks.py"
    specification = importlib.util.spec_from_file_location("dense_networks", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("widths", [(3, 12, 1), (2, 8, 8, 2), (3, 6, 6, 6, 1)], ids=str)
def test_bound_comes_to_the_optimum_of_a_solver_and_is_below_eclipse(widths: tuple[int, ...]):
    pytest.importorskip("cvxpy")
    pytest.importorskip("eclipse_nn")
    script = _script()
    model = script.network(widths)

    found = mlp_bound(model, widths[:1], steps=2000)

    # The solver's optimum is the least bound of this kind, to its own accuracy.
    optimum = script.lipsdp(model)
    assert optimum * (1 - 1e-5) <= found <= 1.002 * optimum
    assert found <= script.ours(model) < script.eclipse_fast(model)


def test_what_is_no_chain_is_refused_by_name():
    for model, message in (
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=1)), "softmax at '1'"),
        (nn.Sequential(nn.Tanh(), nn.Linear(3, 1)), "first layer is linear"),
    ):
        with pytest.raises(sn.UserError, match=message):
            mlp_bound(model, (3,))
    with pytest.raises(sn.UserError, match="steps must be"):
        mlp_bound(nn.Linear(3, 1), (3,), steps=-1)


@pytest.mark.parametrize("activation", [nn.Softplus(threshold=0), nn.CELU(-1.0)], ids=["softplus", "celu"])
def test_activation_without_a_constant_is_refused(activation: nn.Module):
    with pytest.raises(sn.UserError, match=r"jumps|no bound"):
        mlp_bound(nn.Sequential(nn.Linear(3, 3), activation, nn.Linear(3, 1)), (3,))
