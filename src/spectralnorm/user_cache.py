"""Where what was made once is kept for the next time."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """The folder for one kind of things: in ``$SPECTRALNORM_CACHE``, else in the user's cache folder.

    Raises:
        OSError: the user has no home.
    """
    own = os.environ.get("SPECTRALNORM_CACHE")
    if own:
        return Path(own) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "spectralnorm" / kind
    except RuntimeError as error:
        raise OSError(f"no folder to keep things in ({error}); set SPECTRALNORM_CACHE to one") from error
