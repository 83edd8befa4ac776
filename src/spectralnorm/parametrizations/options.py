"""The options of a normalization as keyword arguments, named and typed once for all who take them.

What they mean, and what they are when they are left out, is told by `SpectralNorm`, which alone checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypedDict, TypeVar

__all__ = ["KeywordOptions", "Options", "refuse_unknown"]

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
