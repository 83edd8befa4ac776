"""What a run folder holds, read once into bounded memory; whatever is absent or broken is told, not fatal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectralnorm.errors import UserError
from spectralnorm.records import (
    Ending,
    Evaluation,
    Picture,
    Record,
    Scalars,
    Session,
    Spectra,
    read_records,
)
from spectralnorm.report.series import Curves

__all__ = ["Contents", "Sitting", "read_run"]


@dataclass
class Sitting:
    """One process that trained: how it began and, unless it was cut off, how it ended."""

    session: Session
    ending: Ending | None = None


@dataclass
class Contents:
    """The records of a run, sorted by what the report does with them."""

    folder: Path
    config: Mapping[str, Any]
    data: Mapping[str, Any] | None
    curves: Curves = field(default_factory=Curves)
    sittings: list[Sitting] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    pictures: dict[str, dict[str, Picture]] = field(default_factory=dict)
    """By role, then by file, so that a picture that was written anew counts once."""
    spectra: Spectra | None = None
    certificate: Mapping[str, Any] | None = None
    step: int = 0
    images_seen: int = 0
    training_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Sentences about what is missing or broken, for the reader."""

    @property
    def ending(self) -> Ending | None:
        """How the last process ended; None while it runs, and when it was cut off."""
        return self.sittings[-1].ending if self.sittings else None

    def picture(self, role: str) -> Picture | None:
        """The last picture of a role."""
        return next(reversed(self.pictures.get(role, {}).values()), None)


def read_run(folder: Path) -> Contents:
    """Read the records of a run folder.

    Raises:
        UserError: there is no such folder, or it is not the folder of a run.
    """
    if not folder.is_dir():
        raise UserError(f"No run folder at {folder}; give the folder that `spectralnorm train --out` wrote to.")
    contents = Contents(folder, _read_config(folder), None)
    try:
        data = _read_object(folder / "data.json")
        contents.data = data
        if data is None:
            contents.problems.append("data.json is not a table of facts about the data, so the data is not described.")
    except FileNotFoundError:
        contents.problems.append("data.json is absent, so the data is not described.")
    except (OSError, ValueError):
        contents.problems.append("data.json cannot be read, so the data is not described.")
    try:
        contents.certificate = _read_object(folder / "certificate.json")
        if contents.certificate is None:
            contents.problems.append("certificate.json is not a certificate, so no guarantee is shown.")
    except FileNotFoundError:
        pass  # written only when somebody asks for it
    except (OSError, ValueError):
        contents.problems.append("certificate.json cannot be read, so no guarantee is shown.")
    try:
        for record in read_records(folder / "metrics.jsonl"):
            _sort(contents, record)
    except FileNotFoundError:
        contents.problems.append("metrics.jsonl is absent: nothing has been recorded yet.")
    except (OSError, ValueError) as error:
        contents.problems.append(f"metrics.jsonl cannot be read to its end ({error}).")
    return contents


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = _read_object(folder / "config.json")
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no config.json; give one that train wrote.") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/config.json cannot be read ({reason}); give a folder that train wrote.") from error
    # Many programs write a config.json; each of ours names these.
    if config is None or not {"recipe", "architecture", "normalization"} <= config.keys():
        raise UserError(f"{folder}/config.json is not that of a run; give a folder that train wrote.")
    return config


def _read_object(path: Path) -> Mapping[str, Any] | None:
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else None


def _sort(contents: Contents, record: Record) -> None:
    match record:
        case Session():
            contents.sittings.append(Sitting(record))
        case Ending():
            if contents.sittings:
                contents.sittings[-1].ending = record
        case Scalars():
            contents.curves.add(
                step=record.step,
                images_seen=record.images_seen,
                seconds=record.training_seconds,
                values=record.values,
            )
        case Evaluation():
            contents.evaluations.append(record)
        case Picture():
            of_role = contents.pictures.setdefault(record.role, {})
            of_role.pop(record.file, None)
            of_role[record.file] = record
        case Spectra():
            contents.spectra = record
    contents.step = max(contents.step, record.step)
    if isinstance(record, Scalars | Evaluation | Ending):
        contents.images_seen = max(contents.images_seen, record.images_seen)
        contents.training_seconds = max(contents.training_seconds, record.training_seconds)
