"""A name with options in one word: ``spectral:norm=operator,coefficient=2`` or ``rmsprop:alpha=0.9``."""

from __future__ import annotations

from typing import NamedTuple

from spectralnorm.errors import UserError

__all__ = ["Spec", "parse_spec"]

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
