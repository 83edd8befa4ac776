"""How large a Lipschitz constant is at least, shown by pairs of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.linalg.rounding import gamma, norm_above, norm_below
from spectralnorm.lipschitz.evaluation import evaluate, perform, rounding_of
from spectralnorm.lipschitz.graph import Graph, Node, last_reads
from spectralnorm.lipschitz.registry import Step, is_of_user

__all__ = ["network_lower_bound", "operation_lower_bound", "quotient_below"]

_TINY = 1e-30
_FAR, _NEAR = 0.5, 1e-2  # of a pair, in units of the input's length: at first, and in the end
_POWER_SHARE = 0.2  # of the steps, before the inputs move too
_RATE = 0.1  # of the inputs' length, that they move in a step at first
_SEED = 20180216


def network_lower_bound(
    graph: Graph,
    steps: Mapping[Node, Step],
    *,
    upper_bound: float,
    ascent_steps: int,
    searched: Graph | None = None,
    rounds: int = 1,
) -> float:
    """The largest ||f(x) - f(y)|| / ||x - y|| that a search finds, rounding taken off.

    The search is in the precision of the weights: y moves to where the difference of the outputs grows the most, which
    on a linear piece is power iteration, and x along the gradient of the quotient. The pair that it ends with is
    evaluated once more, in float64 with a bound of its rounding, so that the result is a bound.

    Args:
        graph: recorded of the model.
        steps: what the rules gave for its nodes.
        upper_bound: which the result does not exceed.
        ascent_steps: of the search; 0: none.
        searched: the same model, recorded with another batch size, in whose places the search goes on; None: ``graph``.
        rounds: how many batches of pairs it begins with, one after the other.

    Raises:
        UserError: what was found contradicts a constant that a rule of the user's own gave.
    """
    if not graph.outputs or ascent_steps == 0 or upper_bound == 0:
        return 0.0
    with torch.enable_grad():
        pair = _search(graph if searched is None else searched, ascent_steps, rounds=rounds)
    with torch.no_grad():
        # In all places of the batch, because labels may differ between them.
        first, second = (each.expand(graph.batch_size, *each.shape) for each in pair)
        best = quotient_below(graph, steps, first, second)
    if best > upper_bound:
        own = list(dict.fromkeys(f"{node.op} at {node.name!r}" for node in graph.nodes if is_of_user(node)))
        if own:
            raise UserError(
                f"A pair of inputs shows a Lipschitz constant of {best}, above the bound {upper_bound}, so the rule "
                f"that was registered for {' or '.join(own)} gives too small a constant; correct the rule."
            )
        raise AssertionError(
            f"A pair of inputs shows a Lipschitz constant of {best}, above the bound {upper_bound}: this is a mistake "
            "in spectralnorm; please report it with the model."
        )
    return best


def quotient_below(graph: Graph, steps: Mapping[Node, Step], first: Tensor, second: Tensor) -> float:
    """||f(x) - f(y)|| / ||x - y||, rounded down: the largest of the batch.

    Args:
        graph: recorded of the model.
        steps: what the rules gave for its nodes.
        first: (batch, *input_shape), the x.
        second: of the same shape, the y.
    """
    first, second = first.double(), second.double()
    one, other = evaluate(graph, steps, first), evaluate(graph, steps, second)
    distance = norm_above((second - first).reshape(len(first), -1), 1) * (1 + gamma(1))
    change = norm_below(other.outputs - one.outputs, 1) * (1 - gamma(1))
    quotients = (change - (one.error + other.error) * (1 + 1e-12)) / distance * (1 - 1e-15)
    usable = quotients[quotients.isfinite() & (distance > 0)]
    return max(0.0, *usable.tolist()) if usable.numel() else 0.0


def _run(graph: Graph, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, entries) of all outputs."""
    known: dict[Node, Any] = {graph.nodes[0]: inputs}
    last = last_reads(graph)
    for node in graph.nodes[1:]:
        known[node] = perform(node, known, dtype)
        for read in last[node]:
            del known[read]
    return torch.cat([known[node].reshape(graph.batch_size, -1) for node in graph.outputs], dim=1)


class _Pairs(NamedTuple):
    """Of inputs, as many as a batch has, on their way.

    Attributes:
        base: (batch, *input_shape), the x.
        offset: of the same shape, y - x.
        motion: of the same shape, where the x were moving.
        best: (batch,), the largest quotient that each pair had.
        first: of the shape of ``base``, the x of that.
        second: of the same shape, the y of that.
    """

    base: Tensor
    offset: Tensor
    motion: Tensor
    best: Tensor
    first: Tensor
    second: Tensor


