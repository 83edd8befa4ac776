"""Dense networks bounded as a whole: layer norms do not multiply where activations never fit all of them at once.

Activations with slopes in [a, b] act on a difference v of their inputs as w = D v, D diagonal, so that for any diagonal
L >= 0 (Fazlyab et al. 2019, LipSDP, with one number for each neuron)

    0 <= (a + b) w'L v - w'L w - a b v'L v.

If w'P w bounds the square of what the layers behind make of w, and L - P is positive definite, then, maximizing over w,

    w'P w <= v'M v    with    M = (a + b)^2 / 4 L (L - P)^-1 L - a b L,

and in front of the matrix W of that layer stands W'M W. So from P = identity at the output one comes to a matrix at the
input whose largest eigenvalue bounds the squared Lipschitz constant, for every choice of the L: each layer's M is a
Schur complement of LipSDP's matrix inequality, and no solver for such is needed. How the L are found proves nothing: by
gradient descent from L = 2 ||P||, which gives the product of the norms. What proves is the last pass, in float64, with
all rounding added to the diagonal, so that each matrix is above the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.linalg.rigorous import rigorous_matrix_bound
from spectralnorm.linalg.rounding import gamma, product_gamma
from spectralnorm.lipschitz.arguments import check_count, check_input_shape, check_model
from spectralnorm.lipschitz.bounds import frobenius
from spectralnorm.lipschitz.graph import Graph, Node
from spectralnorm.lipschitz.maps import DenseMap
from spectralnorm.lipschitz.propagate import propagate
from spectralnorm.lipschitz.registry import Step
from spectralnorm.lipschitz.tracing import trace
from spectralnorm.lipschitz.upward import ldexp_up, mul_up, root_up

__all__ = ["mlp_bound"]

_RATE = 0.05
_LEAST = 2.0**-800  # of P, so that nothing that counts underflows
_MARGIN = 1e-7  # of L - P, so that rounding cannot make it indefinite
# Ops whose slopes lie between zero and their constant, which is 1.
_RISING = frozenset(
    "relu relu6 hardtanh tanh celu log_sigmoid softsign softplus softshrink tanhshrink atan arctan asinh "
    "arcsinh".split()
)
_MOVING = frozenset("view reshape flatten squeeze unsqueeze contiguous clone detach view_as reshape_as".split())


@dataclass(frozen=True, slots=True)
class _Layer:
    """A matrix (out, in), or an activation with slopes in an interval."""

    matrix: Tensor | None
    slopes: tuple[float, float] = (1.0, 1.0)


def mlp_bound(model: nn.Module, input_shape: Sequence[int], *, steps: int = 150) -> float:
    """Bound the Lipschitz constant of a dense network by all of its layers together; never above what `certify` gives.

    For chains of linear layers and activations of one entry, in eval mode. Memory and time grow as those of a Cholesky
    factorization of each layer's width.

    Args:
        model: it stays as it is.
        input_shape: of one sample, without the batch.
        steps: of the search for the multipliers; 0 gives the product of the norms.

    Returns:
        The bound in the 2-norm, rigorous as that of `certify`.

    Raises:
        UserError: the model has no certificate or is no such chain, or an argument is wrong; the message says what.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> from spectralnorm import certify
    >>> mlp_bound(model, (8,)) < 0.8 * certify(model, (8,)).upper_bound
    True
    """
    check_model(model, function="mlp_bound")
    check_input_shape(input_shape)
    check_count("steps", steps, least=0)
    with torch.no_grad():
        graph = trace(model, input_shape, mode="eval", num_classes=None, is_whole=lambda module: False)
        product, found = propagate(graph, mode="eval", sizes="given")
        layers, exponent = _near_one(_chain(graph, {bounded.node: bounded.step for bounded in found}))
    multipliers = _found(layers, steps)
    if multipliers is None:
        return product
    with torch.no_grad():
        return min(product, ldexp_up(_proved(layers, multipliers), exponent))


def _chain(graph: Graph, steps: dict[Node, Step]) -> list[_Layer]:
    """The layers from the input to the output."""
    layers: list[_Layer] = []
    before = graph.nodes[0]
    for node in graph.nodes[1:]:
        step = steps.get(node)
        if step is None or node.inputs != [before]:
            raise UserError(f"mlp_bound takes a chain of layers, and {node.op} at {node.name!r} is beside it.")
        before = node
        slopes = _slopes(node, step)
        if isinstance(step.map, DenseMap) and step.map.matrix.ndim == 2 and step.map.error == 0:
            layers.append(_Layer(step.map.matrix))
        elif slopes is not None:
            layers.append(_Layer(None, slopes))
        elif node.op not in _MOVING or node.shape[0] != node.inputs[0].shape[0]:
            raise UserError(
                f"mlp_bound takes linear layers and activations of one entry, and {node.op} at {node.name!r} is "
                "neither; use certify."
            )
    if graph.outputs != (before,) or not layers or layers[0].matrix is None:
        raise UserError("mlp_bound takes a network with one output, whose first layer is linear; use certify.")
    return layers


def _near_one(layers: list[_Layer]) -> tuple[list[_Layer], int]:
    """The chain with each matrix divided by a power of two, and the exponent of their product.

    So squares stay in range, and the constant is divided by that product: it is the largest norm of W D ... D W. What
    underflows, 2^-1074 an entry, is far less than what rounding is counted with.
    """
    scaled, total = [], 0
    for layer in layers:
        size = 0.0 if layer.matrix is None else float(layer.matrix.abs().max())
        if layer.matrix is not None and size > 0:
            exponent = math.frexp(size)[1] - 1
            # In two steps, because the inverse of the least numbers is beyond the range.
            half = exponent // 2
            layer = replace(layer, matrix=layer.matrix * 2.0**-half * 2.0 ** (half - exponent))
            total += exponent
        scaled.append(layer)
    return scaled, total


def _slopes(node: Node, step: Step) -> tuple[float, float] | None:
    if node.inputs[0].shape != node.shape or step.factor is None or node.module is not None:
        return None
    if node.op in _RISING:
        return 0.0, step.factor
    if node.op == "sigmoid":
        return 0.0, 0.25
    if node.op == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        # As a float32 number it may be a little less.
        return min(1.0, slope) - 1e-6 * abs(slope), max(1.0, slope)
    if node.op in ("gelu", "silu", "mish", "selu", "elu", "hardswish", "abs", "absolute", "sin", "cos", "erf"):
        # Between minus and plus the largest slope: nothing is lost but tightness.
        return -step.factor, step.factor
    return None


def _found(layers: list[_Layer], steps: int) -> list[Tensor] | None:
    """Diagonals of the multipliers, last activation first; None where none were found."""
    with torch.no_grad():
        start = _initial(layers)
    if start is None or not start:
        return start
    logs = [each.log().requires_grad_() for each in start]
    optimizer = torch.optim.Adam(logs, lr=_RATE)
    best, kept = math.inf, start
    for _ in range(steps):
        value = _objective(layers, [each.exp() for each in logs])
        if value is None:
            # Out of the cone: back to the best, with smaller steps.
            with torch.no_grad():
                for each, good in zip(logs, kept, strict=True):
                    each.copy_(good.log())
            optimizer = torch.optim.Adam(logs, lr=optimizer.param_groups[0]["lr"] / 2)
            continue
        if value.item() < best:
            best, kept = value.item(), [each.detach().exp() for each in logs]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return kept


def _initial(layers: list[_Layer]) -> list[Tensor] | None:
    """Twice the norm of P for each."""
    found: list[Tensor] = []
    current: Tensor | None = None
    for layer in reversed(layers):
        if layer.matrix is not None:
            current = layer.matrix.mT @ (layer.matrix if current is None else current @ layer.matrix)
            continue
        if current is None:
            continue  # an activation at the very end: its constant is multiplied in the end
        norm = torch.linalg.eigvalsh(current)[-1]
        if not bool(norm > 0):
            return None
        found.append((2 * norm).expand(len(current)).clone())
        after = _through(current, found[-1], layer.slopes)
        if after is None:
            return None
        current = after
    return found


def _through(matrix: Tensor, diagonal: Tensor, slopes: tuple[float, float]) -> Tensor | None:
    """M of the module's page, as computed; None where L - P is not positive definite."""
    low, high = slopes
    rest = torch.diag(diagonal * (1 - _MARGIN)) - matrix
    factor, info = torch.linalg.cholesky_ex(rest)
    if bool(info != 0):
        return None
    half = torch.linalg.solve_triangular(factor, torch.diag(diagonal), upper=False)
    return (low + high) ** 2 / 4 * half.mT @ half - low * high * torch.diag(diagonal)


