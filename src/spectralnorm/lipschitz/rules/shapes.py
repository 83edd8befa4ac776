"""Operations that move, repeat, drop or join entries."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.maps import ConvolutionMap, DenseMap
from spectralnorm.lipschitz.parts import Part
from spectralnorm.lipschitz.registry import Call, Path, Step, rule
from spectralnorm.lipschitz.upward import mul_up, root_of_sum_up, root_up

__all__ = ["as_is", "padding_sources", "part_along", "part_by_index"]


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
    "type_as cpu cuda view_as reshape_as alias positive data".split()
)
def _same_entries(call: Call) -> Step:
    if not call.node.is_float:
        call.refuse("it rounds to whole numbers, which jumps", "keep floating point")
    if call.node.op == "view" and isinstance((*call.node.args, *call.node.kwargs.values())[1], torch.dtype):
        call.refuse("it reads the bits of a number as another type", "convert with .to")
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
        index = call.bind("input, index").index
        _check_index(call, index)
        return Step(1.0, map=_strided(call, index), part=part_by_index(call, index), is_linear=True, is_hidden=True)
    else:
        signatures = {
            "narrow": "input, dim, start, length",
            "select": "input, dim, index",
            "unbind": "input, dim=0",
        }
        given = call.bind(signatures.get(op, "input, sections, dim=0"))
        (dim,) = call.dims(given.dim, ndim)
        if op in ("narrow", "select"):
            start = given.start if op == "narrow" else given.index
            if isinstance(start, int):
                start %= call.input_shape[dim]
                length = given.length if op == "narrow" else 1
                return Step(
                    1.0, part=part_along(call, dim, range(start, start + length)), is_linear=True, is_hidden=True
                )
    return Step(1.0, is_linear=True, is_hidden=True)


def part_along(call: Call, dim: int, entries: range) -> Part:
    """Those entries along one dimension."""
    box = tuple(entries if axis == dim else range(size) for axis, size in enumerate(call.input_shape))
    return Part(call.input, (box,))


def part_by_index(call: Call, index: Any) -> Part | None:
    """What an index of whole numbers and slices picks."""
    parts: list[Any] = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    at = next((at for at, part in enumerate(parts) if part is Ellipsis), None)
    if at is not None:
        parts[at : at + 1] = [slice(None)] * (len(call.input_shape) - len(parts) + 1)
    box = [range(size) for size in call.input_shape]
    for axis, part in enumerate(parts):
        # range takes whole numbers and slices as a tensor does, from the end too.
        box[axis] = box[axis][part] if isinstance(part, slice) else box[axis][part : part + 1 or None]
    return Part(call.input, (tuple(box),))


def _strided(call: Call, index: Any) -> ConvolutionMap | None:
    """Every so manieth pixel from the first: a convolution of every channel with a kernel of one tap."""
    shape, after = call.input_shape, call.output_shape
    if not isinstance(index, tuple) or not 3 <= len(shape) <= 5 or len(after) != len(shape):
        return None
    part = part_by_index(call, index)
    if part is None:
        return None
    (box,) = part.boxes
    if any(each.start != 0 for each in box) or box[1] != range(shape[1]):
        return None
    stride = tuple(each.step for each in box[2:])
    kept = tuple(-(-size // step) for size, step in zip(shape[2:], stride, strict=True))
    if tuple(after[2:]) != kept or all(step == 1 for step in stride):
        return None
    axes, size = len(stride), tuple(shape[2:])
    geometry = ConvolutionGeometry((1,) * axes, stride, (1,) * axes, ((0, 0),) * axes, groups=shape[1])
    weight = torch.ones(shape[1], 1, *(1,) * axes, dtype=torch.float64, device=call.graph.device)
    return ConvolutionMap(weight, geometry, size if call.sizes == "given" else None, size)


def _check_index(call: Call, index: Any) -> None:
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, bool) or not isinstance(part, int | slice | EllipsisType | None) for part in parts):
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
    counts = torch.bincount(given.index.flatten(), minlength=1)
    return Step(root_up(float(counts.max())), is_linear=True)


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
def _repeated(call: Call) -> Step:
    before, after = call.input_shape, call.output_shape
    if len(before) != len(after) or before[0] != after[0]:
        call.refuse("it repeats or moves the batch", "repeat along the dimensions after the first")
    if call.node.op == "repeat_interleave":
        given = call.bind("input, repeats, dim=None, output_size=None")
        call.dims(given.dim, len(before))
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
    return Step(None, bound=call.input_bound, path=_joined(call, given.tensors))


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
    if given.mode != "constant" and any(end < 0 for end in given.pad):
        call.refuse("it crops at one end and copies at another", "crop in a step of its own")
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
