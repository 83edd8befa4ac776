"""Curves of a benchmark as a picture, without a plotting library."""

import math

__all__ = ["drawing"]

_LABEL = 34  # what a label of the horizontal axis takes, in pixels


def drawing(curves, colours, *, of):
    """One panel for each title, both axes logarithmic, as SVG.

    Args:
        curves: points ``(x, y)`` by title, ``"axis (more)"``, and by name of the line.
        colours: of the lines, by name.
        of: what the vertical axis shows.
    """
    width, height, top = 230, 200, 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {330 * len(curves)} 300" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{330 * len(curves)}" height="300" fill="white"/>',
    ]
    for panel, (title, lines) in enumerate(curves.items()):
        left = 60 + 330 * panel
        values = [(math.log2(x), math.log10(y)) for line in lines.values() for x, y in line]
        (x0, x1), (y0, y1) = ((min(each), max(each)) for each in zip(*values, strict=True))
        y0, y1 = math.floor(2 * y0) / 2, math.ceil(2 * y1) / 2

        def place(x, y, left=left, x0=x0, x1=x1, y0=y0, y1=y1):
            across = (math.log2(x) - x0) / max(x1 - x0, 1e-9)
            return left + width * across, top + height * (1 - (math.log10(y) - y0) / max(y1 - y0, 1e-9))

        for half in range(round(2 * y0), round(2 * y1) + 1):
            y = place(2**x0, 10 ** (half / 2))[1]
            parts.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{_short(10 ** (half / 2))}</text>')
        for name, line in lines.items():
            places = [place(*point) for point in line]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in places]
        for row, (name, colour) in enumerate(colours.items()):
            parts.append(f'<text x="{left + width - 50}" y="{top + 14 + 15 * row}" fill="{colour}">{name}</text>')
        free = left - _LABEL
        for x, _ in next(iter(lines.values())):
            across = place(x, 10**y0)[0]
            if across >= free + _LABEL:  # where there is room beside the last label
                parts.append(f'<text x="{across:.0f}" y="248" text-anchor="middle">{_short(x)}</text>')
                free = across
        axis, _, network = title.partition(" (")
        for y, text in ((268, f"{of} against {axis}"), (284, network.rstrip(")"))):
            parts.append(f'<text x="{left + width / 2}" y="{y}" text-anchor="middle">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _short(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
