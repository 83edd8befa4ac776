"""Operations that move, repeat, drop or join entries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.maps import DenseMap
from spectralnorm.lipschitz.registry import Call, Path, Step, rule
from spectralnorm.lipschitz.upward import mul_up, root_of_sum_up, root_up

__all__ = ["as_is", "padding_sources"]


def as_is(call: Call) -> Step:
    """The same entries in the same order of each sample."""
    known = call.values[call.input].path
    path = None
    if call.output_shape[:1] == call.input_shape[:1]:
        if known is None or not isinstance(known.map, DenseMap | None):
            path = Path(call.input, None)
        else:
            path = known
    return Step(1.0, path=path, is_linear=True, is_hidden=True)


@rule(
    *"view reshape flatten unflatten squeeze unsqueeze contiguous clone detach to float double half bfloat16 type "
    "type_as cpu cuda view_as reshape_as alias positive requires_grad_ data".split()
)
def _same_entries(call: Call) -> Step:
    if not call.node.is_float:
        call.refuse("it rounds to whole numbers, which jumps", "keep floating point")
    return as_is(call)


@rule(
    *"permute transpose swapaxes swapdims movedim moveaxis t T mT pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
def _rearranged(call: Call) -> Step:
    # That the batch stays first is checked for every operation.
    return Step(1.0, is_linear=True, is_hidden=True)


@rule("flip", "roll")
def _moved(call: Call) -> Step:
    given = call.bind("input, dims" if call.node.op == "flip" else "input, shifts, dims=None")
    call.dims(given.dims, len(call.input_shape))
    return Step(1.0, is_linear=True, is_hidden=True)


@rule("getitem", "narrow", "select", "chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def _part(call: Call) -> Step:
    op, ndim = call.node.op, len(call.input_shape)
    if op == "getitem":
        _check_index(call, call.bind("input, index").index)
    else:
        signatures = {
            "narrow": "input, dim, start, length",
            "select": "input, dim, index",
            "unbind": "input, dim=0",
        }
        call.dims(call.bind(signatures.get(op, "input, sections, dim=0")).dim, ndim)
    return Step(1.0, is_linear=True, is_hidden=True)


def _check_index(call: Call, index: Any) -> None:
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if any(not (part is None or part is Ellipsis or isinstance(part, int | slice)) for part in parts):
        call.refuse("it picks entries by a list or tensor", "use slices, or index_select along one dimension")
    ndim = len(call.input_shape)
    consumed = sum(1 for part in parts if part is not None and part is not Ellipsis)
    first = parts[0]
    if first is Ellipsis:
        first = slice(None) if consumed < ndim else parts[1]
    whole = isinstance(first, slice) and first.step in (None, 1) and first.start in (None, 0)
    if not whole or not (first.stop is None or first.stop >= call.input_shape[0]):
        call.refuse("it picks samples of the batch", "index the dimensions after the first")


@rule("index_select")
def _index_select(call: Call) -> Step:
    given = call.bind("input, dim, index")
    call.dims(given.dim, len(call.input_shape))
    return Step(root_up(float(torch.bincount(given.index).max())), is_linear=True)


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
def _repeated(call: Call) -> Step:
    before, after = call.input_shape, call.output_shape
    if len(before) != len(after) or before[0] != after[0]:
        call.refuse("it repeats or moves the batch", "repeat along the dimensions after the first")
    if call.node.op == "repeat_interleave":
        given = call.bind("input, repeats, dim=None")
        if isinstance(given.repeats, Tensor):
            return Step(root_up(float(given.repeats.max())), is_linear=True)
    return Step(root_up(float(math.prod(after) // max(1, math.prod(before)))), is_linear=True)


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _join(call: Call) -> Step:
    given = call.bind("tensors, dim=0" if call.node.op in ("cat", "concat", "concatenate", "stack") else "tensors")
    ndim = len(call.output_shape)
    dim = given.dim if hasattr(given, "dim") else (1 if call.node.op == "hstack" else 0)
    call.dims(dim, ndim)
    if call.node.op != "stack" and ndim != max(len(each.shape) for each in given.tensors):
        call.refuse("it joins along the batch")
    bound = root_of_sum_up(call.values[node].bound for node in call.inputs)
    return Step(None, bound=bound, path=_joined(call, given.tensors))


def _joined(call: Call, parts: Any) -> Path | None:
    """Matrices that read the same value, below one another."""
    paths = [call.values[part].path if isinstance(part, Node) else None for part in parts]
    maps = [path.map for path in paths if path is not None and isinstance(path.map, DenseMap)]
    if len(call.output_shape) != 2 or len(maps) != len(parts) or len({id(path.source) for path in paths if path}) != 1:
        return None
    if any(each.matrix.ndim != 2 for each in maps):
        return None
    error = root_of_sum_up(each.error for each in maps)
    assert paths[0] is not None
    return Path(paths[0].source, DenseMap(torch.cat([each.matrix for each in maps]), error))


@rule("pad")
def _pad(call: Call) -> Step:
    sources = padding_sources(call)
    factor = 1.0
    for size, source in sources:
        counts = torch.bincount(source, minlength=size + 1)[:size]
        factor = mul_up(factor, root_up(float(counts.max()) if size else 0.0))
    return Step(factor, is_linear=True, is_hidden=factor == 1)


def padding_sources(call: Call) -> list[tuple[int, Tensor]]:
    """For each padded axis its size before and, for each pixel after, which pixel it copies; the size where none."""
    given = call.bind("input, pad, mode='constant', value=None")
    shape = call.input_shape
    pairs = list(zip(given.pad[::2], given.pad[1::2], strict=True))
    if len(pairs) == len(shape) and any(pairs[-1]):
        call.refuse("it pads the batch", "pad the dimensions after the first")
    found = []
    for axis, ends in zip(range(len(shape) - 1, -1, -1), pairs, strict=False):
        size = shape[axis]
        numbers = torch.arange(size, dtype=torch.float64)[None]
        if given.mode == "constant":
            padded = F.pad(numbers, list(ends), value=size)
        else:
            padded = F.pad(numbers, list(ends), mode=given.mode)
        found.append((size, padded[0].long()))
    return found
