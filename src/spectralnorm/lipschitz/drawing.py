"""A certificate as a picture: the bounds of each layer, and the product up to there. SVG, written without a library."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from spectralnorm.lipschitz.text import text_above, text_below

if TYPE_CHECKING:
    from spectralnorm.lipschitz.certificate import Certificate, LayerBound

__all__ = ["drawn"]

_ROW, _TOP, _BAR = 22, 84, 13
_NAMES, _WIDTH, _GAP, _RIGHT = 190, 300, 80, 70
_UPPER, _LOWER, _PRODUCT, _INK, _GRID = "#9db7e8", "#2f5aa8", "#c2571a", "#222222", "#dddddd"
_LONGEST = 24  # letters of a name that is shown


def drawn(certificate: Certificate) -> str:
    """The text of an SVG file.

    Args:
        certificate: with at least the network's bound; each layer gets a row.
    """
    layers = certificate.layers
    bottom = _TOP + _ROW * max(1, len(layers))
    second = _NAMES + _WIDTH + _GAP
    width, height = second + _WIDTH + _RIGHT, bottom + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(
            12,
            24,
            f"Lipschitz constant at most {text_above(certificate.upper_bound)}, "
            f"at least {text_below(certificate.lower_bound)}",
            16,
        ),
        _text(12, 44, f"{certificate.mode} mode, inputs {'x'.join(map(str, certificate.input_shape))}, 2-norm"),
        _text(_NAMES, _TOP - 18, "each layer: upper bound, and lower bound inside"),
        _text(second, _TOP - 18, "product up to each layer, at most (log scale)"),
        *_bars(layers, bottom),
        *_products(layers, second, bottom),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(layers: tuple[LayerBound, ...], bottom: int) -> list[str]:
    largest = max([layer.upper for layer in layers if layer.upper is not None], default=1.0) or 1.0
    scale = _WIDTH / (1.08 * largest)
    parts = []
    for tick in _ticks(largest):
        parts += _tick(_NAMES + scale * tick, bottom, f"{tick:g}")
    for row, layer in enumerate(layers):
        y = _TOP + _ROW * row
        name = layer.name if len(layer.name) <= _LONGEST else "..." + layer.name[3 - _LONGEST :]
        parts.append(_text(_NAMES - 8, y + 11, name, anchor="end"))
        if layer.upper is None:
            parts.append(_text(_NAMES + 4, y + 11, "joins branches", 10, fill="#777777"))
            continue
        parts.append(_bar(_NAMES, y, scale * layer.upper, _UPPER, f"{layer.name}: at most {text_above(layer.upper)}"))
        if layer.lower is not None:
            parts.append(
                _bar(
                    _NAMES,
                    y + 4,
                    scale * layer.lower,
                    _LOWER,
                    f"{layer.name}: at least {text_below(layer.lower)}",
                    _BAR - 8,
                )
            )
        parts.append(_text(_NAMES + scale * layer.upper + 4, y + 11, text_above(layer.upper, 3), 10))
    return parts


def _products(layers: tuple[LayerBound, ...], left: int, bottom: int) -> list[str]:
    values = [layer.product for layer in layers]
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    # The axis shows one, where the input starts, and ends on whole powers of ten.
    low, high = math.floor(min(0.0, *logs)), math.ceil(max(0.0, *logs))
    high = max(high, low + 1)
    scale = _WIDTH / (high - low)
    step = math.ceil((high - low) / 6)
    parts = []
    for power in range(low, high + 1, step):
        parts += _tick(left + scale * (power - low), bottom, f"{10.0**power:g}")
    points = [(left + scale * (0 - low), float(_TOP - 6))]
    for row, value in enumerate(values):
        if 0 < value < math.inf:
            points.append((left + scale * (math.log10(value) - low), _TOP + _ROW * row + _BAR / 2))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{_PRODUCT}" stroke-width="1.5"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_PRODUCT}"/>' for x, y in points[1:]]
    if values:
        parts.append(_text(points[-1][0] + 7, points[-1][1] + 4, text_above(values[-1], 4), 10))
    return parts


def _ticks(largest: float) -> list[float]:
    """Four to eight round numbers from zero to ``largest``."""
    step = 10.0 ** math.floor(math.log10(largest / 2)) if 0 < largest < math.inf else 1.0
    step *= next((factor for factor in (1, 2, 5) if largest / (step * factor) <= 6), 10)
    return [round(step * index, 12) for index in range(int(largest / step) + 1)]


def _tick(x: float, bottom: int, label: str) -> list[str]:
    line = f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{_GRID}"/>'
    return [line, _text(x, bottom + 18, label, anchor="middle")]


def _bar(x: float, y: float, length: float, color: str, title: str, height: int = _BAR) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="{height}"'
    return f'<rect {place} fill="{color}"><title>{escape(title)}</title></rect>'


def _text(x: float, y: float, text: str, size: int = 12, *, anchor: str = "start", fill: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
