"""The lower bound is one: what rounding may have added is taken off, and the search finds what there is."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectralnorm as sn
from spectralnorm.lipschitz.evaluation import evaluate
from spectralnorm.lipschitz.lower import quotient_below
from spectralnorm.lipschitz.propagate import propagate
from spectralnorm.lipschitz.tracing import trace


class Rational(nn.Module):
    """All kinds of operations that take rational numbers to rational numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1, stride=2)
        self.dense = nn.Linear(9, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, inputs):
        maps = F.leaky_relu(self.conv(inputs), 0.2)
        maps = torch.cat([maps.mean(2, keepdim=True), F.avg_pool1d(maps, 2), 3 * maps[:, :, 1:2]], dim=2)
        features = self.dense(maps.flatten(1))
        features = features - 0.3 * features.relu() + features.abs().sum(1, keepdim=True)
        return self.last(features) / 7


def _exactly(model: Rational, sample: torch.Tensor) -> list[Fraction]:
    """The same in Python's fractions, loop by loop."""

    def number(value):
        return Fraction(float(value))

    x = [[number(entry) for entry in row] for row in sample]
    weight, bias = model.conv.weight.detach(), model.conv.bias.detach()
    maps = [[number(bias[o])] * 3 for o in range(3)]
    for o in range(3):
        for m in range(3):
            for i in range(2):
                for a in range(3):
                    if 0 <= 2 * m + a - 1 < 5:
                        maps[o][m] += number(weight[o, i, a]) * x[i][2 * m + a - 1]
    maps = [[value if value > 0 else value * number(0.2) for value in row] for row in maps]
    features = [entry for row in maps for entry in (sum(row) / 3, (row[0] + row[1]) / 2, 3 * row[1])]
    for layer in (model.dense, model.last):
        if layer is model.last:
            total = sum(abs(value) for value in features)
            features = [value - number(0.3) * max(value, Fraction(0)) + total for value in features]
        rows = zip(layer.weight.detach(), layer.bias.detach(), strict=True)
        features = [
            number(offset) + sum(number(w) * value for w, value in zip(row, features, strict=True))
            for row, offset in rows
        ]
    return [value / 7 for value in features]


def test_evaluation_is_within_its_error_of_exact_arithmetic():
    torch.manual_seed(0)
    model = Rational()
    with torch.no_grad():
        graph = trace(model, (2, 5), mode="eval", num_classes=None, is_whole=lambda module: False)
        _, found = propagate(graph, mode="eval", sizes="given")
        steps = {bounded.node: bounded.step for bounded in found}
        inputs = torch.randn(graph.batch_size, 2, 5, dtype=torch.float64)
        outputs, error = evaluate(graph, steps, inputs)

    off = [
        sum((Fraction(got) - exact) ** 2 for got, exact in zip(row.tolist(), _exactly(model, sample), strict=True))
        for row, sample in zip(outputs, inputs, strict=True)
    ]
    assert 0 < max(off) <= Fraction(error) ** 2
    assert error < 1e-11


def test_pair_that_is_too_near_to_be_told_apart_shows_nothing():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    shifted = nn.Sequential(nn.Linear(1, 1).double(), nn.Identity(), model)
    shifted[0].weight.data.fill_(1.0)
    shifted[0].bias.data.fill_(1e8)
    with torch.no_grad():
        graph = trace(shifted, (1,), mode="eval", num_classes=None, is_whole=lambda module: False)
        _, found = propagate(graph, mode="eval", sizes="given")
        steps = {bounded.node: bounded.step for bounded in found}
        near = torch.full((graph.batch_size, 1), 1e-8, dtype=torch.float64)

        # Rounding to multiples of 1.5e-8 turns 1e-8 into 1.5e-8.
        assert (shifted(near) - shifted(0 * near)).abs().max() > 1.4e-8
        assert quotient_below(graph, steps, 0 * near, near) == 0
        assert 0.9 < quotient_below(graph, steps, 0 * near, 1e3 * torch.ones_like(near)) <= 1


def test_search_finds_the_norm_of_a_linear_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))

    found = sn.certify(model, (20,), ascent_steps=60)

    assert found.lower_bound == pytest.approx(found.upper_bound, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_steeper_places_than_as_many_points_at_random(seed: int):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)]
    model = nn.Sequential(*layers).double()
    points = torch.logspace(-1.5, 0.5, 97).double()[:, None] * torch.randn(97, 4).double()
    points.requires_grad_()
    (slopes,) = torch.autograd.grad(model(points).sum(), points)

    found = sn.certify(model, (4,))

    assert slopes.norm(dim=1).max() * (1 - 1e-9) <= found.lower_bound <= found.upper_bound


def test_layers_that_never_stretch_have_a_rule_and_a_lower_bound():
    from spectralnorm import layers

    for layer, shape in ((layers.SLLLinear(5), (5,)), (layers.CPLConv2d(2), (2, 5, 5))):
        found = sn.certify(nn.Sequential(layer), shape)
        assert found.upper_bound == 1
        assert 0.5 < found.lower_bound <= 1
    with pytest.raises(sn.UserError, match=r"SLLLinear at '0'.*slopes in \[0, 1\]"):
        sn.certify(nn.Sequential(layers.SLLLinear(5, activation=nn.SELU())), (5,))
