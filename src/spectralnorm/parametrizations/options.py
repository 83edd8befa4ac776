"""The options of a normalization as keyword arguments, named, typed and checked once for all who take them.

What they mean, and what they are when they are left out, is told by `SpectralNorm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from torch import Tensor, nn

from spectralnorm.errors import UserError

__all__ = [
    "KeywordOptions",
    "Options",
    "check_dim",
    "check_options",
    "checked_input_size",
    "plain_value",
    "refuse_unknown",
    "require_module",
]

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
    iterations: Any = options.get("n_power_iterations", 1)
    if not (_is_integer(iterations) and iterations >= 1):
        raise UserError(f"n_power_iterations must be an integer of at least 1, got {iterations!r}.")
    for option in ("eps", "coefficient"):
        value: Any = options.get(option, 1.0)
        if not (_is_number(value) and 0 < value < math.inf):
            raise UserError(f"{option} must be a positive number, got {value!r}.")
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


def check_dim(dim: object) -> None:
    """Refuse what is no dimension of any weight.

    Raises:
        UserError: ``dim`` is neither None nor an integer.
    """
    if not (dim is None or _is_integer(dim)):
        raise UserError(f"dim must be None or an integer, the weight's output dimension, got {dim!r}.")


def checked_input_size(input_size: Any) -> tuple[int, ...] | None:
    """``input_size`` as a tuple.

    Raises:
        UserError: it is no sequence of one to three positive integers.
    """
    if input_size is None:
        return None
    is_one_of_sizes = isinstance(input_size, Sequence) and 1 <= len(input_size) <= 3
    if is_one_of_sizes and all(_is_integer(size) and size > 0 for size in input_size):
        return tuple(map(int, input_size))
    raise UserError(f"input_size must be None or one positive integer for each axis of the image, got {input_size!r}.")


def plain_value(option: str, value: Any) -> Any:
    """The checked ``value`` of an option, of Python's own type where it is a number of another library's."""
    kinds = {"n_power_iterations": int, "eps": float, "coefficient": float, "input_size": checked_input_size}
    return kinds[option](value) if option in kinds else value


def require_module(function: str, module: object) -> None:
    """Refuse what is no module.

    Raises:
        UserError: it is a class, or something else.
    """
    if isinstance(module, type):
        raise UserError(f"{function} takes a module, got the class {module.__name__}; make one of it first.")
    if not isinstance(module, nn.Module):
        hint = "; put layers into a torch.nn.ModuleList" if isinstance(module, (list, tuple)) else ""
        hint = "; give the layer whose weight it is" if isinstance(module, Tensor) else hint
        raise UserError(f"{function} takes a torch.nn.Module, got {type(module).__name__}{hint}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
