"""The folder of a run: whose it is, whether a run may go on in it, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, config_from_json, config_to_json, differing_lines
from spectralnorm.records import replace_text

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "DATA_FILE",
    "RECORDS_FILE",
    "check",
    "claimed",
    "default_folder",
    "locked",
    "recorded_data",
    "write_config",
]

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
RECORDS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_LOCK_FILE = ".lock"
# What a kill while the folder was being claimed leaves behind: nobody's work, and no reason to refuse it.
_REMAINS = {_LOCK_FILE, f".{CONFIG_FILE}.tmp"}


def default_folder(config: Config) -> Path:
    """``runs/<recipe>`` for the built-in images, ``runs/<name of the data>`` for one's own."""
    own = Path(config.data).resolve().name.partition(".")[0] if config.data is not None else ""
    return Path("runs") / (own or config.recipe)


def check(folder: Path, config: Config) -> None:
    """Check that a run may begin, or go on, in a folder; changes nothing.

    Args:
        folder: absent, empty, or the folder of a run with the same settings, or of one that has saved nothing yet.
        config: what is to be trained.

    Raises:
        UserError: the folder cannot be read, belongs to something else, or holds a run with other settings.
    """
    config_file = folder / CONFIG_FILE
    try:
        contents = {path.name for path in folder.iterdir()} - _REMAINS if folder.exists() else set()
    except OSError as error:
        raise UserError(f"Cannot use {folder} as a run folder ({error.strerror}); choose another --out.") from error
    if contents and not config_file.exists():
        raise UserError(f"{folder} is not empty and is not a run folder; choose another --out.")
    if config_file.exists() and _holds_weights(folder):
        lines = differing_lines(config_from_json(config_file.read_text(encoding="utf-8")), config)
        if lines:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(lines)}); repeat its settings to resume it, "
                "or choose another --out."
            )


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Make a folder this process's alone; what it holds stays as it is.

    Raises:
        UserError: the folder cannot be written, another process trains there, or one has since it was checked.
    """
    with ExitStack() as held:
        with _refusal_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
            # Nobody else writes there now; but somebody may have, between the first check and the lock.
            check(folder, config)
        yield


def write_config(folder: Path, config: Config) -> None:
    """Write ``config.json``: what has been claimed is this run's own from now on.

    Raises:
        UserError: the folder cannot be written.
    """
    with _refusal_told(folder):
        replace_text(folder / CONFIG_FILE, config_to_json(config))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training in the same folder, which exists.

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


def recorded_data(folder: Path) -> dict[str, Any]:
    """What ``data.json`` says of the images that a run was trained on; {} where it says nothing, or none was saved."""
    try:
        said = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and _holds_weights(folder) else {}


def _holds_weights(folder: Path) -> bool:
    # Here, and not above: both come with torch, and a help page needs none of it.
    from spectralnorm.gan.checkpoint import has_checkpoint
    from spectralnorm.gan.sampling import GENERATOR_FILE

    return has_checkpoint(folder / CHECKPOINTS) or (folder / GENERATOR_FILE).exists()


@contextmanager
def _refusal_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"Cannot write to {folder} ({error.strerror}); choose another --out.") from error
