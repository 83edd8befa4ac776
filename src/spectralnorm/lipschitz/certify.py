"""A guaranteed Lipschitz constant of a whole network."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.arguments import check_count, check_input_shape, check_model
from spectralnorm.lipschitz.certificate import Certificate, LayerBound
from spectralnorm.lipschitz.graph import Graph
from spectralnorm.lipschitz.lower import network_lower_bound, operation_lower_bound
from spectralnorm.lipschitz.propagate import Bounded, propagate
from spectralnorm.lipschitz.registry import module_rule_of
from spectralnorm.lipschitz.tracing import trace
from spectralnorm.lipschitz.values import values_of

__all__ = ["certify"]

# Of networks with few values on the way, many pairs of inputs are searched at once; of those with many, few.
_SMALL, _MANY = 2**15, (97, 101, 103, 107, 109)
_LARGE, _FEW, _ROUNDS = 2**23, (2, 4), 3


def certify(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    mode: str = "eval",
    num_classes: int | None = None,
    input_sizes: str = "given",
    ascent_steps: int = 30,
) -> Certificate:
    """Bound the Lipschitz constant of what ``model`` computes, from a sample to its output, in the 2-norm.

    The bound is rigorous: it holds for the real-arithmetic function that the weights define as they are stored, and all
    rounding on the way to it is upward. ``forward`` is run without values, and every operation that it performs is
    bounded by its rule; one without a rule is refused by name. docs/library/certificates.md derives the rules.

    Args:
        model: its weights are read as its layers use them, through any parametrization. It stays as it is.
        input_shape: of one sample, without the batch.
        mode: ``"eval"``, or ``"train"`` for dropout and RReLU as in training; weights are those of eval mode in both.
        num_classes: the model takes labels ``0 ... num_classes - 1`` as its second argument, and the bound holds for
            each of them; None: it takes the input alone.
        input_sizes: ``"given"``: convolutions are bounded for the sizes that they meet; ``"all"``: for every size.
        ascent_steps: of the search for a pair of inputs that shows how large the constant is at least; 0: none.

    Returns:
        The bound, from below as well, with a line for each layer. A weight that is zero makes a constant of its layer,
        of which 0 is the bound.

    Raises:
        UserError: an option is wrong, or something in the model has no Lipschitz constant or no rule; the message names
            it and says what to use instead.

    >>> import torch
    >>> import spectralnorm as sn
    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> round(sn.certify(torch.nn.Sequential(layer, torch.nn.Sigmoid()), (2,)).upper_bound, 6)
    1.0
    """
    check_model(model, function="certify")
    check_input_shape(input_shape)
    if mode not in ("eval", "train"):
        raise UserError(f"mode must be 'eval' or 'train', got {mode!r}.")
    if input_sizes not in ("given", "all"):
        raise UserError(f"input_sizes must be 'given' or 'all', got {input_sizes!r}.")
    if num_classes is not None:
        check_count("num_classes", num_classes, least=1)
    check_count("ascent_steps", ascent_steps, least=0)
    begin = time.perf_counter()
    with torch.no_grad():
        options: dict[str, Any] = {"mode": mode, "num_classes": num_classes, "is_whole": _is_whole}
        graph = trace(model, input_shape, **options)
        upper, found = propagate(graph, mode=mode, sizes=input_sizes)
    # A padding that was bounded as part of the convolution after it.
    part_of_next = {bounded.node.inputs[0] for bounded in found if bounded.step.map is not None and bounded.step.path}
    shown = [bounded for bounded in found if not bounded.step.is_hidden and bounded.node not in part_of_next]
    layers = tuple(_line(bounded, graph) for bounded in shown)
    steps = {bounded.node: bounded.step for bounded in found}
    searched, rounds = graph, 1
    whole = [node.shape[1:] for node in graph.nodes if node.shape and not isinstance(node.shape[0], tuple)]
    num_values = sum(map(math.prod, whole))
    with contextlib.suppress(UserError), torch.no_grad():
        if ascent_steps and num_values <= _SMALL:
            searched = trace(model, input_shape, **options, batch_sizes=_MANY, is_known=True)
        elif ascent_steps and num_values > _LARGE:
            searched = trace(model, input_shape, **options, batch_sizes=_FEW, is_known=True)
            rounds = _ROUNDS
    lower = network_lower_bound(
        graph, steps, upper_bound=upper, ascent_steps=ascent_steps, searched=searched, rounds=rounds
    )
    return Certificate(
        upper_bound=upper,
        lower_bound=lower,
        layers=layers,
        input_shape=tuple(input_shape),
        mode=mode,
        input_sizes=input_sizes,
        weights_sha256=_digest(model),
        torch_version=str(torch.__version__),
        package_version=_package_version(),
        seconds=time.perf_counter() - begin,
    )


def _is_whole(module: nn.Module) -> bool:
    return module_rule_of(module) is not None


def _line(bounded: Bounded, graph: Graph) -> LayerBound:
    node, factor = bounded.node, bounded.step.factor
    shape = node.shape[0] if isinstance(node.shape[0], tuple) else node.shape
    per_sample = shape[1:] if shape[0] == graph.batch_size else (shape[0] // graph.batch_size, *shape[1:])
    lower = None
    if bounded.step.map is not None:
        lower = bounded.step.map.lower_bound()
    elif bounded.step.is_linear and factor is not None and len(node.inputs) == 1:
        lower = operation_lower_bound(graph, node, upper_bound=factor)
    return LayerBound(
        name=node.name,
        op=node.op,
        output_shape=per_sample,
        lower=lower,
        upper=factor,
        product=bounded.value.bound,
        merged_with=bounded.merged_with.name if bounded.merged_with else None,
    )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(values_of(value))
    return digest.hexdigest()


def _package_version() -> str:
    return sys.modules["spectralnorm"].__version__  # not imported: it imports this package
