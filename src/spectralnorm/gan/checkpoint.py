"""Checkpoints that survive a kill, a full disk and a damaged file; safetensors, never pickles.

A checkpoint is one file. It is written under a temporary name, flushed to the disk and renamed, so its final name
never stands on half a file; its header carries a SHA-256 of all tensors, checked when it is read; the previous one
stays beside it, and the one before that is deleted only after the next is safely there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = [
    "Checkpoint",
    "has_checkpoint",
    "latest_checkpoint",
    "read_tensors",
    "save_checkpoint",
    "save_tensors",
    "under",
]

_NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    path: Path
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def save_checkpoint(folder: Path, *, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Path:
    """Write ``step-<step>.safetensors`` into a folder and drop all others but the one before it.

    Those of later steps are dropped too: a run goes on beneath them only because none of them is whole.

    Args:
        folder: made if absent.
        tensors: by name; on any device.
        numbers: anything JSON can hold; must have ``"step"``.

    Raises:
        OSError: the disk is full or the folder not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path = folder / f"step-{numbers['step']:09d}.safetensors"
    save_tensors(path, tensors, {"numbers": json.dumps(numbers), "sha256": _digest(tensors)})
    found = _newest_first(folder)
    kept = [file for file in found if file.name <= path.name][:_NUM_KEPT]
    for other in set(found).difference(kept):
        other.unlink()
    for half_written in folder.glob(".step-*.tmp"):  # by a process that was killed
        half_written.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; a damaged one is passed over for the one before it.

    Returns:
        None if the folder holds no checkpoint.

    Raises:
        UserError: none that it holds is whole, or the system does not let one be read, which says nothing of its state.
    """
    damages = []
    for path in _newest_first(folder):
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("sha256") == _digest(tensors):
                return Checkpoint(path, tensors, json.loads(metadata["numbers"]))
            damages.append(f"{path.name} (its tensors are not those that were written)")
        except (SafetensorError, KeyError, ValueError) as error:
            damages.append(f"{path.name} ({error})")
        except OSError as error:
            raise _unreadable(path, error) from error
    if damages:
        raise UserError(
            f"No checkpoint in {folder} is whole: {', '.join(damages)}; put a whole copy of one there, or train anew "
            "in another folder."
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds any checkpoint, be it whole or damaged.

    Raises:
        UserError: the system does not let the folder be read.
    """
    return bool(_newest_first(folder))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, on the CPU, and the strings of its header.

    Raises:
        OSError: it cannot be opened.
        SafetensorError: it is no such file, or damaged.
    """
    # The library says of any file that it cannot open that there is none.
    path.open("rb").close()
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that its final name never stands on half a file.

    Args:
        path: final name.
        tensors: contiguous, on the CPU, none sharing memory with another.
        metadata: strings for the header.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise _as_os_error(error, temporary) from error
        temporary.chmod(0o644)  # the library makes files that only their owner can read
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    # The library gives the system's error as text only: "... No space left on device (os error 28)".
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error), str(path))


def _newest_first(folder: Path) -> list[Path]:
    try:
        if _is_absent(folder):
            return []
        return sorted((path for path in folder.iterdir() if path.match("step-*.safetensors")), reverse=True)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_absent(path: Path) -> bool:
    """Whether nothing has that name, not even a link to what is not there; the system may fail to say."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    return False


def _unreadable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(
        f"Cannot read {path} ({reason}); see to its permissions and its disk, and run the same command again."
    )


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
