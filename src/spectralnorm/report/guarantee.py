"""What the report says of a certificate: the bounds, and a bar for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

from spectralnorm.report.text import number_text

__all__ = ["Guarantee", "LayerBar", "guarantee"]

_DIGITS = 4  # that `number_text` shows


@dataclass(frozen=True)
class LayerBar:
    """One line of the certificate."""

    name: str
    operation: str
    lower: str
    upper: str
    product: str
    lower_percent: float
    upper_percent: float
    """Lengths of the bars, of the longest."""


@dataclass(frozen=True)
class Guarantee:
    """A certificate, as text."""

    upper: str
    lower: str
    layers: Sequence[LayerBar]
    weights: str
    seconds: str
    step: int | None
    """Of the run, if it is known."""


def guarantee(certificate: Mapping[str, Any]) -> Guarantee:
    """Read ``certificate.json``.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    layers = certificate["layers"]
    longest = max((float(layer["upper"]) for layer in layers if layer["upper"] is not None), default=0.0)
    return Guarantee(
        upper=number_text(_up(float(certificate["upper_bound"]))),
        lower=number_text(_down(float(certificate["lower_bound"]))),
        layers=[_bar(layer, longest) for layer in layers],
        weights=str(certificate["weights_sha256"])[:12],
        seconds=number_text(float(certificate["seconds"]), 3),
        step=int(certificate["step"]) if "step" in certificate else None,
    )


def _bar(layer: Mapping[str, Any], longest: float) -> LayerBar:
    lower, upper = (None if layer[side] is None else float(layer[side]) for side in ("lower", "upper"))
    return LayerBar(
        name=str(layer["name"]),
        operation=str(layer["op"]),
        lower="" if lower is None else number_text(_down(lower)),
        upper="" if upper is None else number_text(_up(upper)),
        product=number_text(_up(float(layer["product"]))),
        lower_percent=100 * lower / longest if lower is not None and longest else 0.0,
        upper_percent=100 * upper / longest if upper is not None and longest else 0.0,
    )


def _up(number: float) -> float:
    """Rounded up to the digits that are shown: a bound must not lose what proves it to the printer."""
    return _rounded(number, ROUND_CEILING)


def _down(number: float) -> float:
    """Rounded down to them, as a lower bound is."""
    return _rounded(number, ROUND_FLOOR)


def _rounded(number: float, rounding: str) -> float:
    # A float is a decimal number exactly, and one of so few digits is printed as it is.
    return float(Context(prec=_DIGITS, rounding=rounding).create_decimal_from_float(number))
