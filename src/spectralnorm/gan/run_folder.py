"""The folder of a run: whose it is, whether a run may go on in it, and one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, config_from_json, config_to_json, differing_lines
from spectralnorm.records import replace_text

__all__ = ["CHECKPOINTS", "CONFIG_FILE", "DATA_FILE", "RECORDS_FILE", "claim", "default_folder", "locked"]

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
RECORDS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_LOCK_FILE = ".lock"


def default_folder(config: Config) -> Path:
    """``runs/<recipe>`` for the built-in images, ``runs/<name of the data>`` for one's own."""
    own = Path(config.data).resolve().name.partition(".")[0] if config.data is not None else ""
    return Path("runs") / (own or config.recipe)


def claim(folder: Path, config: Config) -> None:
    """Make a folder this run's own, or check that it already is.

    Args:
        folder: made if absent; empty, or the folder of a run with the same settings.
        config: what is to be trained; written to ``config.json``.

    Raises:
        UserError: the folder cannot be written, belongs to something else, or holds a run with other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
        config_file = folder / CONFIG_FILE
        contents = {path.name for path in folder.iterdir()} - {_LOCK_FILE}
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}); choose another --out.") from error
    if contents and not config_file.exists():
        raise UserError(f"{folder} is not empty and is not a run folder; choose another --out.")
    if config_file.exists():
        lines = differing_lines(config_from_json(config_file.read_text(encoding="utf-8")), config)
        if lines:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(lines)}); repeat its settings to resume it, "
                "or choose another --out."
            )
    replace_text(config_file, config_to_json(config))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training in the same, claimed folder.

    Raises:
        UserError: another process trains there.
    """
    with (folder / _LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another process is training in {folder}; wait for it, or choose another --out."
            ) from error
        yield
