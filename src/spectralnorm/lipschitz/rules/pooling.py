"""Pools and upsampling, by how often each entry is read, or by the norm of the explicit matrix along each axis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rounding import gamma
from spectralnorm.lipschitz.bounds import frobenius, matrix_bound
from spectralnorm.lipschitz.maps import ConvolutionMap
from spectralnorm.lipschitz.registry import Call, Step, rule
from spectralnorm.lipschitz.upward import add_up, mul_up, root_up

__all__: list[str] = []


def _axes(call: Call, num_axes: int) -> list[tuple[int, int]]:
    """Size before and after along each spatial axis."""
    output = call.output_shape[0] if isinstance(call.output_shape[0], tuple) else call.output_shape
    if len(call.input_shape) != num_axes + 2:
        call.refuse("its input has no batch dimension, so the batch would be taken for channels", "keep the batch")
    return list(zip(call.input_shape[2:], output[2:], strict=True))


def _each(option: Any, axes: int) -> tuple[Any, ...]:
    values = tuple(option) if isinstance(option, tuple | list) else (option,)
    return values * axes if len(values) == 1 else values


def _largest_count(size: int, read: Tensor) -> float:
    counts = torch.bincount(read[(read >= 0) & (read < size)], minlength=size)
    return float(counts.max())


@rule(*(f"max_pool{n}d{ending}" for n in (1, 2, 3) for ending in ("", "_with_indices")))
def _max_pool(call: Call) -> Step:
    # Each window is 1-Lipschitz in what it reads, and an entry is read by so many windows at most.
    axes = int(call.node.op[8])
    given = call.bind("input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False")
    kernel = _each(given.kernel_size, axes)
    options = zip(
        _axes(call, axes),
        kernel,
        _each(given.stride or kernel, axes),
        _each(given.padding, axes),
        _each(given.dilation, axes),
        strict=True,
    )
    count = 1.0
    for (size, out), k, stride, padding, dilation in options:
        read = torch.arange(out)[:, None] * stride - padding + torch.arange(k) * dilation
        count *= _largest_count(size, read.flatten())
    return Step(root_up(count))


def _adaptive_windows(size: int, out: int) -> list[tuple[int, int]]:
    return [(i * size // out, -((-(i + 1) * size) // out)) for i in range(out)]


@rule(*(f"adaptive_max_pool{n}d{ending}" for n in (1, 2, 3) for ending in ("", "_with_indices")))
def _adaptive_max_pool(call: Call) -> Step:
    count = 1.0
    for size, out in _axes(call, int(call.node.op[17])):
        read = torch.cat([torch.arange(start, end) for start, end in _adaptive_windows(size, out)])
        count *= _largest_count(size, read)
    return Step(root_up(count))


def _averaging_norm(size: int, windows: list[tuple[int, int]], divisors: list[int]) -> float:
    """Of the matrix whose rows average over windows [start, end)."""
    matrix = torch.zeros(len(windows), size, dtype=torch.float64)
    for row, ((start, end), divisor) in enumerate(zip(windows, divisors, strict=True)):
        matrix[row, max(start, 0) : max(min(end, size), 0)] = 1 / divisor
    return add_up(matrix_bound(matrix), mul_up(gamma(2), frobenius(matrix)))


@rule(*(f"avg_pool{n}d" for n in (1, 2, 3)))
def _average_pool(call: Call) -> Step:
    axes = int(call.node.op[8])
    given = call.bind(
        "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None"
    )
    kernel = _each(given.kernel_size, axes)
    options = zip(
        _axes(call, axes), kernel, _each(given.stride or kernel, axes), _each(given.padding, axes), strict=True
    )
    factor = 1.0
    for (size, out), k, stride, padding in options:
        starts = [i * stride - padding for i in range(out)]
        ends = [min(start + k, size + padding) for start in starts]
        if given.divisor_override:
            divisors = [1] * out
        elif given.count_include_pad:
            divisors = [end - start for start, end in zip(starts, ends, strict=True)]
        else:
            divisors = [max(1, min(end, size) - max(start, 0)) for start, end in zip(starts, ends, strict=True)]
        factor = mul_up(factor, _averaging_norm(size, list(zip(starts, ends, strict=True)), divisors))
    if given.divisor_override:
        factor = math.nextafter(mul_up(factor, math.nextafter(abs(1 / given.divisor_override), math.inf)), math.inf)
    padding = _each(given.padding, axes)
    side = math.isqrt(math.prod(kernel))
    is_exact = side * side == math.prod(kernel) and side & (side - 1) == 0 and not given.divisor_override
    if is_exact and kernel == _each(given.stride or kernel, axes) and not any(padding) and not given.ceil_mode:
        # Windows of k pixels each that do not meet: k^-1/2, exactly where that is a power of two.
        factor = min(factor, 1 / side)
    is_plain = (given.count_include_pad or not any(padding)) and not given.ceil_mode
    entry = 1 / (given.divisor_override or math.prod(kernel))
    stride = _each(given.stride or kernel, axes)
    as_filter = _filter(call, entry, kernel=kernel, stride=stride, padding=padding)
    return Step(factor, map=as_filter if is_plain else None, is_linear=True)


def _filter(
    call: Call,
    entry: float,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | None = None,
    transposed: bool = False,
) -> ConvolutionMap:
    """The same convolution of every channel, all taps alike."""
    axes, channels, size = len(kernel), call.input_shape[1], tuple(call.input_shape[2:])
    geometry = ConvolutionGeometry(
        kernel_size=kernel,
        stride=stride,
        dilation=(1,) * axes,
        padding=tuple((each, each) for each in padding or (0,) * axes),
        groups=channels,
        transposed=transposed,
        output_padding=(0,) * axes if transposed else (),
    )
    weight = torch.full((channels, 1, *kernel), entry, dtype=torch.float64, device=call.graph.device)
    found = ConvolutionMap(weight, geometry, size if call.sizes == "given" else None, size)
    return found if entry == 1 else found.scaled(weight, gamma(2), 1.0)


@rule(*(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)))
def _adaptive_average_pool(call: Call) -> Step:
    return Step(_adaptive_average_norm(_axes(call, int(call.node.op[17]))), is_linear=True)


def _adaptive_average_norm(axes: list[tuple[int, int]]) -> float:
    factor = 1.0
    for size, out in axes:
        windows = _adaptive_windows(size, out)
        factor = mul_up(factor, _averaging_norm(size, windows, [end - start for start, end in windows]))
    return factor


def _nearest_reads(size: int, options: dict[str, Any], device: torch.device) -> Tensor:
    """Which entry each pixel after a nearest resampling of one axis reads: (ways, pixels after).

    torch multiplies a pixel's place with the quotient of the sizes and rounds down, where a last bit may decide. It
    does so in float32 or in float64, as the image is, and in float32 for both where memory is laid out in some ways.
    """
    flat: dict[str, Any] = {k: (1, v) if k in ("size", "scale_factor") else v for k, v in options.items()}
    found = []
    line = torch.arange(size)
    for place in dict.fromkeys((torch.device("cpu"), device)):
        for dtype in (torch.float32, torch.float64):
            axis = line.to(place, dtype)
            found.append(F.interpolate(axis[None, None], **options)[0, 0])
            for layout in (torch.contiguous_format, torch.channels_last):
                image = axis.expand(1, 8, 1, size).contiguous(memory_format=layout)
                found.append(F.interpolate(image, **flat)[0, 0, 0])
    return torch.stack([read.cpu().long() for read in found])


@rule("interpolate", "upsample")
def _interpolate(call: Call) -> Step:
    given = call.bind(
        "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
        "antialias=False"
    )
    num_axes = len(call.input_shape) - 2
    axes = _axes(call, num_axes)
    if given.antialias or given.mode not in ("nearest", "nearest-exact", "area", "linear", "bilinear", "trilinear"):
        call.refuse(
            f"it has no rule for mode {given.mode!r}" + (" with antialias" if given.antialias else ""),
            "use nearest or bilinear",
        )
    if given.mode == "area":
        return Step(_adaptive_average_norm(axes), is_linear=True)
    factor, copies = 1.0, ()
    for axis, (size, out) in enumerate(axes):
        options: dict[str, Any] = {"mode": given.mode}
        if given.scale_factor is None:
            options["size"] = out
        else:
            options["scale_factor"] = float(_each(given.scale_factor, num_axes)[axis])
            options["recompute_scale_factor"] = given.recompute_scale_factor
        if given.mode.startswith("nearest"):
            reads = _nearest_reads(size, options, call.graph.device)
            # Each entry is read by the pixels that read it in any of the ways.
            pairs = torch.unique(reads * out + torch.arange(out))
            factor = mul_up(factor, root_up(_largest_count(size, pairs // out)))
            # Whole numbers of copies: a transposed convolution with a kernel of ones.
            if out % size or not bool((reads == torch.arange(out) // (out // size)).all()):
                copies = None
            elif copies is not None:
                copies = (*copies, out // size)
            continue
        copies = None
        options |= {"mode": "linear", "align_corners": given.align_corners}
        matrix = F.interpolate(torch.eye(size, dtype=torch.float64)[None], **options)[0]
        # Two weights in each column, off by a few roundings of a coordinate below the size.
        error = mul_up(gamma(16 * max(size, out)), root_up(2.0 * out))
        factor = mul_up(factor, add_up(matrix_bound(matrix), error))
    as_filter = _filter(call, 1.0, kernel=copies, stride=copies, transposed=True) if copies else None
    return Step(factor, map=as_filter, is_linear=True, is_hidden=factor == 1)
