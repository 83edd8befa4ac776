"""The lower bound is one: what rounding may have added is taken off, and the search finds what there is."""

import importlib
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectralnorm as sn
from spectralnorm.layers import SLLLinear
from spectralnorm.lipschitz import lower
from spectralnorm.lipschitz.evaluation import evaluate
from spectralnorm.lipschitz.graph import last_reads
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


def test_places_with_the_same_sample_are_evaluated_like_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2, stride=2)).double()
    with torch.no_grad():
        graph = trace(model, (2, 5, 5), mode="eval", num_classes=None, is_whole=lambda module: False)
        _, found = propagate(graph, mode="eval", sizes="given")
        steps = {bounded.node: bounded.step for bounded in found}
        sample = torch.randn(2, 5, 5, dtype=torch.float64)
        alike = sample.expand(graph.batch_size, *sample.shape)
        others = torch.cat([alike[:1], torch.zeros_like(alike[1:])])
        one, other = evaluate(graph, steps, alike), evaluate(graph, steps, others)

    expected = model(alike).flatten(1)
    assert float((one.outputs - expected).detach().norm(dim=1).max()) <= one.error < 1e-12
    torch.testing.assert_close(one.outputs[0], other.outputs[0], rtol=0, atol=one.error + other.error)
    assert one.error == pytest.approx(other.error, rel=1e-6)


def test_large_networks_are_searched_by_few_pairs_and_found_as_steep(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 6 * 6, 2))
    usual = sn.certify(model, (4, 14, 14))
    module = importlib.import_module("spectralnorm.lipschitz.certify")  # the package has the function by that name
    monkeypatch.setattr(module, "_LARGE", 100)
    monkeypatch.setattr(module, "_SMALL", 0)
    batches = []
    perform = lower.perform
    monkeypatch.setattr(
        lower, "perform", lambda node, known, *rest: batches.append(node.shape[0]) or perform(node, known, *rest)
    )
    few = sn.certify(model, (4, 14, 14))

    assert set(batches) == {2}
    assert few.upper_bound == usual.upper_bound
    assert 0.9 * usual.lower_bound <= few.lower_bound <= few.upper_bound


@pytest.mark.parametrize("rounds", [1, 3])
def test_search_begins_with_as_many_pairs_as_rounds_have_and_keeps_the_best(rounds):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    graph = trace(model, (3,), mode="eval", num_classes=None, is_whole=lambda module: False)
    first, second = lower._search(graph, 20, rounds=rounds)
    drawn = lower._drawn(graph, torch.float64, rounds * graph.batch_size)
    change = (model(drawn.second) - model(drawn.first)).norm(dim=1) / drawn.offset.norm(dim=1)

    assert len(change) == rounds * graph.batch_size
    found = (model(second) - model(first)).norm() / (second - first).norm()
    assert float(change.max()) <= float(found)


def test_values_are_kept_until_they_were_read_for_the_last_time():
    class Twice(nn.Module):
        def forward(self, inputs):
            first = inputs.relu()
            second = first + 1
            return second * 2 + first, second

    graph = trace(Twice(), (3,), mode="eval", num_classes=None, is_whole=lambda module: False)
    last = last_reads(graph)

    position = {node: place for place, node in enumerate(graph.nodes)}
    released = {read: position[node] for node, reads in last.items() for read in reads}
    readers = {node: [position[each] for each in graph.nodes if node in each.inputs] for node in graph.nodes}
    kept = {node for node in graph.nodes if node not in released}
    assert kept == {*graph.outputs}
    assert all(place == max(readers[node]) for node, place in released.items())


class Halved(nn.Module):
    def forward(self, inputs):
        return inputs / 2


sn.register_rule(Halved, lambda call: 0.5)


@pytest.mark.parametrize("layer", [Halved(), SLLLinear(4)], ids=["rule of one's own", "rule of this package"])
def test_hooks_of_a_layer_with_a_rule_run_once(layer: nn.Module):
    expected = 3 * (0.5 if isinstance(layer, Halved) else 1.0)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(1),))

    certificate = sn.certify(layer, (4,))

    assert certificate.upper_bound == pytest.approx(expected, rel=1e-12)
    assert certificate.lower_bound == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("slopes", [(0.1, 5.0), (-4.0, 0.5)], ids=str)
def test_rrelu_in_training_is_searched_with_its_largest_slope(slopes: tuple[float, float]):
    model = nn.Sequential(nn.RReLU(*slopes), nn.Linear(4, 4))

    certificate = sn.certify(model, (4,), mode="train")

    assert 0.5 * certificate.upper_bound < certificate.lower_bound <= certificate.upper_bound


def test_rule_of_the_user_that_is_contradicted_is_named():
    class TooSmall(nn.Module):
        def forward(self, inputs):
            return 2 * inputs

    sn.register_rule(TooSmall, lambda call: 1.0)

    with pytest.raises(sn.UserError, match="registered for TooSmall at '1' gives too small a constant"):
        sn.certify(nn.Sequential(nn.Linear(4, 4), TooSmall()), (4,))


def test_layers_that_never_stretch_have_a_rule_and_a_lower_bound():
    from spectralnorm import layers

    for layer, shape in ((layers.SLLLinear(5), (5,)), (layers.CPLConv2d(2), (2, 5, 5))):
        found = sn.certify(nn.Sequential(layer), shape)
        assert found.upper_bound == 1
        assert 0.5 < found.lower_bound <= 1
    with pytest.raises(sn.UserError, match=r"SLLLinear at '0'.*slopes in \[0, 1\]"):
        sn.certify(nn.Sequential(layers.SLLLinear(5, activation=nn.SELU())), (5,))
