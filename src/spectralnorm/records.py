"""Typed records of a training run, written as JSON lines while it trains and read back by the report.

Each line of ``metrics.jsonl`` is one record: a JSON object whose ``kind`` names the class below. Nothing here needs
a model, torch or a GPU, so a run folder stays readable anywhere, also without this package.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

__all__ = [
    "Ending",
    "Evaluation",
    "Metric",
    "Picture",
    "Provenance",
    "Record",
    "RecordFile",
    "Scalars",
    "Session",
    "Spectra",
    "latest_evaluation",
    "metric_fields",
    "read_records",
    "replace_text",
]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of the training process: the first, or one that resumed."""

    kind: ClassVar[str] = "session"
    step: int
    """Generator updates done when the process began; 0 for a fresh run."""
    started_at: str
    """Local time, ISO 8601 with the offset."""
    command: str
    versions: Mapping[str, str]
    hardware: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """Numbers logged at one step.

    Names: ``loss/discriminator``, ``loss/generator``, ``logits/real``, ``logits/fake``,
    ``gradient_norm/discriminator``, ``gradient_norm/generator``, ``images_per_second``, and ``sigma/<layer>``, the
    largest singular value of the raw weight. Where the settings ask for them: ``penalty/discriminator``,
    ``penalty/orthonormal``, ``penalty/path_length`` (before they are weighted), and ``augmentation_probability``, which
    ADA adapts. Once in a session of compiled networks: ``seconds/first_step``, most of which is compiling.
    """

    kind: ClassVar[str] = "scalars"
    step: int
    images_seen: int
    training_seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a metric's number comes from; two numbers compare only if these agree."""

    extractor: str
    weights_sha256: str
    num_real: int
    num_fake: int
    split: str
    """Which real images: for example ``held-out``."""
    resize: str
    """How images were brought to the extractor's size: for example ``bilinear, antialiased, 32 -> 128``."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number about generated images, with everything needed to judge it."""

    name: str
    value: float
    spread: float | None = None
    """Standard deviation over subsets, for metrics that are means over subsets."""
    interval: tuple[float, float] | None = None
    """Where other draws of as many images would put the number, with 95 % confidence; None: not computed."""
    floor: float | None = None
    """The same metric of real images that stand in for generated ones, as many as these but at most half of all, and
    are compared with the others: what a perfect generator would score. None: they were too few, or it has none."""
    better: str = "lower"
    """``lower``, ``higher`` or ``near 1``."""
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Parts of the number: for class coverage, the share of each class."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics computed at one step."""

    kind: ClassVar[str] = "evaluation"
    step: int
    images_seen: int
    training_seconds: float
    final: bool
    metrics: Sequence[Metric]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG in the run folder: a grid of ``rows`` x ``columns`` tiles of ``tile_height`` x ``tile_width`` pixels."""

    kind: ClassVar[str] = "picture"
    step: int
    role: str
    """``samples`` (over training), ``final`` (the last, large grid), ``neighbours`` (row 1: samples, row 2: the nearest
    training image of each), ``interpolation`` (each row a walk between two latents), ``real`` (training images)."""
    file: str
    """Path relative to the run folder, with forward slashes."""
    rows: int
    columns: int
    tile_height: int
    tile_width: int
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """All singular values of each discriminator weight matrix as the layer uses it, largest first, by layer name."""

    kind: ClassVar[str] = "spectra"
    step: int
    layers: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ended."""

    kind: ClassVar[str] = "ending"
    step: int
    reason: str
    """``steps`` or ``minutes`` (the budget that was reached), ``interrupted``."""
    images_seen: int
    training_seconds: float
    """Time in discriminator and generator updates, over all sessions."""
    total_seconds: float
    """Time since the process began, everything included."""
    peak_memory_bytes: int


Record: TypeAlias = Session | Scalars | Evaluation | Picture | Spectra | Ending

_KINDS: dict[str, type[Record]] = {cls.kind: cls for cls in (Session, Scalars, Evaluation, Picture, Spectra, Ending)}


class RecordFile:
    """Appends records to a JSON-lines file; each line reaches the operating system before the call returns.

    Args:
        path: the file, made if absent.
        keep_until_step: records of a later step are dropped first, so that a run resumed from an older checkpoint
            does not tell the same steps twice.
    """

    def __init__(self, path: Path, *, keep_until_step: int | None = None) -> None:
        self.path = path
        if path.exists():
            records = list(read_records(path))
            kept = [r for r in records if keep_until_step is None or r.step <= keep_until_step]
            # Also drops a last line cut short by a kill, which would otherwise corrupt the next record.
            replace_text(path, "".join(map(_to_line, kept)))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write one record."""
        self._stream.write(_to_line(record))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order.

    Skipped are a line cut short by a kill or otherwise damaged, and kinds of newer versions; fields of newer versions
    are left out.

    Raises:
        OSError: the file cannot be read.
    """
    # A kill may cut a line in the middle of a character.
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                fields = json.loads(line)
                kind = _KINDS.get(fields.pop("kind", ""))
                record = None if kind is None else _from_fields(kind, fields)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            if record is not None:
                yield record


def latest_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The last evaluation, together with what others of the same generator measured beside it.

    One that was asked for later may hold a single metric. Where two hold the same, the later one counts.

    Args:
        evaluations: in the order in which they were recorded.

    Returns:
        The last one, with every metric of those that are of its step and as final as it is; None: there is none.
    """
    if not evaluations:
        return None
    last = evaluations[-1]
    of_one = [one for one in evaluations if (one.step, one.final) == (last.step, last.final)]
    metrics = {metric.name: metric for one in of_one for metric in one.metrics}
    return dataclasses.replace(last, metrics=tuple(metrics.values()))


def replace_text(path: Path, text: str) -> None:
    """Write a whole file so that a reader, also after a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def metric_fields(metric: Metric) -> dict[str, Any]:
    """A metric as it is written to JSON; what is not finite is None."""
    return _finite(dataclasses.asdict(metric))


def _to_line(record: Record) -> str:
    fields = {"kind": record.kind, **dataclasses.asdict(record)}
    return json.dumps(_finite(fields), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, and null reads back as NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _from_fields(cls: type[Record], fields: dict[str, Any]) -> Record:
    fields = _known(cls, fields)
    if cls is Scalars:
        fields["values"] = {name: _number(value) for name, value in fields["values"].items()}
    if cls is Evaluation:
        fields["metrics"] = tuple(map(_metric, fields["metrics"]))
    if cls is Spectra:
        fields["layers"] = {name: tuple(map(_number, values)) for name, values in fields["layers"].items()}
    return cls(**fields)


def _metric(fields: dict[str, Any]) -> Metric:
    fields = _known(Metric, fields)
    fields["value"] = _number(fields["value"])
    fields["details"] = {name: _number(value) for name, value in fields.get("details", {}).items()}
    if fields.get("interval") is not None:
        low, high = map(_number, fields["interval"])
        fields["interval"] = (low, high)
    fields["provenance"] = Provenance(**_known(Provenance, fields["provenance"]))
    return Metric(**fields)


def _known(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