def _objective(layers: list[_Layer], diagonals: list[Tensor]) -> Tensor | None:
    """The logarithm of the largest eigenvalue at the input."""
    left, current = list(diagonals), None
    for layer in reversed(layers[1:]):
        if layer.matrix is not None:
            current = layer.matrix.mT @ (layer.matrix if current is None else current @ layer.matrix)
        elif current is not None:
            current = _through(current, left.pop(0), layer.slopes)
            if current is None:
                return None
    first = layers[0].matrix
    assert first is not None
    if current is None:
        return None
    small = first if first.shape[0] >= first.shape[1] else torch.linalg.qr(first.mT).R.mT
    largest = torch.linalg.eigvalsh(small.mT @ current @ small)[-1]
    return largest.log() if bool(largest > 0) else None


def _proved(layers: list[_Layer], diagonals: list[Tensor]) -> float:
    """The bound with these multipliers, rounding accounted for."""
    left = list(diagonals)
    current: Tensor | None = None  # is not below the exact matrix, in the order of symmetric matrices
    factor = 1.0
    for layer in reversed(layers):
        if layer.matrix is not None:
            if current is None:
                current = torch.eye(len(layer.matrix), dtype=torch.float64, device=layer.matrix.device)
            if not _LEAST < frobenius(current) < 1 / _LEAST:
                return math.inf
            current = _congruent(layer.matrix, current)
        elif current is None:
            factor = mul_up(factor, max(map(abs, layer.slopes)))
        else:
            above = _through_above(current, left.pop(0), layer.slopes)
            if above is None:
                return math.inf
            current = above
    assert current is not None
    return mul_up(factor, root_up(rigorous_matrix_bound(current)))


