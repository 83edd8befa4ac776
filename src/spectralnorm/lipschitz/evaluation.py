"""A recorded network, evaluated in float64 with a bound of what rounding did to the result.

For every operation f with Lipschitz constant L, of which fl(f) is computed: if the computed input is within e of the
exact one in the 2-norm, the computed result is within L e + r of the exact result, where r bounds ||fl(f)(x) - f(x)||
for the x that was computed with. L is the certificate's own bound of the operation; r follows from what it does:

- what moves, selects or compares entries is exact;
- sums of products are off by gamma_n times the sum of their moduli (Higham 2002, section 3.5), which is the same
  operation on absolute values;
- for the rest, float64 functions of one entry are taken to be right to 16 units in the last place of their result and
  argument, which is far more than their libraries state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralnorm.linalg.rounding import gamma, norm_above
from spectralnorm.lipschitz.graph import Graph, Node, last_reads, map_structure
from spectralnorm.lipschitz.registry import Call, Step, Value, rule_of
from spectralnorm.lipschitz.upward import add_up, mul_up, root_of_sum_up

__all__ = ["Evaluated", "evaluate", "perform", "rounding_of"]

_EXACT = frozenset(
    "item view reshape flatten unflatten squeeze unsqueeze contiguous clone detach to float double half bfloat16 type "
    "type_as cpu cuda view_as reshape_as alias positive data permute transpose swapaxes swapdims "
    "movedim moveaxis t T mT pixel_shuffle pixel_unshuffle channel_shuffle flip roll getitem narrow select chunk split "
    "split_with_sizes tensor_split unbind index_select expand expand_as broadcast_to repeat tile repeat_interleave cat "
    "concat concatenate stack hstack vstack pad relu relu6 hardtanh identity abs absolute neg clamp clip clamp_min "
    "clamp_max threshold amax amin max min maximum minimum fmax fmin sort max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
    "adaptive_max_pool3d_with_indices".split()
)
_SUMS = frozenset(
    "linear addmm matmul mm bmm mv rmatmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample "
    "sum mean mul div einsum".split()
)
_ALONG = frozenset("softmax softmin softmax2d log_softmax logsumexp norm linalg_vector_norm".split())
# More than what underflow takes from a sum of products, whatever the size.
_UNDERFLOW = 2.0**-900


class Evaluated(NamedTuple):
    """What came out.

    Attributes:
        outputs: (batch, entries) of all outputs.
        error: the 2-norm of what a sample's outputs are off by at most.
    """

    outputs: Tensor
    error: float


def evaluate(graph: Graph, steps: Mapping[Node, Step], inputs: Tensor) -> Evaluated:
    """Run the graph in float64 and bound what rounding does.

    Args:
        graph: recorded of the model.
        steps: what the rules gave for its nodes.
        inputs: (batch, *input_shape), float64, exact, with the batch size that was recorded.
    """
    known: dict[Node, Any] = {graph.nodes[0]: inputs}
    errors = {graph.nodes[0]: 0.0}
    last = last_reads(graph)
    for node in graph.nodes[1:]:
        known[node] = result = _performed(node, known)
        if node.op == "item":
            errors[node] = errors[node.inputs[0]]
        else:
            errors[node] = add_up(_carried(node, steps[node], errors, graph), rounding_of(node, known, result, graph))
        del result
        for read in last[node]:
            del known[read]
    joined = torch.cat([known[node].reshape(graph.batch_size, -1) for node in graph.outputs], dim=1)
    return Evaluated(joined, root_of_sum_up(errors[node] for node in graph.outputs))


def _carried(node: Node, step: Step, errors: Mapping[Node, float], graph: Graph) -> float:
    """What the errors of the inputs become."""
    if step.map is not None and step.path is not None and step.factor is not None:
        # A padding before it is part of its factor, and exact.
        return mul_up(step.factor, errors[step.path.source])
    if step.factor is not None:
        return mul_up(step.factor, root_of_sum_up(errors[each] for each in node.inputs))
    # Branches that count differently: the rule says how.
    rule = rule_of(node)
    assert rule is not None
    again = rule(Call(node, {each: Value(error) for each, error in errors.items()}, graph))
    assert isinstance(again, Step)
    assert again.bound is not None
    return again.bound


def rounding_of(node: Node, known: Mapping[Node, Any], result: Any, graph: Graph) -> float:
    """What ``result`` of one operation on what was computed before is off by at most, for each sample."""
    if node.op in _EXACT or (node.op == "interpolate" and "nearest" in str(node.kwargs.get("mode", "nearest"))):
        return 0.0
    size = _size(result, graph)
    inputs = [_size(known[each], graph) * math.sqrt(_copies(each, node)) for each in node.inputs]
    into = sum(inputs)
    count = max(math.prod(each.shape[1:]) for each in node.inputs)
    if node.op in _SUMS:
        size = _size(_performed(_of_moduli(node), {each: _modulus(known[each]) for each in node.inputs}), graph)
        relative = gamma(_num_terms(node, count) + 8)
    elif node.op in ("add", "sub", "rsub", "lerp"):
        numbers = [abs(value) for value in (*node.args[2:], *node.kwargs.values()) if isinstance(value, int | float)]
        size, relative = (size + into) * (1 + max([1.0, *numbers])), gamma(8)
    elif node.op == "batch_norm":
        size, relative = _batch_norm_size(node, known[node.inputs[0]], graph), gamma(32)
    elif node.op in _ALONG:
        size, relative = (size + into + 1) * math.sqrt(count), gamma(64 + count)
    elif node.module is not None or not _is_elementwise(node):
        size, relative = size + into, gamma(4096 + count)
    else:
        size, relative = size + into, gamma(32)
    return mul_up(relative, size * (1 + 1e-9)) + _UNDERFLOW


def _is_elementwise(node: Node) -> bool:
    return len(node.inputs) == 1 and node.inputs[0].shape == node.shape


def _copies(each: Node, node: Node) -> float:
    """How often an input is repeated to the shape of the result."""
    shape = node.shape[0] if isinstance(node.shape[0], tuple) else node.shape
    return max(1.0, math.prod(shape) / max(1, math.prod(each.shape)))


def _size(value: Any, graph: Graph) -> float:
    """The largest norm of a sample; a little more, for the rounding of the norm itself."""
    tensors = value if isinstance(value, tuple | list) else [value]
    squares = 0.0
    for each in tensors:
        if each.is_floating_point() and each.numel():
            flat = each.detach().reshape(graph.batch_size, -1)
            squares += float(norm_above(flat, 1).max()) ** 2
    return math.sqrt(squares) * (1 + 1e-12)


def _modulus(value: Any) -> Any:
    return map_structure(value, Tensor, lambda each: each.abs() if each.is_floating_point() else each)


def _of_moduli(node: Node) -> Node:
    """The operation with constants replaced by their moduli; numbers are factors in products alone."""
    args, kwargs = map_structure((node.args, node.kwargs), Tensor, _modulus)
    if node.op in ("mul", "div", "addmm"):
        args, kwargs = map_structure((args, kwargs), float, abs)
        args = map_structure(args, int, abs)
    return Node(node.name, node.op, node.function, args, kwargs, node.shape, node.module, node.is_float)


def _num_terms(node: Node, count: int) -> int:
    """How many products one entry of the result sums at most."""
    if node.op.startswith("conv"):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        return weight[0].numel() if "transpose" not in node.op else weight[:, 0].numel()
    return count


def _batch_norm_size(node: Node, inputs: Tensor, graph: Graph) -> float:
    """Of scale (|x| + |mean|) + |bias|."""
    known = {node.inputs[0]: inputs.abs()}
    moved = Node(node.name, node.op, node.function, *_negated_means(node), node.shape, node.module, node.is_float)
    return _size(perform(moved, known), graph)


def _negated_means(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    if node.function is not nn.functional.batch_norm:
        names = ("input", "weight", "bias", "running_mean", "running_var")
    change = {"running_mean": lambda mean: -mean.abs(), "weight": torch.abs, "bias": torch.abs}

    def changed(name: str, value: Any) -> Any:
        return change[name](value) if name in change and isinstance(value, Tensor) else value

    args = tuple(changed(names[at], value) if at < len(names) else value for at, value in enumerate(node.args))
    return args, {name: changed(name, value) for name, value in node.kwargs.items()}


def _performed(node: Node, known: Mapping[Node, Any]) -> Any:
    """As `perform`; a convolution once for all, where the places of the batch hold the same sample."""
    if node.op.startswith("conv") and node.args and node.inputs == [node.args[0]]:
        inputs = known[node.args[0]]
        if len(inputs) > 1 and bool((inputs[1:] == inputs[0]).all()):
            return perform(node, {node.args[0]: inputs[:1]}).expand(node.shape)
    return perform(node, known)


def perform(node: Node, known: Mapping[Node, Any], dtype: torch.dtype = torch.float64) -> Any:
    """One operation in a precision; where it draws, as the draw that scales the most: dropout that keeps everything."""
    args, kwargs = map_structure((node.args, node.kwargs), Node, known.__getitem__)

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = map_structure((args, kwargs), Tensor, converted)
    if "dropout" in node.op:
        given = kwargs | dict(zip(("input", "p", "training"), args, strict=False))
        probability = given.get("p", 0.5) if given.get("training", True) else 0.0
        return given["input"] / (1 - probability) if probability < 1 else given["input"] * 0
    if node.op == "rrelu":
        given = (
            {"lower": 1 / 8, "upper": 1 / 3}
            | kwargs
            | dict(zip(("input", "lower", "upper", "training"), args, strict=False))
        )
        if given.get("training", False):
            return nn.functional.leaky_relu(given["input"], max(given["lower"], given["upper"], key=abs))
    if node.op in ("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"):
        return args[0]
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    function: Callable[..., Any] | None = node.function
    if node.module is not None:
        twin = getattr(node.module, "exact_twin", None)
        exact: nn.Module = copy.deepcopy(node.module).double() if twin is None else twin()
        function = exact.to(dtype)
    assert function is not None
    return function(*args, **kwargs)
