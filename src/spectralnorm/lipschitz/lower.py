"""How large a Lipschitz constant is at least, shown by pairs of inputs: the recorded graph, run in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectralnorm.lipschitz.graph import Graph, Node, map_structure

__all__ = ["network_lower_bound", "operation_lower_bound", "run"]

_TINY = 1e-300
# Rounding of one evaluation: relative to the values that pass through the network, for each operation.
_ROUNDING = 1e-14
_DISTANCE = 1e-2  # of a pair, in units of the input's length
_POWER_SHARE = 0.5  # of the steps, before the inputs move too
_RATE = 0.05
_SEED = 20180216


def run(graph: Graph, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs in float64, and for each sample how large values became on the way.

    Args:
        graph: recorded of the model.
        inputs: (batch, *input_shape), float64, with the batch size that was recorded.

    Returns:
        (batch, entries) of all outputs, and (batch,).
    """
    batch = graph.batch_size
    known: dict[Node, Any] = {graph.nodes[0]: inputs}
    largest = inputs.detach().reshape(batch, -1).norm(dim=1)
    for node in graph.nodes[1:]:
        known[node] = result = perform(node, known)
        if isinstance(result, Tensor):
            largest = torch.maximum(largest, result.detach().reshape(batch, -1).norm(dim=1))
    outputs = [known[node].reshape(batch, -1) for node in dict.fromkeys(graph.outputs)]
    return torch.cat(outputs, dim=1), largest


def perform(node: Node, known: dict[Node, Any]) -> Any:
    """One operation in float64; dropout as the draw that keeps everything, which scales the most."""
    args, kwargs = map_structure((node.args, node.kwargs), Node, known.__getitem__)
    args, kwargs = map_structure((args, kwargs), Tensor, _double)
    if "dropout" in node.op:
        given = kwargs | dict(zip(("input", "p", "training"), args, strict=False))
        probability = given.get("p", 0.5) if given.get("training", True) else 0.0
        return given["input"] / (1 - probability) if probability < 1 else given["input"] * 0
    if node.op in ("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"):
        return args[0]
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    function: Callable[..., Any] | None = node.function
    if node.module is not None:
        twin = getattr(node.module, "exact_twin", None)
        function = copy.deepcopy(node.module).double() if twin is None else twin()
    assert function is not None
    return function(*args, **kwargs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def network_lower_bound(graph: Graph, *, upper_bound: float, steps: int) -> float:
    """The largest ||f(x) - f(y)|| / ||x - y|| that a search finds, less what rounding may add to it.

    Pairs in all the batch's places at once: first y moves to where the difference of the outputs grows the most, which
    on a linear piece is power iteration; then both move by gradient ascent (Adam).

    Args:
        graph: recorded of the model.
        upper_bound: which the result does not exceed.
        steps: of the search.
    """
    if not graph.outputs or steps == 0 or upper_bound == 0:
        return 0.0
    generator = torch.Generator().manual_seed(_SEED)
    shape = (graph.batch_size, *graph.nodes[0].shape[1:])
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Some activations are steepest near zero, and some networks away from it.
    scales = torch.logspace(-1.5, 0.5, graph.batch_size, dtype=torch.float64)[
        torch.randperm(graph.batch_size, generator=generator)
    ]
    base = (base * scales.reshape(-1, *[1] * (len(shape) - 1))).to(graph.device)
    offset = torch.randn(shape, generator=generator, dtype=torch.float64).to(graph.device)
    with torch.enable_grad():
        best = _search(graph, base, offset, steps)
    if best > upper_bound * (1 + 1e-6):
        raise AssertionError(
            f"A pair of inputs shows a Lipschitz constant of {best}, above the bound {upper_bound}: this is a mistake "
            "in spectralnorm; please report it with the model."
        )
    return min(best, upper_bound)


def _search(graph: Graph, base: Tensor, offset: Tensor, steps: int) -> float:
    best = 0.0
    offset = _with_length(offset, _DISTANCE * _lengths(base))
    base, offset = base.requires_grad_(), offset.requires_grad_()
    optimizer = torch.optim.Adam([base, offset], lr=_RATE)
    num_power = math.ceil(_POWER_SHARE * steps)
    for step in range(steps + 1):
        first, size = run(graph, base)
        second, other_size = run(graph, base + offset)
        # As it is computed with: base + offset is rounded too.
        distance = _lengths((base + offset).detach() - base.detach()).clamp_min(_TINY)
        difference = (second - first).norm(dim=1)
        rounding = _ROUNDING * len(graph.nodes) * (size + other_size) / distance
        ratio = difference.detach() / distance * (1 - 1e-10) - rounding
        best = max(best, *ratio[ratio.isfinite()].tolist(), 0.0)
        if step == steps or not second.requires_grad:  # no derivative: what was drawn has to do
            break
        optimizer.zero_grad()
        loss = -(difference.clamp_min(_TINY).log() - _lengths(offset).clamp_min(_TINY).log())
        loss[loss.isfinite()].sum().backward()
        if offset.grad is None:
            break
        with torch.no_grad():
            if step < num_power:
                # The gradient of the logarithm plus that of the distance's is J' of the difference, up to a factor.
                direction = -offset.grad + offset / _square(_lengths(offset), offset)
                usable = direction.isfinite().flatten(1).all(1) & (_lengths(direction) > 0)
                grown = _with_length(direction, _lengths(offset))
                offset.copy_(torch.where(usable.reshape(-1, *[1] * (offset.ndim - 1)), grown, offset))
                continue
        # Directions count, not sizes: gradients in units of what they move.
        with torch.no_grad():
            base.grad = _with_length(_finite(base.grad), torch.ones_like(distance))
            offset.grad = _with_length(_finite(offset.grad), torch.ones_like(distance))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * float(_lengths(base.detach()).median()) / math.sqrt(base[0].numel())
        optimizer.step()
    return best


def _finite(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def _lengths(batch: Tensor) -> Tensor:
    return batch.reshape(len(batch), -1).norm(dim=1)


def _square(lengths: Tensor, like: Tensor) -> Tensor:
    return lengths.square().clamp_min(_TINY).reshape(-1, *[1] * (like.ndim - 1))


def _with_length(batch: Tensor, lengths: Tensor) -> Tensor:
    return batch * (lengths / _lengths(batch).clamp_min(_TINY)).reshape(-1, *[1] * (batch.ndim - 1))


def operation_lower_bound(graph: Graph, node: Node, *, upper_bound: float, steps: int = 60) -> float:
    """Of the norm of one operation that is linear up to a constant: float64 power iteration on what it does."""
    (source,) = node.inputs
    generator = torch.Generator().manual_seed(_SEED)
    vector = torch.randn(source.shape, generator=generator, dtype=torch.float64).to(graph.device)
    best = 0.0
    with torch.enable_grad():
        zero = torch.zeros_like(vector)
        constant = perform(node, {source: zero}).detach()
        for _ in range(steps):
            vector = _with_length(vector, torch.ones(len(vector), dtype=torch.float64, device=vector.device))
            vector = vector.detach().requires_grad_()
            image = perform(node, {source: vector})
            change = (image - constant).reshape(len(vector), -1)
            lengths = change.detach().norm(dim=1)
            best = max(best, float(lengths.max()))
            (vector,) = torch.autograd.grad(change.square().sum(), vector)
            if not bool(vector.any()):
                break
    size = float(constant.flatten(1).norm(dim=1).max()) if constant.ndim > 1 else float(constant.abs().max())
    return max(0.0, min(best * (1 - 1e-10) - _ROUNDING * size, upper_bound))
