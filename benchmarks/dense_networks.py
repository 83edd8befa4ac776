"""Bounds of whole dense networks: `mlp_bound` beside the product of norms, ECLipsE and LipSDP.

    python benchmarks/dense_networks.py             # a few minutes, and the result page
    python benchmarks/dense_networks.py --print     # no page

Of the same kind of bound, LipSDP with one multiplier for each neuron (Fazlyab et al. 2019) is the least: it is found by
an interior-point method for semidefinite programs, whose answer is near to the optimum and proved by nothing. ECLipsE
(Xu and Sivaranjani 2024) goes through the network layer by layer. Both need the extra `peers`.
"""

import argparse
import math
import time
from importlib import import_module
from itertools import pairwise

import torch
from torch import nn

from spectralnorm import certify
from spectralnorm.lipschitz import mlp_bound

NETWORKS = ((2, 16, 16, 1), (8, 32, 1), (8, 32, 32, 1), (4, 24, 24, 24, 3), (4, 12, 12, 12, 12, 12, 3))


def network(widths, seed=0):
    """Linear layers as torch begins them, and ReLU between them."""
    torch.manual_seed(seed)
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def weights_of(model):
    return [layer.weight.detach().double() for layer in model if isinstance(layer, nn.Linear)]


def lipsdp(model):
    """The optimum of LipSDP-Neuron for slopes in [0, 1], as an interior-point method finds it."""
    cvxpy = import_module("cvxpy")
    *hidden, last = weights_of(model)
    total = hidden[0].shape[1] + sum(len(weight) for weight in hidden)
    before, after = torch.zeros(2, total - hidden[0].shape[1], total, dtype=torch.float64)
    row, column = 0, 0
    for weight in hidden:
        rows = slice(row, row + len(weight))
        before[rows, column : column + weight.shape[1]] = weight
        column += weight.shape[1]
        after[rows, column : column + len(weight)] = torch.eye(len(weight), dtype=torch.float64)
        row += len(weight)
    ends = torch.zeros(2, total, total, dtype=torch.float64)
    ends[0, : hidden[0].shape[1], : hidden[0].shape[1]] = torch.eye(hidden[0].shape[1], dtype=torch.float64)
    ends[1, column:, column:] = last.mT @ last
    before, after, start, end = (each.numpy() for each in (before, after, *ends))
    square, multipliers = cvxpy.Variable(), cvxpy.diag(cvxpy.Variable(len(before), nonneg=True))
    slopes = before.T @ multipliers @ after
    matrix = slopes + slopes.T - 2 * after.T @ multipliers @ after + end - square * start
    problem = cvxpy.Problem(cvxpy.Minimize(square), [(matrix + matrix.T) / 2 << 0])
    problem.solve(solver=cvxpy.CLARABEL)
    return math.sqrt(square.value) if problem.status == cvxpy.OPTIMAL else math.nan


def eclipse(model):
    """ECLipsE; NaN where its own check of a stage fails."""
    weights = weights_of(model)
    steps = len(weights) - 1
    found, code = import_module("eclipse_nn.eclipsE").ECLipsE(weights, [0.0] * steps, [1.0] * steps)
    return float(found) if code == 0 else math.nan


def eclipse_fast(model):
    """ECLipsE-Fast, in closed form."""
    weights = weights_of(model)
    steps = len(weights) - 1
    return float(import_module("eclipse_nn.eclipsE_fast").ECLipsE_Fast(weights, [0.0] * steps, [1.0] * steps))


def product(model):
    return certify(model, (model[0].in_features,), ascent_steps=0).upper_bound


def ours(model):
    return mlp_bound(model, (model[0].in_features,))


BOUNDS = {
    "product of norms": product,
    "ECLipsE-Fast": eclipse_fast,
    "ECLipsE": eclipse,
    "mlp_bound": ours,
    "LipSDP": lipsdp,
}


def table():
    lines = [f"| widths | {' | '.join(BOUNDS)} |", "|---|" + "---|" * len(BOUNDS)]
    for bound in BOUNDS.values():
        bound(network((2, 2, 1)))  # what is done once is not timed
    for widths in NETWORKS:
        model = network(widths)
        cells = []
        for bound in BOUNDS.values():
            begin = time.process_time()
            value = bound(model)
            cells.append(f"{value:.4f}, {time.process_time() - begin:.2g} s" if value == value else "failed")
        lines.append(f"| {'-'.join(map(str, widths))} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main():
    from hardware import RESULTS, hardware, write_result  # beside this script, which the tests load from elsewhere

    parser = argparse.ArgumentParser(description="Bounds of whole dense networks")
    parser.add_argument("--print", action="store_true", help="no page")
    arguments = parser.parse_args()
    lines = table()
    if arguments.print:
        return
    page = [
        "# Bounds of whole dense networks",
        "",
        hardware(),
        "",
        "`python benchmarks/dense_networks.py`: linear layers as torch begins them, with ReLU between them; the bound, "
        "and the seconds of CPU time. LipSDP is the optimum for one multiplier for each neuron, as Clarabel finds it "
        "through cvxpy; nothing proves it. ECLipsE and ECLipsE-Fast are those of the package eclipse-nn; ECLipsE "
        "failed where its own check of a stage did.",
        "",
        *lines,
        "",
    ]
    path = write_result("dense_networks", "\n".join(page))
    print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