def _search(graph: Graph, steps: int, *, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """Two inputs (*input_shape) whose outputs differ much: the best of ``rounds`` batches of pairs.

    After the first steps, the best of all rounds, one batch, go on.
    """
    dtype = torch.float64 if graph.dtype == torch.float64 else torch.float32
    drawn = _drawn(graph, dtype, rounds * graph.batch_size)
    turn = 0 if rounds == 1 else math.ceil(_POWER_SHARE * steps)
    found = [_Pairs(*each) for each in zip(*(every.split(graph.batch_size) for every in drawn), strict=True)]
    if turn:
        found = [_climbed(graph, pairs, range(turn), steps) for pairs in found]
    together = _Pairs(*(torch.cat(every) for every in zip(*found, strict=True)))
    chosen = together.best.topk(graph.batch_size).indices if turn else slice(None)
    pairs = _climbed(graph, _Pairs(*(every[chosen] for every in together)), range(turn, steps + 1), steps)
    place = int(pairs.best.argmax())
    return pairs.first[place], pairs.second[place]


def _drawn(graph: Graph, dtype: torch.dtype, count: int) -> _Pairs:
    generator = torch.Generator().manual_seed(_SEED)
    shape = (count, *graph.nodes[0].shape[1:])
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Some activations are steepest near zero, and some networks away from it.
    order = torch.randperm(count, generator=generator)
    scales = torch.logspace(-1.5, 0.5, count, dtype=torch.float64)[order]
    base = (base * _like(scales, base)).to(graph.device, dtype)
    offset = torch.randn(shape, generator=generator, dtype=torch.float64).to(graph.device, dtype)
    offset = _with_length(offset, _FAR * _lengths(base))
    best = torch.full((count,), -1.0, dtype=dtype, device=graph.device)
    return _Pairs(base, offset, torch.zeros_like(base), best, base, base + offset)


def _climbed(graph: Graph, pairs: _Pairs, moves: range, steps: int) -> _Pairs:
    """After some of all ``steps``; the one after the last only looks."""
    base, offset, motion, best, *kept = pairs
    dtype = base.dtype
    for step in moves:
        is_moving = step >= _POWER_SHARE * steps
        base, offset = base.detach().requires_grad_(is_moving), offset.detach().requires_grad_()
        first, second = _run(graph, base, dtype), _run(graph, base + offset, dtype)
        difference = (second - first).norm(dim=1)
        quotient = torch.nan_to_num(difference.detach() / _lengths(offset.detach()).clamp_min(_TINY), nan=-1.0)
        better = _like(quotient > best, base)
        best = torch.maximum(best, quotient)
        kept = [
            torch.where(better, base.detach(), kept[0]),
            torch.where(better, (base + offset).detach(), kept[1]),
        ]
        if step == steps or not second.requires_grad:  # no derivative: what was drawn has to do
            break
        loss = difference.clamp_min(_TINY).log()
        sought = (offset, base) if is_moving else (offset,)
        grown, *moved = torch.autograd.grad(loss[loss.isfinite()].sum(), sought, allow_unused=True)
        if grown is None:
            break
        with torch.no_grad():
            # The gradient by the offset is J' of the difference, up to a factor.
            usable = _like(grown.isfinite().flatten(1).all(1) & (_lengths(grown) > 0), grown)
            # From afar a pair sees the steep places between, near by it measures them.
            distance = _FAR * (_NEAR / _FAR) ** min(1.0, 1.5 * step / steps)
            offset = torch.where(usable, _with_length(grown, distance * _lengths(base)), offset)
            for gradient in moved:
                motion = 0.7 * motion + _with_length(torch.nan_to_num(gradient), torch.ones_like(best))
                left = 1 - step / (steps + 1)
                base = base + _with_length(motion, _RATE * left * _lengths(base)) * (_like(_lengths(motion), base) > 0)
    return _Pairs(base.detach(), offset.detach(), motion, best, *kept)


def _like(numbers: Tensor, batch: Tensor) -> Tensor:
    """(batch,) with as many dimensions as the batch."""
    return numbers.reshape(-1, *[1] * (batch.ndim - 1))


def _lengths(batch: Tensor) -> Tensor:
    return batch.reshape(len(batch), -1).norm(dim=1)


def _with_length(batch: Tensor, lengths: Tensor) -> Tensor:
    # By the largest entry first, so that squares stay in range.
    largest = batch.reshape(len(batch), -1).abs().amax(1).clamp_min(torch.finfo(batch.dtype).tiny)
    batch = batch / _like(largest, batch)
    return batch * _like(lengths / _lengths(batch).clamp_min(_TINY), batch)


def operation_lower_bound(graph: Graph, node: Node, *, upper_bound: float, steps: int = 60) -> float:
    """Of the norm of one operation that is linear up to a constant: power iteration, rounding taken off."""
    (source,) = node.inputs
    if 0 in node.shape:
        return 0.0
    generator = torch.Generator().manual_seed(_SEED)
    vector = torch.randn(source.shape, generator=generator, dtype=torch.float64).to(graph.device)
    with torch.enable_grad():
        zero = torch.zeros_like(vector)
        constant = perform(node, {source: zero}).detach()
        best, found = -1.0, vector
        for _ in range(steps):
            vector = _with_length(vector, torch.ones(len(vector), dtype=torch.float64, device=vector.device))
            vector = vector.detach().requires_grad_()
            change = (perform(node, {source: vector}) - constant).reshape(len(vector), -1)
            largest = float(norm_below(change.detach(), 1).max())
            if largest > best:
                best, found = largest, vector.detach()
            (vector,) = torch.autograd.grad(change.square().sum(), vector)
            if not bool(vector.any()):
                break
    rounding = sum(rounding_of(node, {source: each}, perform(node, {source: each}), graph) for each in (zero, found))
    relative = gamma(math.prod(node.shape) + math.prod(source.shape) + 16)
    return max(0.0, min(best * (1 - relative) - rounding * (1 + 1e-12), upper_bound))
