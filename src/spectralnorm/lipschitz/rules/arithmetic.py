"""Sums, multiples and means; what a value and a constant give, and two values."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from spectralnorm.linalg.rounding import gamma
from spectralnorm.lipschitz.bounds import largest_frobenius, largest_norm, underflow
from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.maps import DenseMap, ScaleMap
from spectralnorm.lipschitz.registry import Call, Path, Step, rule
from spectralnorm.lipschitz.upward import add_up, mul_up, root_up

__all__ = ["copies", "scale_step"]

_MAX_IDENTITY = 4096  # entries of a value that is added to a matrix times itself


def copies(call: Call, node: Node) -> float:
    """How much longer a value becomes when it is repeated to the shape of the result."""
    if len(node.shape) != len(call.output_shape) or node.shape[0] != call.output_shape[0]:
        call.refuse(
            "the batch of an argument meets another dimension, which mixes samples", "give both the same dimensions"
        )
    return root_up(float(math.prod(call.output_shape) // math.prod(node.shape))) if math.prod(node.shape) else 0.0


@rule("add", "sub", "rsub")
def _add(call: Call) -> Step:
    given = call.bind("input, other, alpha=1")
    if not isinstance(given.alpha, int | float):
        call.refuse("its factor is no number", "give the factor as alpha=")
    alpha = float(call.constant(given.alpha))
    terms = [(given.input, 1.0), (given.other, alpha)]
    if call.node.op == "sub":
        terms[1] = (given.other, -alpha)
    elif call.node.op == "rsub":
        terms = [(given.input, -alpha), (given.other, 1.0)]
    return combination(call, terms)


def combination(call: Call, terms: list[tuple[Any, float]], *, relative: float = 0.0) -> Step:
    """A sum of values and constants with factors, which may be off by ``relative`` of themselves."""
    for term, factor in terms:
        if not math.isfinite(factor) or (isinstance(term, int | float) and not math.isfinite(term)):
            call.refuse("it adds a number that is not finite", "leave it out")
    nodes = [(term, factor) for term, factor in terms if isinstance(term, Node)]
    if len(nodes) == 1:
        node, factor = nodes[0]
        if copies(call, node) != 1:
            return Step(mul_up(abs(factor), 1 + 2 * relative, copies(call, node)), is_linear=True)
        return scale_step(call, torch.tensor(factor, dtype=torch.float64), relative=relative)
    bound = add_up(*(mul_up(abs(factor), copies(call, node), call.values[node].bound) for node, factor in nodes))
    return Step(None, bound=mul_up(bound, 1 + 2 * relative), path=_sum_path(call, nodes, relative))


def _sum_path(call: Call, nodes: list[tuple[Node, float]], relative: float) -> Path | None:
    """The sum of two matrices that read the same value, as one."""
    if any(copies(call, node) != 1 for node, _ in nodes):
        return None
    sources = [[node, *([call.values[node].path.source] if call.values[node].path else [])] for node, _ in nodes]  # type: ignore[union-attr]
    source = next((each for each in sources[0] if each in sources[1]), None)
    # Of a value and a matrix of it the one is the source of the other.
    if source is None:
        return None
    maps = [_dense(call, node, source, factor, relative) for node, factor in nodes]
    if maps[0] is None or maps[1] is None or maps[0].matrix.shape[-2:] != maps[1].matrix.shape[-2:]:
        return None
    return Path(source, maps[0].plus(maps[1]))


def _dense(call: Call, node: Node, source: Node, factor: float, relative: float) -> DenseMap | None:
    """``factor`` times the map from ``source`` to ``node`` as a matrix."""
    path = call.values[node].path
    if node is source or (path is not None and path.source is source and path.map is None):
        size = math.prod(source.shape[1:])
        if size > _MAX_IDENTITY or len(source.shape) < 2:
            return None
        diagonal = factor * torch.eye(size, dtype=torch.float64, device=call.graph.device)
        return DenseMap(diagonal, mul_up(2 * relative, largest_frobenius(diagonal)))
    if path is None or path.source is not source or not isinstance(path.map, DenseMap):
        return None
    scaled = factor * path.map.matrix
    rounding = add_up(mul_up(gamma(2) + 2 * relative, largest_frobenius(scaled)), underflow(scaled.numel()))
    return DenseMap(scaled, add_up(mul_up(abs(factor), path.map.error), rounding))


@rule("mul", "div", "rdiv")
def _multiply(call: Call) -> Step:
    given = call.bind("input, other, rounding_mode=None")
    if len(call.inputs) > 1:
        what = "divides" if call.node.op != "mul" else "multiplies"
        call.refuse(
            f"it {what} values that both depend on the input, which has no Lipschitz constant for inputs of any length",
            "multiply by a constant, or register a rule for the layer where the values are bounded",
        )
    if given.rounding_mode is not None:
        call.refuse("it rounds its result, which jumps", "leave rounding_mode out")
    if call.node.op == "mul":
        return scale_step(call, call.constant(given.other if isinstance(given.input, Node) else given.input))
    if call.node.op == "rdiv" or isinstance(given.other, Node):
        call.refuse("it divides by a value that depends on the input and may be near to zero", "divide by a constant")
    divisor = call.constant(given.other)
    if bool((divisor == 0).any()):
        call.refuse("it divides by zero")
    if bool((divisor.abs() > 1 / sys.float_info.min).any()):
        call.refuse("it divides by a number whose inverse is beyond the range of float64", "divide by a smaller one")
    return scale_step(call, 1 / divisor, relative=gamma(2))


@rule("neg")
def _negate(call: Call) -> Step:
    return scale_step(call, call.constant(-1.0))


def scale_step(call: Call, constant: Tensor, *, relative: float = 0.0) -> Step:
    """The one input times a constant, which may be off by ``relative`` of itself."""
    node = call.input
    if not bool(constant.isfinite().all()):
        call.refuse("it multiplies by a number that is not finite")
    copies(call, node)
    shape = call.output_shape
    if tuple(node.shape) != tuple(shape):
        # Every entry is repeated, and each copy has a factor of its own.
        repeated = [axis for axis, (old, new) in enumerate(zip(node.shape, shape, strict=True)) if old != new]
        largest = largest_norm(constant.expand(shape).double(), tuple(repeated))
        return Step(mul_up(largest, 1 + 2 * relative), is_linear=True)
    largest = mul_up(float(constant.abs().max()) if constant.numel() else 0.0, 1 + 2 * relative)
    return Step(largest, map=_channel_scale(constant, shape, relative), is_linear=True, is_hidden=largest == 1)


def _channel_scale(constant: Tensor, shape: tuple[int, ...], relative: float) -> ScaleMap | None:
    """As a factor for every channel, if it is one."""
    if len(shape) < 2:
        return None
    aligned = constant.reshape(*[1] * (len(shape) - constant.ndim), *constant.shape)
    if any(size != 1 for size in aligned.shape[2:]):
        return None
    scale = aligned.reshape(aligned.shape[:2])
    if aligned.shape[0] == 1:
        return ScaleMap(scale[0].expand(shape[1]), relative)
    return ScaleMap(scale.expand(shape[:2]), relative)


@rule("lerp")
def _lerp(call: Call) -> Step:
    given = call.bind("input, end, weight")
    weight = call.constant(given.weight)
    if weight.numel() != 1:
        call.refuse("its weight is not one number", "write the sum out")
    share = float(weight)
    complement = 1 - share  # negative where the share is above one
    is_exact = not math.isfinite(share) or Fraction(complement) == 1 - Fraction(share)
    return combination(call, [(given.input, complement), (given.end, share)], relative=0.0 if is_exact else gamma(1))


@rule("sum", "mean")
def _sum(call: Call) -> Step:
    given = call.bind("input, dim=None, keepdim=False")
    shape = call.input_shape
    dims = call.dims(given.dim, len(shape))
    count = math.prod(shape[dim] for dim in dims)
    if count == 0:
        call.refuse("it sums nothing")
    root = root_up(float(count))
    mean = call.node.op == "mean"
    factor = mul_up(1 / root_down(count), 1 + gamma(2)) if mean else root
    matrix = None
    if len(shape) == 2 and dims == (1,):
        entry = 1 / count if mean else 1.0
        row = torch.full((1, count), entry, dtype=torch.float64, device=call.graph.device)
        matrix = DenseMap(row, mul_up(gamma(2), largest_frobenius(row)) if mean else 0.0)
    return Step(factor, map=matrix, is_linear=True)


def root_down(number: float) -> float:
    """Its square root, rounded downward."""
    root = math.sqrt(number)
    return root if root * root == number and root.is_integer() else math.nextafter(root, 0.0)
