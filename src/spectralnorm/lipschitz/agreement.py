"""Whether a model computes the same for every sample at every call: two records of it must agree.

What is constant is read while the model runs. If it follows the size of the batch, the place of a sample in it, numbers
that are drawn or a state that `forward` changes, it is another number in a second run with another batch size. Then
what was recorded is not the function of one sample that a certificate is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.graph import Graph, Node, leaves

__all__ = ["refuse_disagreement"]

# Operations whose numbers may count samples: the shapes of argument and result, which are compared, say what they do.
_SHAPED = frozenset("view reshape unflatten expand broadcast_to repeat tile".split())
# Operations of whose constants no bound depends on the values: these may differ by rounding.
_ADDING = frozenset("add sub rsub".split())


def refuse_disagreement(first: Graph, second: Graph, labels: Sequence[Tensor]) -> None:
    """See that two records of one model are of the same function of a sample.

    Args:
        first: recorded with labels 0, 1, ..., 0, 1, ... .
        second: the same, with another batch size.
        labels: (batch,) of each of the two, whole numbers; zeros for a model without.

    Raises:
        UserError: they differ in an operation or a constant; the message names the first one.
    """
    compared = _Compared(first, second, labels, dict(zip(first.nodes, second.nodes, strict=False)))
    differs = next((node for node, twin in compared.twins.items() if not _agree(node, twin, compared)), None)
    if differs is None and len(first.nodes) != len(second.nodes):
        differs = max(first.nodes, second.nodes, key=len)[-1]
    if differs is None and not _same(first.outputs, second.outputs, compared):
        differs = first.nodes[-1]
    if differs is not None:
        is_labelled = len(labels[0].unique()) > 1
        others = ", all of one label" if is_labelled and len(labels[1].unique()) == 1 else ""
        raise UserError(
            f"certify refuses {differs.op} at {differs.name!r}: in a second run, with {second.batch_size} samples in "
            f"place of {first.batch_size}{others}, it computes something else; let forward use neither the size of the "
            f"batch{' or the labels of other samples' if is_labelled else ''} nor a state that it changes nor numbers "
            "that it draws."
        )


@dataclass(frozen=True, slots=True)
class _Compared:
    """Two records.

    Attributes:
        first: the one.
        second: the other.
        labels: of each; that of a sample of the first is its place, as long as none came before.
        twins: the node of the second that has the place of a node of the first.
    """

    first: Graph
    second: Graph
    labels: Sequence[Tensor]
    twins: dict[Node, Node]

    def counts_samples(self, one: int, other: int) -> bool:
        """Whether two numbers are the same multiple of the two batch sizes."""
        return one * self.second.batch_size == other * self.first.batch_size


def _agree(node: Node, twin: Node, compared: _Compared) -> bool:
    return (
        (node.name, node.op) == (twin.name, twin.op)
        and _same(node.shape, twin.shape, compared, may_count=True)
        and _same(
            (_arguments(node), node.kwargs),
            (_arguments(twin), twin.kwargs),
            compared,
            may_count=node.op in _SHAPED,
            may_round=node.op in _ADDING,
        )
        and _same_layer(node.module, twin.module, compared)
    )


def _same_layer(one: nn.Module | None, other: nn.Module | None, compared: _Compared) -> bool:
    """Whether two copies of a layer have the same tensors and numbers: of what else they have, rules read the kind."""
    if one is None or other is None:
        return one is other
    ours, theirs = ([leaf for each in layer.modules() for leaf in leaves(vars(each))] for layer in (one, other))
    return len(ours) == len(theirs) and all(
        _same(*pair, compared)
        if isinstance(pair[0], Tensor | int | float | complex | str)
        else type(pair[0]) is type(pair[1])
        for pair in zip(ours, theirs, strict=True)
    )


def _arguments(node: Node) -> tuple[Any, ...]:
    """Positional ones; where an index takes all samples, without their number."""
    if node.op != "getitem" or not isinstance(node.args[0], Node):
        return node.args
    inputs, index = node.args
    first, *others = index if isinstance(index, tuple) and index else (index,)
    if isinstance(first, slice) and first.start in (None, 0) and first.step in (None, 1):
        is_whole = first.stop is None or first.stop >= inputs.shape[0]
        first = slice(None) if is_whole else first
    return inputs, first, *others


def _same(one: Any, other: Any, compared: _Compared, *, may_count: bool = False, may_round: bool = False) -> bool:
    """Whether two arguments are the same.

    Args:
        one: of the first record.
        other: of the second.
        compared: the two records.
        may_count: numbers may count the samples, each of its own batch.
        may_round: tensors may differ by rounding, which in sums depends on the size of the batch.
    """
    if isinstance(one, Node):
        return compared.twins.get(one) is other
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _same_constant(one, other, compared, _close if may_round else _equal)
    ours, theirs = _parts(one), _parts(other)
    if ours is None or theirs is None:
        is_count = may_count and type(one) is int and compared.counts_samples(one, other)
        return one == other or is_count or (one != one and other != other)
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(_same(*pair, compared, may_count=may_count, may_round=may_round) for pair in pairs)


def _parts(structure: Any) -> list[Any] | None:
    """None of what has none."""
    if isinstance(structure, slice):
        return [structure.start, structure.stop, structure.step]
    if isinstance(structure, tuple | list):
        return list(structure)
    if isinstance(structure, dict):
        return [*structure, *structure.values()]
    if is_dataclass(structure) and not isinstance(structure, type):
        return [getattr(structure, each.name) for each in fields(structure)]
    return None


def _same_constant(one: Tensor, other: Tensor, compared: _Compared, is_same: Callable[[Tensor, Tensor], bool]) -> bool:
    if one.dtype != other.dtype or one.ndim != other.ndim:
        return False
    if one.is_meta or other.is_meta:  # what escaped the record: it has no values, and no rule takes it
        return one.is_meta and other.is_meta
    dims = [dim for dim, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
    if not dims:
        # A weight, as a rule, and found unchanged since.
        is_one = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
        return is_one or is_same(one, other)
    if len(dims) > 1 or not compared.counts_samples(one.shape[dims[0]], other.shape[dims[0]]):
        return False
    # Sample by sample, or all samples several times: each must have what the first with its label has.
    ours, theirs = (each.movedim(dims[0], 0) for each in (one, other))
    sizes = compared.first.batch_size, compared.second.batch_size
    times, rest = divmod(len(ours), sizes[0])
    if rest:
        return False
    places = [labels.to(one.device) for labels in compared.labels]
    for by_sample in (True, False):
        mine, yours = (
            each.unflatten(0, (-1, times)) if by_sample else each.unflatten(0, (times, -1)).transpose(0, 1)
            for each in (ours, theirs)
        )
        if is_same(mine, mine[places[0]]) and is_same(yours, mine[places[1]]):
            return True
    return False


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than half of the digits of the largest entry."""
    if not one.is_floating_point() and not one.is_complex():
        return _equal(one, other)
    finite = one[one.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=math.sqrt(torch.finfo(one.dtype).eps) * size, equal_nan=True)
