"""Bounds as people read them: rounded to a few digits without losing what proves them."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

__all__ = ["text_above", "text_below"]


def text_above(value: float, digits: int = 6) -> str:
    """``value`` with so many significant digits, never less than it is.

    >>> text_above(1.0000001), text_above(0.5), text_above(123456789.0, 3)
    ('1.00001', '0.5', '1.24e+8')
    """
    return _rounded(value, digits, ROUND_CEILING)


def text_below(value: float, digits: int = 6) -> str:
    """``value`` with so many significant digits, never more than it is.

    >>> text_below(0.9999999), text_below(2.0)
    ('0.999999', '2')
    """
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value)
    # A float is a decimal number exactly, so this rounds once.
    number = Context(prec=digits, rounding=rounding).create_decimal_from_float(value).normalize()
    if number == 0:
        return "0"
    return f"{number:f}" if -5 < number.adjusted() < digits else f"{number:e}"
