"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "count_text", "duration_text", "number_text"]


def number_text(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; what is absent or not finite is told in words.

    >>> number_text(0.0123456), number_text(1234567.0), number_text(float("nan")), number_text(-3.0)
    ('0.01235', '1,234,567', 'not finite', '−3')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-4:
        mantissa, _, exponent = f"{magnitude:.{digits - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e−{int(exponent[1:])}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(magnitude)))
        text = f"{magnitude:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"−{text}" if value < 0 else text


def count_text(value: float) -> str:
    """A whole number with thousands apart.

    >>> count_text(1234567)
    '1,234,567'
    """
    return f"{round(value):,}"


def duration_text(seconds: float) -> str:
    """A time in its two largest units.

    >>> duration_text(0.25), duration_text(42.3), duration_text(150), duration_text(11520), duration_text(200000)
    ('0.25 s', '42.3 s', '2 min 30 s', '3 h 12 min', '2 d 7 h')
    """
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{number_text(seconds, 3)} s"
    units = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
    unit, length, smaller, part = next(entry for entry in units if seconds >= entry[1])
    whole, rest = divmod(int(seconds), length)
    return f"{whole} {unit} {rest // part} {smaller}" if rest // part else f"{whole} {unit}"


def bytes_text(num_bytes: float) -> str:
    """A size in binary units.

    >>> bytes_text(512), bytes_text(3 * 2**30)
    ('512 B', '3 GiB')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{number_text(size, 3)} {unit}"
        size /= 1024
    return f"{number_text(size, 3)} TiB"
