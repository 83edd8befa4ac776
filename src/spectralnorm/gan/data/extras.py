"""Packages that some kinds of data need and others do not."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from spectralnorm.errors import UserError

__all__ = ["import_extra"]


def import_extra(module: str, *, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        extra: of this package, under which it is installed.
        what: needs it, for the message, for example ``the Parquet file 'x.parquet'``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs the package {package}, which is not installed; "
            f"install it with: pip install 'spectralnorm[{extra}]'."
        ) from error
