"""From the input to the outputs, one rule after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.lipschitz import rules as _rules  # noqa: F401  registers them
from spectralnorm.lipschitz.graph import Graph, Node, map_structure
from spectralnorm.lipschitz.parts import Part, after, joint_bound
from spectralnorm.lipschitz.registry import Call, Path, Step, Value, rule_of
from spectralnorm.lipschitz.rules.shapes import part_along
from spectralnorm.lipschitz.upward import mul_up

__all__ = ["Bounded", "propagate"]


@dataclass(frozen=True, slots=True)
class Bounded:
    """What one operation of the graph was found to be.

    Attributes:
        node: the operation.
        step: what its rule gave.
        value: what is known of its result.
        merged_with: the value that an explicit map was followed back to, where that gave the better bound.
    """

    node: Node
    step: Step
    value: Value
    merged_with: Node | None = None


def propagate(graph: Graph, *, mode: str, sizes: str) -> tuple[float, list[Bounded]]:
    """The Lipschitz constant of all outputs together, at most, and how it comes about.

    Raises:
        UserError: an operation has no rule, or its rule refuses it.
    """
    start = graph.nodes[0]
    values = {start: Value(1.0, Path(start, None))}
    found: list[Bounded] = []
    for node in graph.nodes[1:]:
        if node.op == "item":
            if not node.is_float:
                raise UserError(
                    f"certify refuses {node.name!r}: the positions that it gives jump, so no Lipschitz constant holds; "
                    "use the values alone."
                )
            values[node] = Value(values[node.inputs[0]].bound, Path(node, None), _part_of_split(node, values, graph))
            _check_batch(graph, node)
            continue
        bounded = _bounded(Call(node, values, graph, mode, sizes))
        values[node] = bounded.value
        if not isinstance(node.shape[0] if node.shape else 0, tuple):
            _check_batch(graph, node)
        found.append(bounded)
    together = joint_bound(graph.outputs, values)
    if not math.isfinite(together):
        raise UserError(
            "certify refuses the outputs: the bound of all of them together is beyond the range of float64; scale the "
            "weights down."
        )
    return together, found


def _part_of_split(node: Node, values: dict[Node, Value], graph: Graph) -> Part | None:
    """Which entries one of several results has, where these are pieces of the input."""
    parent, position = node.args
    if parent.op == "sort":
        return values[parent].part if position == 0 else None
    if parent.op not in ("chunk", "split", "split_with_sizes", "tensor_split", "unbind"):
        return None
    call = Call(parent, values, graph)
    given = call.bind("input, dim=0" if parent.op == "unbind" else "input, sections, dim=0")
    (dim,) = call.dims(given.dim, len(call.input_shape))
    entries = range(call.input_shape[dim])
    if parent.op == "tensor_split" and not isinstance(given.sections, int):
        # Between indices: these may fall, so that pieces overlap, and may count from the end.
        start, end = [None, *given.sections, None][position : position + 2]
        return part_along(call, dim, entries[start:end])
    sizes = [1 if parent.op == "unbind" else shape[dim] for shape in parent.shape]
    start = sum(sizes[:position])
    return part_along(call, dim, entries[start : start + sizes[position]])


def _check_constants(node: Node) -> None:
    """Nothing can be proved of a function whose values are not numbers."""

    def check(tensor: Tensor) -> None:
        if tensor.is_meta:
            raise UserError(
                f"certify lost track of the input before {node.op} at {node.name!r}: an operation there is hidden from "
                "torch's function protocol; register a rule for the module that does it."
            )
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
            raise UserError(
                f"certify refuses {node.op} at {node.name!r}: its weight, bias, statistic or another constant has "
                "entries that are not finite; load weights that are."
            )

    def check_number(number: float) -> None:
        if math.isnan(number):
            raise UserError(f"certify refuses {node.op} at {node.name!r}: an argument of it is not a number.")

    map_structure((node.args, node.kwargs), Tensor, check)
    map_structure((node.args, node.kwargs), float, check_number)
    if node.module is not None:
        for tensor in (*node.module.parameters(), *node.module.buffers()):
            check(tensor)


def _check_batch(graph: Graph, node: Node) -> None:
    if not node.shape or node.shape[0] % graph.batch_size:
        raise UserError(
            f"certify refuses {node.op} at {node.name!r}: its result {node.shape} does not keep the batch of "
            f"{graph.batch_size} samples as its first dimension; keep samples apart."
        )


def _bounded(call: Call) -> Bounded:
    node = call.node
    rule = rule_of(node)
    if rule is None:
        raise UserError(
            f"certify has no rule for {node.op} at {node.name!r}; if its Lipschitz constant is known, tell it with "
            "register_rule."
        )
    _check_constants(node)
    step = rule(call)
    if not isinstance(step, Step):
        step = Step(_checked(step, node))
    if not node.is_float:
        raise UserError(
            f"certify refuses {node.op} at {node.name!r}: it gives whole numbers, which jump; keep floating point."
        )
    direct = step.bound if step.bound is not None else mul_up(step.factor or 0.0, call.input_bound)
    path, bound, merged_with = step.path, direct, None
    if step.map is not None and path is None:
        path = _followed(call, step)
    if (
        path is not None
        and path.map is not None
        and path.source is not (call.inputs[0] if len(call.inputs) == 1 else None)
    ):
        through = mul_up(call.values[path.source].bound, path.map.bound())
        if through < bound:
            bound, merged_with = through, path.source
    if not math.isfinite(bound):
        raise UserError(
            f"certify refuses {node.op} at {node.name!r}: the bound up to there is beyond the range of float64; scale "
            "the weights down."
        )
    # Of a piece of a piece, the piece.
    part = step.part or after(call.inputs, call.values, step.factor)
    return Bounded(node, step, Value(bound, path or Path(node, None), part), merged_with)


def _followed(call: Call, step: Step) -> Path:
    """The explicit map, together with the one before it where both have a form in common."""
    before = call.values[call.input].path
    if before is not None and before.map is not None:
        merged = step.map.after(before.map)
        if merged is not None:
            return Path(before.source, merged)
    if before is not None and before.map is None and type(step.map).__name__ == "DenseMap":
        return Path(before.source, step.map)
    return Path(call.input, step.map)


def _checked(factor: object, node: Node) -> float:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise UserError(f"the rule for {node.op} at {node.name!r} must give a number from 0 up, got {factor!r}.")
    return float(factor)
