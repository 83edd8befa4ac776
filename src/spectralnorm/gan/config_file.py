"""Settings from a file: TOML, YAML, or the JSON that a run and a dry run write.

A file holds any of the fields of `spectralnorm.gan.config.Config`, flat, one a line; ``recipe`` names the recipe that
the others replace settings of. What a format has no word for is written ``"none"``: TOML knows no null.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config

__all__ = ["overlay", "read_config_file"]


def read_config_file(file: str | Path) -> dict[str, Any]:
    """The settings that a file gives, each of the type of its field in `Config`; ranges are checked when one is built.

    Args:
        file: ``.toml``, ``.yaml`` or ``.yml`` (needs PyYAML), or ``.json``; UTF-8.

    Raises:
        UserError: the file cannot be read, is not of its format, or holds an unknown setting or one of the wrong type.
    """
    file = Path(file)
    if file.suffix not in _READERS:
        raise UserError(
            f"{file} must be a .toml, .yaml or .json file; rename it, or write the settings in one of them."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}); give --config a file of settings.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text in UTF-8 ({error.reason}); save it as UTF-8.") from error
    try:
        contents = _READERS[file.suffix](text)
    except UserError:
        raise
    except Exception as error:  # each reader has its own
        raise UserError(f"{file} is not valid {file.suffix[1:].upper()} ({_one_line(error)}); correct it.") from error
    if contents is None:  # an empty YAML file
        contents = {}
    if not isinstance(contents, Mapping):
        raise UserError(f"{file} must hold names and values of settings, got {type(contents).__name__}.")
    settings: dict[str, Any] = {}
    for key, value in contents.items():
        name = str(key).replace("-", "_")
        if name in settings:
            raise UserError(f"{file} gives {name} twice; leave one of the two out.")
        settings[name] = _value(file, name, value)
    return settings


def overlay(settings: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them; a budget that is given takes the place of the one below, not beside it."""
    given = {name for name in _BUDGET if above.get(name) is not None}
    return {**settings, **(dict.fromkeys(_BUDGET) if given else {}), **above}


_BUDGET = ("steps", "minutes")


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UserError(
            'A YAML file needs PyYAML; install it with: pip install "spectralnorm[yaml]", or write TOML.'
        ) from error
    return yaml.safe_load(text)


_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": json.loads,
}


def _value(file: Path, name: str, value: Any) -> Any:
    hints = get_type_hints(Config)
    names = [field.name for field in dataclasses.fields(Config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {near[0]}?" if near else "spectralnorm train --help lists the settings."
        what = "section" if isinstance(value, Mapping) else "setting"
        raise UserError(f"Unknown {what} '{name}' in {file}; {advice}")
    try:
        return _as(hints[name], value)
    except _WrongTypeError as error:
        raise UserError(f"{name} in {file} must be {error}, got {json.dumps(value, default=str)}.") from None


class _WrongTypeError(Exception):
    """Says what is expected."""


def _as(kind: Any, value: Any) -> Any:
    """A value as the type of its field; formats write the same number in several ways."""
    is_optional = get_origin(kind) in (Union, types.UnionType)
    if is_optional:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    or_none = " or none" if is_optional else ""
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_as(get_args(kind)[0], item) for item in value)
        raise _WrongTypeError(f"a list{or_none}")
    if kind is float and isinstance(value, str):
        # YAML takes 2e-4, without a point, for a word.
        try:
            value = float(value)
        except ValueError:
            raise _WrongTypeError(f"a number{or_none}") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is float:
            try:
                return float(value)
            except OverflowError:
                return math.inf  # refused by the range of the field
        if kind is int and (isinstance(value, int) or value.is_integer()):
            return int(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise _WrongTypeError(_IN_WORDS.get(kind, str(kind)) + or_none)


_IN_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark is not None else str(error)
    return " ".join(where.split()).rstrip(".")