def _raised(matrix: Tensor, amount: float) -> Tensor:
    """The symmetric part, with so much and its own rounding added to the diagonal."""
    symmetric = (matrix + matrix.mT) / 2
    more = (amount + gamma(4) * frobenius(symmetric)) * (1 + 1e-12)
    # The sum on the diagonal is rounded too.
    more = (more + gamma(4) * (float(symmetric.diagonal().abs().max()) + more)) * (1 + 1e-12)
    return symmetric + more * torch.eye(len(symmetric), dtype=matrix.dtype, device=matrix.device)


def _congruent(matrix: Tensor, current: Tensor) -> Tensor:
    """Not below W'P W."""
    size = frobenius(matrix) ** 2 * frobenius(current)
    # Two products, each off by gamma times the product of Frobenius norms of its factors.
    rounding = 2.1 * product_gamma(max(matrix.shape), torch.float64) * size * (1 + 1e-9)
    return _raised(matrix.mT @ (current @ matrix), rounding)


def _through_above(current: Tensor, diagonal: Tensor, slopes: tuple[float, float]) -> Tensor | None:
    """Not below M, for the P that ``current`` is not below."""
    low, high = slopes
    order = len(current)
    unit = product_gamma(order, torch.float64)
    rest = torch.diag(diagonal) - current
    # L - P is rounded on its diagonal. What is taken off it pays for that and for what the factor leaves.
    taken = _MARGIN * float(diagonal.min())
    shifted = rest - taken * torch.eye(order, dtype=rest.dtype, device=rest.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    factor = factor.tril()
    if bool(info != 0):
        return None
    remains = frobenius(shifted - factor @ factor.mT) * (1 + gamma(4)) + unit * frobenius(factor) ** 2
    roundings = gamma(4) * (float(diagonal.max()) + frobenius(current) + taken) * math.sqrt(order)
    if not (remains + roundings) * (1 + 1e-9) < taken:
        return None
    # So L - P is not below C C', and (L - P)^-1 not above its inverse. With Y = C^-1 L as computed, and what it misses:
    target = torch.diag(diagonal)
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    missed = frobenius(target - factor @ half) * (1 + gamma(4)) + unit * frobenius(factor) * frobenius(half)
    identity = torch.eye(order, dtype=rest.dtype, device=rest.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    off = frobenius(identity - factor @ inverse) * (1 + gamma(4)) + unit * frobenius(factor) * frobenius(inverse)
    if not off < 0.5:
        return None
    missed = missed * frobenius(inverse) / (1 - off)
    size = frobenius(half)
    share = (low + high) ** 2 / 4
    error = share * (unit * size**2 + 2 * size * missed + missed**2)
    error += gamma(16) * (share * size**2 + abs(low * high) * float(diagonal.max())) * math.sqrt(order)
    return _raised(share * (half.mT @ half) - low * high * target, error * (1 + 1e-9))
