"""A name with options in one word: ``spectral:norm=operator,coefficient=2`` or ``rmsprop:alpha=0.9``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from spectralnorm.errors import UserError

__all__ = ["Spec", "check_kinds", "parse_spec"]

Value = bool | int | float | str | tuple[float, ...] | None
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


class Spec(NamedTuple):
    """What such a word says."""

    name: str
    options: dict[str, Value]


def parse_spec(setting: str, text: str) -> Spec:
    """Read ``name`` or ``name:option=value,option=value``.

    Values are ``true``, ``false``, ``none``, numbers, several numbers with slashes (``0.9/0.95``), or else words.

    >>> parse_spec("optimizer", "sgd:momentum=0.9,nesterov=true")
    Spec(name='sgd', options={'momentum': 0.9, 'nesterov': True})

    Args:
        setting: the name of the setting, for the message.
        text: what the user wrote.

    Raises:
        UserError: it is not of that form, or an option is given twice.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Value] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not key or not equals or not value:
            raise UserError(f"{setting} must read name or name:option=value,option=value, got '{text}'.")
        key = key.replace("-", "_")
        if key in options:
            raise UserError(f"{setting} gives the option {key} twice: '{text}'.")
        options[key] = _value(value)
    return Spec(name.strip(), options)


def check_kinds(setting: str, spec: Spec, parameters: Mapping[str, inspect.Parameter]) -> None:
    """See that each option is of the kind that the parameter of its name has by default.

    Args:
        setting: the name of the setting, for the message.
        spec: what the user wrote; its options are among the parameters.
        parameters: of what takes the options. Where one has no default, or None, nothing is checked.

    Raises:
        UserError: a number is no number, several are one, or true and false are something else.
    """
    for option, value in spec.options.items():
        expected = _expected(parameters[option], value)
        if expected is not None:
            raise UserError(f"{setting} '{spec.name}': {option} must be {expected}, got {value!r}.")


def _expected(parameter: inspect.Parameter, value: Value) -> str | None:
    """What was expected in place of a value; None: the value will do."""
    default: Any = parameter.default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        if parameter.annotation in (int, "int"):
            return None if is_number and isinstance(value, int) else "a whole number"
        return None if is_number else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, tuple) and len(value) == len(default)
        return None if fits else f"{len(default)} numbers, such as {'/'.join(map(str, default))}"
    return None


def _value(word: str) -> Value:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        if "/" in word:
            return tuple(float(part) for part in word.split("/"))
        number = float(word)
    except ValueError:
        return word
    return int(word) if word.lstrip("+-").isdigit() else number
