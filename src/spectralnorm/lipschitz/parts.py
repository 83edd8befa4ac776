"""Values that are made of different parts of one value: together they move no more than that one does.

`chunk`, `unbind` or slices give parts of a value whose entries are not shared; what is computed of one part alone stays
apart from what is computed of another. For x in parts x_1, x_2 and maps f_i with constants c_i,

    |f_1(x_1) - f_1(y_1)|^2 + |f_2(x_2) - f_2(y_2)|^2 <= max(c_1, c_2)^2 |x - y|^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.upward import mul_up, root_of_sum_up

if TYPE_CHECKING:
    from spectralnorm.lipschitz.registry import Value

__all__ = ["Part", "after", "apart", "joint_bound"]

Box = tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """That a value depends on some entries of another value alone.

    Attributes:
        source: the other value.
        boxes: the entries, as ranges of the source's dimensions.
        factor: Lipschitz constant of the map from these entries to the value, at most.
    """

    source: Node
    boxes: tuple[Box, ...]
    factor: float = 1.0


def apart(first: Part, second: Part) -> bool:
    """Whether the two have no entry of the source in common."""
    return all(_disjoint(one, other) for one in first.boxes for other in second.boxes)


def _disjoint(first: Box, second: Box) -> bool:
    return any(not set(one) & set(other) for one, other in zip(first, second, strict=True))


def after(inputs: Sequence[Node], values: Mapping[Node, Value], factor: float | None) -> Part | None:
    """Of the result of an operation with Lipschitz constant ``factor`` in all of ``inputs`` together."""
    parts = [values[node].part for node in dict.fromkeys(inputs)]
    first = parts[0] if parts else None
    if first is None or factor is None or len(parts) != len(inputs):
        return None
    boxes, largest = first.boxes, first.factor
    for part in parts[1:]:
        if part is None or part.source is not first.source or not apart(replace(first, boxes=boxes), part):
            return None
        boxes, largest = boxes + part.boxes, max(largest, part.factor)
    return Part(first.source, boxes, mul_up(factor, largest))


def joint_bound(nodes: Sequence[Node], values: Mapping[Node, Value]) -> float:
    """Lipschitz constant of all the values next to one another, at most; one that comes twice counts twice."""
    groups: list[list[Node]] = []
    for node in _sorted_pairs(list(nodes)):
        part = values[node].part
        for group in groups if part is not None else []:
            others: list[Any] = [values[other].part for other in group]
            if all(each is not None and each.source is part.source and apart(each, part) for each in others):  # type: ignore[union-attr]
                group.append(node)
                break
        else:
            groups.append([node])
    return root_of_sum_up(_group_bound(group, values) for group in groups)


def _group_bound(group: list[Node], values: Mapping[Node, Value]) -> float:
    plain = root_of_sum_up(values[node].bound for node in group)
    parts = [part for node in group if (part := values[node].part) is not None]
    if len(parts) < 2:
        return plain
    return min(plain, mul_up(max(part.factor for part in parts), values[parts[0].source].bound))


def _sorted_pairs(nodes: list[Node]) -> list[Node]:
    """The maximum and the minimum of the same two values are these, sorted, which brings no two of them further apart.

    So each such pair stands for the two values themselves.
    """
    found: list[Node] = []
    left = list(nodes)
    while left:
        node = left.pop(0)
        partner = next((other for other in left if _are_sorted(node, other)), None)
        if partner is None:
            found.append(node)
            continue
        left.remove(partner)
        found += node.inputs
    return found


def _are_sorted(one: Node, other: Node) -> bool:
    if {one.op, other.op} not in ({"maximum", "minimum"}, {"fmax", "fmin"}):
        return False
    first, second = one.inputs, other.inputs
    same = len(first) == len(second) == 2 and {*first} == {*second} and len({*first}) == 2
    return same and all(node.shape == one.shape for node in first) and one.shape == other.shape
