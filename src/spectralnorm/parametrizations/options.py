"""The options of a normalization as keyword arguments, named, typed and checked once for all who take them.

What they mean, and what they are when they are left out, is told by `SpectralNorm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Generic, TypedDict, TypeVar, Unpack

from spectralnorm.errors import UserError
from spectralnorm.parametrizations.image_size import checked_input_size

__all__ = ["KeywordOptions", "Options", "check_options", "refuse_unknown"]

_NORMS = ("matrix", "operator", "bidirectional")
_MODES = ("normalize", "cap", "learnable")
_UPDATES = ("step", "forward", "manual")

Coefficient = TypeVar("Coefficient")


class KeywordOptions(TypedDict, Generic[Coefficient], total=False):
    """Options that torch's signature has no place for."""

    norm: str
    mode: str
    coefficient: Coefficient
    strict: bool
    input_size: tuple[int, ...] | None
    update: str


class Options(KeywordOptions[Coefficient], total=False):
    """All options that a whole model can share: of `SpectralNorm`'s arguments those that name no single weight."""

    n_power_iterations: int
    eps: float
    update: str  # again: pyright takes an inherited "update" for dict's method


def refuse_unknown(function: str, options: Mapping[str, object], known: Iterable[str] = ()) -> None:
    """As Python does for arguments, also where no weight would have been reached by them.

    Raises:
        TypeError: a name is not that of an option.
    """
    for name in options:
        if name not in Options.__annotations__ and name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_options(**options: Unpack[Options[float]]) -> None:
    """Refuse a value that is not offered.

    Raises:
        UserError: one of the ``options`` has it.
    """
    if (iterations := options.get("n_power_iterations", 1)) < 1:
        raise UserError(f"n_power_iterations must be at least 1, got {iterations}.")
    if not (eps := options.get("eps", 1)) > 0:
        raise UserError(f"eps must be a positive number, got {eps}.")
    coefficient = options.get("coefficient", 1.0)
    if not (isinstance(coefficient, (int, float)) and 0 < coefficient < math.inf):
        raise UserError(f"coefficient must be a positive number, got {coefficient!r}.")
    for option, choices in (("norm", _NORMS), ("mode", _MODES), ("update", _UPDATES)):
        if option in options:
            _require_choice(option, options[option], choices)
    checked_input_size(options.get("input_size"))
    if not isinstance(strict := options.get("strict", False), bool):
        raise UserError(f"strict must be True or False, got {strict!r}.")
    for option, value in (("norm", "bidirectional"), ("mode", "learnable")):
        if strict and options.get(option) == value:
            raise UserError(
                f'strict=True is not offered together with {option}="{value}", for which there is no guaranteed '
                "bound; leave one of them out."
            )


def _require_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
