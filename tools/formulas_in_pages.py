"""Formulas of the documentation as MathML, which browsers draw by themselves: a hook of MkDocs.

The pages need no script from elsewhere then, and open from disk. `pymdownx.arithmatex` finds the formulas.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content, page=None, **_):
    """The page with its formulas drawn.

    Raises:
        ValueError: one of them has something that is not known, which would be shown as it was typed.
    """
    return _FORMULA.sub(lambda found: _drawn(html.unescape(found[3]), found[2] == "[", page), content)


def _drawn(formula, is_display, page):
    drawn = convert(formula.strip(), display="block" if is_display else "inline")
    if "\\" in drawn:
        raise ValueError(f"{page}: the formula {formula.strip()!r} has a command that latex2mathml does not know.")
    return f"<div>{drawn}</div>" if is_display else drawn
