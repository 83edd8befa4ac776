"""Linear layers, convolutions and batch normalization."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.linalg.convolution import ConvolutionGeometry
from spectralnorm.linalg.rounding import gamma
from spectralnorm.lipschitz.bounds import matrix_bound
from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.maps import ConvolutionMap, DenseMap, ScaleMap
from spectralnorm.lipschitz.registry import Call, Path, Step, rule
from spectralnorm.lipschitz.upward import mul_up

__all__: list[str] = []


def weight_of(call: Call, weight: Any) -> Tensor:
    """A constant weight in float64, checked."""
    if isinstance(weight, Node):
        call.refuse(
            "its weight depends on the input, as in dot-product attention, and so has no bound for inputs of any "
            "length",
            "use a constant weight or spectralnorm.layers.L2Attention, or register a rule where its inputs are bounded",
        )
    weight = call.constant(weight)
    if not bool(weight.isfinite().all()):
        call.refuse("its weight has entries that are not finite", "load weights that are")
    return weight


def _matrix_step(call: Call, matrix: Tensor) -> Step:
    """A matrix (out, in) on the last dimension."""
    if len(call.input_shape) < 2:
        call.refuse("it multiplies along the batch, and so mixes samples")
    if len(call.input_shape) == 2:
        dense = DenseMap(matrix)
        return Step(dense.bound(), map=dense, is_linear=True)
    return Step(matrix_bound(matrix), is_linear=True)


@rule("linear")
def _linear(call: Call) -> Step:
    given = call.bind("input, weight, bias=None")
    weight = weight_of(call, given.weight)
    if isinstance(given.bias, Node):
        call.refuse("its bias depends on the input", "add it in a step of its own")
    return _matrix_step(call, weight if weight.ndim == 2 else weight[None])


@rule("addmm")
def _addmm(call: Call) -> Step:
    given = call.bind("input, mat1, mat2, beta=1, alpha=1")
    if isinstance(given.input, Node) or not isinstance(given.alpha, int | float) or given.alpha != 1:
        call.refuse("what it adds depends on the input, or alpha is not 1", "write the sum out")
    return _matrix_step(call, weight_of(call, given.mat2).T)


@rule("matmul", "mm", "bmm", "mv", "rmatmul")
def _matmul(call: Call) -> Step:
    given = call.bind("input, other")
    left, right = (given.other, given.input) if call.node.op == "rmatmul" else (given.input, given.other)
    if isinstance(left, Node):
        matrix = weight_of(call, right)
        if matrix.ndim > 2:
            call.refuse("its constant has more than two dimensions", "multiply by a matrix")
        return _matrix_step(call, matrix.T if matrix.ndim == 2 else matrix[None])
    matrix = weight_of(call, left)
    if matrix.ndim != 2 or len(call.input_shape) < 3:
        call.refuse("it multiplies along the batch, or by a constant that is no matrix", "multiply from the right")
    return Step(matrix_bound(matrix), is_linear=True)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(call: Call) -> Step:
    given = call.bind("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
    weight = weight_of(call, given.weight)
    axes = weight.ndim - 2
    kernel, dilation = tuple(weight.shape[2:]), _each(given.dilation, axes)
    if given.padding == "same":
        extra = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in extra)
    else:
        padding = tuple((p, p) for p in _each(0 if given.padding == "valid" else given.padding, axes))
    geometry = ConvolutionGeometry(kernel, _each(given.stride, axes), dilation, padding, "zeros", given.groups)
    return _convolution_step(call, weight, geometry)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(call: Call) -> Step:
    given = call.bind("input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1")
    weight = weight_of(call, given.weight)
    axes = weight.ndim - 2
    geometry = ConvolutionGeometry(
        kernel_size=tuple(weight.shape[2:]),
        stride=_each(given.stride, axes),
        dilation=_each(given.dilation, axes),
        padding=tuple((p, p) for p in _each(given.padding, axes)),
        groups=given.groups,
        transposed=True,
        output_padding=_each(given.output_padding, axes),
    )
    return _convolution_step(call, weight, geometry)


def _each(option: Any, axes: int) -> tuple[int, ...]:
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * axes if len(values) == 1 else values


def _convolution_step(call: Call, weight: Tensor, geometry: ConvolutionGeometry) -> Step:
    if len(call.input_shape) != weight.ndim:
        call.refuse("its input has no batch dimension, so the batch would be taken for channels", "keep the batch")
    source, geometry = _with_padding(call, geometry)
    size = tuple(source.shape[2:])
    convolution = ConvolutionMap(weight, geometry, size if call.sizes == "given" else None, size)
    bound = convolution.bound()
    if source is call.input:
        return Step(bound, map=convolution, is_linear=True)
    # The padding before it is part of the convolution.
    together = mul_up(call.values[source].bound, bound)
    return Step(bound, bound=together, map=convolution, path=Path(source, convolution), is_linear=True)


def _with_padding(call: Call, geometry: ConvolutionGeometry) -> tuple[Node, ConvolutionGeometry]:
    """The convolution and a padding right before it as one; and what that reads."""
    node = call.input
    if node.op != "pad" or geometry.transposed or any(map(any, geometry.padding)):
        return node, geometry
    given = Call(node, call.values, call.graph).bind("input, pad, mode='constant', value=None")
    pairs = [tuple(given.pad[at : at + 2]) for at in range(0, len(given.pad), 2)][::-1]
    if len(pairs) != geometry.num_axes or any(end < 0 for pair in pairs for end in pair):
        return node, geometry
    mode = "zeros" if given.mode == "constant" else given.mode
    return node.inputs[0], replace(geometry, padding=tuple(pairs), padding_mode=mode)


@rule("batch_norm")
def _batch_norm(call: Call) -> Step:
    # Every other function of the name takes the weight first.
    if call.node.function is F.batch_norm:
        signature = "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05"
    else:
        signature = "input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled"
    given = call.bind(signature)
    if given.training or given.running_var is None:
        call.refuse(
            "with the statistics of the batch it mixes samples and has no useful Lipschitz constant",
            "certify mode='eval' with running statistics, or use spectral normalization without it",
        )
    variance = call.constant(given.running_var)
    weight = torch.ones_like(variance) if given.weight is None else call.constant(given.weight)
    scale = weight / (variance + given.eps).sqrt()
    if not bool(scale.isfinite().all()):
        call.refuse("its scale is not finite", "load weights and statistics that are")
    if bool(((scale.abs() < sys.float_info.min) & (weight != 0)).any()):
        call.refuse("its scale is beyond the range of float64", "set weights that small to zero")
    # Three roundings: the sum (halved by the root), the root, the quotient.
    scaling = ScaleMap(scale, gamma(4))
    return Step(scaling.bound(), map=scaling, is_linear=True)
