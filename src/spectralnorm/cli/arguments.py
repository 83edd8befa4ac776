"""Options from the command line into dataclasses, with one line for a slip."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import types
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from spectralnorm.errors import UserError

__all__ = ["field_docs", "metavar_of", "parse"]

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

    A flag that may have no value takes ``none`` for that.

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
    shown = _with_nones_told(options) if default is None else options
    output = io.StringIO()
    try:
        # tyro explains a slip in a box of many lines on standard error; ours is one line.
        with contextlib.redirect_stderr(output):
            parsed, unknown = tyro.cli(
                shown,
                args=_with_nones_read(words, options),
                prog=prog,
                description=description,
                return_unknown_args=True,
                **settings,
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


def _flags(options: Any) -> dict[str, Any]:
    """The flags of a dataclass and of those in it, and what each of them takes."""
    flags: dict[str, Any] = {}
    for field, kind, marks in _parts(options):
        if dataclasses.is_dataclass(kind):
            flags |= _flags(kind)
        elif tyro.conf.Positional not in marks:
            flags[_flag(field, marks)] = kind
    return flags


def _parts(options: Any) -> Iterator[tuple[dataclasses.Field[Any], Any, list[Any]]]:
    """Each field, its type, and what else is annotated."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        yield field, kind, marks


def _flag(field: dataclasses.Field[Any], marks: Sequence[Any]) -> str:
    own = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
    return "--" + own.replace("_", "-")


def _with_nones_told(options: type[T]) -> type[T]:
    """The same with flags that may have no value shown as the others, where the parser's own words are its types."""
    docs, fields = field_docs(options), []
    for field, kind, marks in _parts(options):
        if _is_optional(kind) and field.default is None and tyro.conf.Positional not in marks:
            name = _flag(field, marks).removeprefix("--")
            told = tyro.conf.arg(
                name=name, metavar=metavar_of(kind), help=docs[field.name], help_behavior_hint="(default: none)"
            )
            fields.append((field.name, Annotated[kind, told], None))
    namespace = {"__doc__": options.__doc__}
    return dataclasses.make_dataclass(options.__name__, fields, bases=(options,), frozen=True, namespace=namespace)


def _with_nones_read(words: Sequence[str], options: Any) -> list[str]:
    """Let "none" mean the absence of a value where a flag may have none; the parser's word for that is "None"."""
    flags, replaced = [flag for flag, kind in _flags(options).items() if _is_optional(kind)], list(words)
    for position, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in flags and value == "none":
            replaced[position] = f"{flag}=None"
        elif word == "none" and position and words[position - 1] in flags:
            replaced[position] = "None"
    return replaced


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and types.NoneType in get_args(kind)


def metavar_of(kind: Any) -> str | None:
    """What stands behind a flag on a help page for what it takes; None: the parser's own word."""
    if _is_optional(kind):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    return {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}.get(kind)


def field_docs(kind: type) -> dict[str, str]:
    """What stands under each field of a dataclass, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    docs = {}
    for field, text in pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


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
