"""Options from the command line into dataclasses, with one line for a slip."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from spectralnorm.errors import UserError

__all__ = ["parse"]

T = TypeVar("T")

_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def parse(
    options: type[T],
    words: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None = None,
    epilog: str = "",
) -> T:
    """Fill a dataclass of options.

    Args:
        options: a dataclass; its fields become flags, its docstrings help.
        words: the command line after the command.
        prog: the command, for its help page.
        default: values of the flags that are not given.
        description: of the command; None: the docstring of the dataclass.
        epilog: stands below the help page.

    Raises:
        UserError: a flag is unknown (the nearest known ones are named), or its value cannot be read.
    """
    settings: dict[str, Any] = {} if default is None else {"default": default}
    output = io.StringIO()
    try:
        # tyro explains a slip in a box of many lines on standard error; ours is one line.
        with contextlib.redirect_stderr(output):
            parsed, unknown = tyro.cli(
                options, args=list(words), prog=prog, description=description, return_unknown_args=True, **settings
            )
    except SystemExit as stop:
        if not stop.code:
            if epilog:
                print(epilog)
            raise
        raise UserError(f"{_one_sentence(output.getvalue())}; see {prog} --help.") from None
    if unknown:
        raise UserError(_unknown(unknown[0], options, prog))
    return parsed


def _unknown(word: str, options: Any, prog: str) -> str:
    if not word.startswith("-"):
        return f"Unexpected argument '{word}'; see {prog} --help."
    flag = word.partition("=")[0]
    known = sorted(_flags(options))
    near = difflib.get_close_matches(flag, known, n=1)
    if not known:
        return f"Unknown option '{flag}'; {prog} has none besides --help."
    advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}."
    return f"Unknown option '{flag}'; {advice}"


def _flags(options: Any) -> list[str]:
    flags = []
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(kind):
            flags += _flags(kind)
        elif tyro.conf.Positional not in marks:
            own = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
            flags.append("--" + own.replace("_", "-"))
    return flags


def _one_sentence(box: str) -> str:
    """What tyro says in its box, on one line, without its frame and without its own vocabulary."""
    lines: list[str] = []
    in_body = False
    for line in box.splitlines():
        text = line.strip(" │|")
        is_rule = re.search("[─-]{3}", text) is not None
        if in_body and lines and (is_rule or not text):
            break
        if is_rule:  # what stood above the first one was the title
            in_body = True
            lines.clear()
        elif text:
            lines.append(text)
    sentence = " ".join(lines).rstrip(".") or "The options cannot be read"
    if sentence.startswith("Error parsing config: "):  # one of our own checks, in our own words
        return sentence.removeprefix("Error parsing config: ")
    if missing := re.match(r"Missing value for argument '(\S+?)'", sentence):
        return f"{missing[1]} needs a value"
    if missing := re.match(r"Missing from (.+?): ([A-Z]+) (.)(.+?)\.? \(required\)$", sentence):
        return f"{missing[1]} needs {missing[2]}: {missing[3].lower()}{missing[4]}"
    value = re.match(r"Error parsing (--\S+): .*?'([^']*)'\]?$", sentence)
    if value is None:
        return sentence
    shown = re.search(rf"{value[1]} \S*?(INT|FLOAT)\b", box)  # its line of the help page, which stands in the box
    return f"{value[1]} must be {_KINDS[shown[1]]}, got '{value[2]}'" if shown else f"{value[1]} cannot be '{value[2]}'"
