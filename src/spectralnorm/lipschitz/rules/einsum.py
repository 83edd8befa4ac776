"""Sums of products with a fixed weight, as einsum writes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectralnorm.linalg.rigorous import rigorous_largest_norm
from spectralnorm.lipschitz.graph import Node
from spectralnorm.lipschitz.maps import DenseMap
from spectralnorm.lipschitz.registry import Call, Step, rule
from spectralnorm.lipschitz.rules.layers import weight_of
from spectralnorm.lipschitz.upward import mul_up, root_up

__all__: list[str] = []


@rule("einsum")
def _einsum(call: Call) -> Step:
    """Of x alone, or of x and one weight W.

    With letters sorted by where they stand (in x, in W, in the result), the map is a matrix of W, rows by the letters
    of W and the result, columns by those of W and x, one such matrix for each value of the letters of all three; and a
    sum over the letters of x alone, which has the norm sqrt(n). A letter that has the size 1 in one of x and W and
    another in the other is repeated there, as if it did not stand there.
    """
    term, weight, weight_term, result = _operands(call)
    if term[0] in weight_term or result[:1] != term[:1]:
        call.refuse("it works along the batch, and so mixes samples", "keep the batch first, and out of the weight")
    sizes = dict(zip(term, call.input_shape, strict=True))
    is_flat = len(term) == len(result) == 2
    if weight is not None:
        repeated = [x for x, n in zip(weight_term, weight.shape, strict=True) if x in term and n != sizes[x]]
        term = "".join(x for x in term if x not in repeated or sizes[x] != 1)
        weight = weight.squeeze([at for at, x in enumerate(weight_term) if x in repeated and weight.shape[at] == 1])
        weight_term = "".join(x for x in weight_term if x not in repeated or sizes[x] == 1)
        if any(x not in term + result for x in weight_term):
            call.refuse("it sums a weight alone", "sum it before")
    summed = math.prod(sizes[letter] for letter in term if letter not in weight_term + result)
    factor = root_up(float(summed))
    if weight is None:
        return Step(factor, is_linear=True)
    shared = [letter for letter in weight_term if letter in term and letter in result]
    rows = [letter for letter in weight_term if letter not in term]
    columns = [letter for letter in weight_term if letter in term and letter not in result]
    ordered = weight.permute([weight_term.index(letter) for letter in (*shared, *rows, *columns)])
    matrices = ordered.reshape(
        math.prod(ordered.shape[: len(shared)]),
        math.prod(ordered.shape[len(shared) : len(shared) + len(rows)]),
        math.prod(ordered.shape[len(shared) + len(rows) :]),
    )
    norm = mul_up(factor, rigorous_largest_norm(matrices))
    is_dense = is_flat and len(columns) == len(rows) == 1
    return Step(norm, map=DenseMap(matrices[0]) if is_dense else None, is_linear=True)


def _operands(call: Call) -> tuple[str, Tensor | None, str, str]:
    """The letters of the input, the weight with its own, and those of the result."""
    equation, *given = call.node.args
    operands: list[Any] = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        call.refuse("its equation is not written out", "give the letters of all operands and of the result as text")
    terms, result = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    if len(call.inputs) != 1:
        call.refuse(
            "it multiplies values that all depend on the input, which has no Lipschitz constant for inputs of any "
            "length",
            "multiply by constants",
        )
    if len(operands) > 2:
        call.refuse("it has several weights", "multiply them before")
    if any(len(set(each)) < len(each) for each in (*letters, result)):
        call.refuse("it takes a diagonal", "write it out")
    position = next(at for at, operand in enumerate(operands) if isinstance(operand, Node))
    if len(operands) == 1:
        return letters[0], None, "", result
    other = 1 - position
    weight, term = weight_of(call, operands[other]), letters[other]
    return letters[position], weight.to(torch.float64), term, result
