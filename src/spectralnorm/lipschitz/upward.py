"""Arithmetic of floats that are not negative, rounded so that the result is never below the exact one.

No result is a denormal number, which may count as zero: it is the least normal one then.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

__all__ = ["add_up", "ldexp_up", "mul_up", "root_of_sum_up", "root_up"]


def _up(number: float) -> float:
    return max(math.nextafter(number, math.inf), sys.float_info.min)


def mul_up(*factors: float) -> float:
    """Their product; zero where one is zero, also beside infinity."""
    if any(factor == 0 for factor in factors):
        return 0.0
    product = 1.0
    for factor in factors:
        # A factor of one is exact, and most activations have it.
        if product == 1:
            product = factor
        elif factor != 1:
            product = _up(product * factor)
    return product


def add_up(*terms: float) -> float:
    """Their sum."""
    total = 0.0
    for term in terms:
        total = term if total == 0 else total if term == 0 else _up(total + term)
    return total


def ldexp_up(number: float, exponent: int) -> float:
    """It times 2 to an integer power."""
    try:
        scaled = math.ldexp(number, exponent)
    except OverflowError:
        return math.inf
    # Nothing else is rounded.
    return scaled if scaled >= sys.float_info.min or number == 0 else _up(scaled)


def root_up(number: float) -> float:
    """Its square root."""
    root = math.sqrt(number)
    # Whether the root is exact: for integers, the most frequent case, this is.
    return root if root < 2**26 and root.is_integer() and root * root == number else _up(root)


def root_of_sum_up(numbers: Iterable[float]) -> float:
    """The length of the vector that has these entries: sqrt(sum of squares)."""
    length = 0.0
    for number in numbers:
        # math.hypot is correct to less than one unit in the last place (CPython 3.10 and later).
        length = number if length == 0 else length if number == 0 else _up(_up(math.hypot(length, number)))
    return length
