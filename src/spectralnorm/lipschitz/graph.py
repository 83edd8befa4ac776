"""What a network computes, operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

__all__ = [
    "FILLED",
    "METADATA",
    "TEMPLATED",
    "Graph",
    "Node",
    "canonical",
    "last_reads",
    "leaves",
    "map_structure",
    "needed",
    "with_maxima",
]

# What a tensor without values answers.
METADATA = frozenset(
    "shape size dim ndim ndimension dtype device layout numel nelement stride storage_offset is_contiguous is_cuda "
    "is_cpu is_floating_point is_complex is_sparse is_quantized is_nested is_mkldnn requires_grad is_leaf grad_fn "
    "names element_size itemsize __len__ is_meta is_mps is_xpu get_device is_tensor is_inference is_view is_xla "
    "is_neg is_conj is_same_size nbytes".split()
)
# What takes from a tensor its shape alone, and what it fills it with.
FILLED = {"zeros_like": 0.0, "new_zeros": 0.0, "ones_like": 1.0, "new_ones": 1.0, "empty_like": 0.0, "new_empty": 0.0}
# What makes of a tensor one of another's type or shape.
TEMPLATED = frozenset("to type_as view_as reshape_as expand_as".split())

# Whether a comparison asks that its first argument be the larger one.
_IS_LARGER = {"ge": True, "gt": True, "le": False, "lt": False}

_OPERATORS = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "__rsub__": "rsub",
    "__rmatmul__": "rmatmul",
    "__rpow__": "rpow",
}


@dataclass(eq=False, slots=True)
class Node:
    """One operation, with other nodes where it was given values that depend on the input.

    Attributes:
        name: the path of the module that performed it, with the operation where a module performs several.
        op: the operation's name, the same for a function, a method and an operator, in place or not.
        function: what to call to perform it, never in place; None for the model's input.
        args: positional arguments.
        kwargs: keyword arguments.
        shape: of the result, batch first; a tuple of shapes for several results.
        module: the module, where a rule for its class treats it as a whole.
        is_float: whether the result is a floating tensor (or several).
    """

    name: str
    op: str
    function: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[Any, ...] = ()
    module: nn.Module | None = None
    is_float: bool = True

    @property
    def inputs(self) -> list[Node]:
        """Its arguments that depend on the input, in order; one that is given twice comes twice."""
        found: list[Node] = []
        map_structure((self.args, self.kwargs), Node, lambda node: found.append(node))
        return found


@dataclass(frozen=True, slots=True)
class Graph:
    """What `forward` computes.

    Attributes:
        nodes: those that the outputs depend on, each after its inputs; the first is the input.
        outputs: what `forward` returned, those that depend on the input; one that is returned twice comes twice.
        batch_size: it was recorded with; a first dimension is a multiple of it.
        device: where the constants are.
        dtype: of the model's first floating tensor.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32


def with_maxima(graph: Graph) -> Graph:
    """Where ``where(a >= b, a, b)`` and its like are written, the maximum or minimum that they are.

    It changes the nodes. At a tie both values are the same, so it does not matter which of them is taken.
    """
    for node in graph.nodes:
        if node.op != "where" or node.kwargs or len(node.args) != 3 or len(node.inputs) != 3:
            continue
        # As a method the condition comes second.
        choice, chosen, other = (
            node.args if node.args[0].op in _IS_LARGER else (node.args[1], node.args[0], node.args[2])
        )
        if choice.op not in _IS_LARGER or choice.kwargs or len(choice.inputs) != 2:
            continue
        compared = choice.inputs
        if {*compared} == {chosen, other} and len({*compared}) == 2 and chosen.shape == other.shape == node.shape:
            is_maximum = _IS_LARGER[choice.op] == (compared[0] is chosen)
            node.op, node.function = ("maximum", torch.maximum) if is_maximum else ("minimum", torch.minimum)
            node.args = (chosen, other)
    return replace(graph, nodes=needed(graph.nodes, graph.outputs))


def needed(nodes: Sequence[Node], outputs: Sequence[Node]) -> tuple[Node, ...]:
    """Those that the outputs depend on, and the first."""
    kept = {*outputs, nodes[0]}
    for node in reversed(nodes):
        if node in kept:
            kept.update(node.inputs)
    return tuple(node for node in nodes if node in kept)


def last_reads(graph: Graph) -> dict[Node, list[Node]]:
    """What no operation after this one reads, and no output is: it need not be kept."""
    kept, found = set(graph.outputs), dict[Node, list[Node]]()
    for node in reversed(graph.nodes):
        found[node] = [each for each in dict.fromkeys(node.inputs) if each not in kept]
        kept.update(found[node])
    return found


def leaves(structure: Any) -> Iterator[Any]:
    """What tuples, lists, dictionaries, dataclasses and slices are made of in the end.

    Of a dataclass it is what counts when two are compared.
    """
    if isinstance(structure, tuple | list):
        parts: Iterable[Any] = structure
    elif isinstance(structure, dict):
        parts = structure.values()
    elif isinstance(structure, slice):
        parts = structure.start, structure.stop, structure.step
    elif is_dataclass(structure) and not isinstance(structure, type | Node):
        parts = [getattr(structure, each.name) for each in fields(structure) if each.compare]
    else:
        yield structure
        return
    for each in parts:
        yield from leaves(each)


def map_structure(structure: Any, kind: type | tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """The same tuples, lists, dictionaries and dataclasses, with ``function`` of every leaf that is a ``kind``."""
    if isinstance(structure, kind):
        return function(structure)
    if isinstance(structure, tuple | list):
        mapped = [map_structure(each, kind, function) for each in structure]
        if isinstance(structure, list):
            return mapped
        is_named = hasattr(structure, "_fields")
        return type(structure)(*mapped) if is_named else tuple(mapped)
    if is_dataclass(structure) and not isinstance(structure, type | Node):
        mapped = copy.copy(structure)
        for each in fields(structure):
            # Also of one that is frozen.
            object.__setattr__(mapped, each.name, map_structure(getattr(structure, each.name), kind, function))
        return mapped
    if isinstance(structure, dict):
        return {key: map_structure(each, kind, function) for key, each in structure.items()}
    return structure


def canonical(func: Callable[..., Any]) -> tuple[str, bool]:
    """The operation's name without the forms it can be called in, and whether it works in place.

    Of an operation that is not torch's own the name tells where it comes from as well: its `relu` may be another.
    """
    name = getattr(func, "__name__", type(func).__name__)
    module = getattr(func, "__module__", None) or "torch"
    if module.split(".")[0] != "torch" or (module.startswith("torch._ops.") and module != "torch._ops.aten"):
        return f"{module.removeprefix('torch._ops.')}.{name.removesuffix('_')}", name.endswith("_")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "attribute")
        return (attribute, False) if name == "__get__" else (f"setting of .{attribute}", False)
    if name.startswith("_") and not name.startswith("__"):
        name = name[1:]
    if name in _OPERATORS:
        return _OPERATORS[name], False
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        if name in ("__len__", "__setitem__", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
            return name, False
        if bare.startswith("i") and bare[1:] in ("add", "sub", "mul", "truediv", "div", "pow"):
            return {"truediv": "div"}.get(bare[1:], bare[1:]), True
        return bare, False
    if name.endswith("_") and not name.startswith("__"):
        return name[:-1], True
    return {"true_divide": "div", "subtract": "sub", "multiply": "mul", "divide": "div", "negative": "neg"}.get(
        name, name
    ), False
