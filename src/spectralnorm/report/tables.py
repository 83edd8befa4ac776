"""The tables of the report, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectralnorm.records import Ending, Evaluation, Metric, Provenance
from spectralnorm.report.contents import Contents
from spectralnorm.report.text import bytes_text, count_text, duration_text, number_text

__all__ = [
    "DataTable",
    "MetricGroup",
    "Share",
    "config_rows",
    "data_table",
    "ending_text",
    "metric_groups",
    "session_rows",
    "shares",
    "time_rows",
    "version_rows",
]

_MAX_UNREADABLE = 100
_MAX_CLASSES = 20
_REASONS = {"steps": "step budget reached", "minutes": "time budget reached", "interrupted": "interrupted"}

Row = tuple[str, str]


@dataclass(frozen=True)
class MetricGroup:
    """Metrics of one provenance: their numbers compare with others only where it agrees."""

    provenance: Provenance
    metrics: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Share:
    """One part of a metric, such as the share of a class among the samples."""

    name: str
    text: str
    percent: float
    """Length of its bar, of the longest."""


@dataclass(frozen=True)
class DataTable:
    """What data.json tells."""

    rows: Sequence[Row]
    unreadable: Sequence[Row]
    num_unreadable: int


def ending_text(ending: Ending | None) -> str:
    """How a process ended."""
    if ending is None:
        return "no end recorded: still running, or cut off"
    return f"{_REASONS.get(ending.reason, ending.reason)} at step {count_text(ending.step)}"


def config_rows(config: Mapping[str, Any]) -> list[Row]:
    """Every setting of the run, in the order of the file."""
    return [(str(name), _value_text(value)) for name, value in config.items()]


def data_table(data: Mapping[str, Any] | None) -> DataTable | None:
    """The facts of data.json, in its order where it is not known better; None without the file."""
    if data is None:
        return None
    rows = [
        ("name", _value_text(data.get("name"))),
        ("source", _value_text(data.get("source"))),
        ("licence", _value_text(data.get("licence") or "not recorded: the data is your own")),
        ("images", _value_text(data.get("num_images"))),
        ("to train on", _value_text(data.get("num_training"))),
        ("held out for metrics", _value_text(data.get("num_held_out"))),
        ("trained at", _trained_at(data)),
        ("resize", _value_text(data.get("resize"))),
        ("original sizes", _counts_text(data.get("original_sizes"))),
        ("pixel modes", _counts_text(data.get("modes"))),
        ("classes", _counts_text(data.get("classes")) if data.get("classes") else "none: the images have no labels"),
        ("duplicates", _value_text(data.get("num_duplicates"))),
    ]
    if data.get("ignored"):
        rows.append(("other files, ignored", _counts_text(data["ignored"])))
    if data.get("fingerprint"):
        rows.append(("fingerprint", str(data["fingerprint"])[:16]))
    listed = data.get("unreadable")
    unreadable = [item for item in listed if isinstance(item, Mapping)] if isinstance(listed, Sequence) else []
    rows.append(("unreadable files", count_text(len(unreadable)) if unreadable else "none"))
    files = [(str(item.get("file")), str(item.get("reason"))) for item in unreadable[:_MAX_UNREADABLE]]
    return DataTable(rows, files, len(unreadable))


def metric_groups(evaluation: Evaluation | None) -> list[MetricGroup]:
    """The metrics of an evaluation by provenance, with the number and everything needed to read it."""
    groups: dict[Provenance, list[Metric]] = {}
    for metric in evaluation.metrics if evaluation is not None else ():
        groups.setdefault(metric.provenance, []).append(metric)
    return [
        MetricGroup(
            provenance,
            [
                {
                    "name": metric.name,
                    "value": number_text(metric.value),
                    "spread": number_text(metric.spread, 2) if metric.spread is not None else "",
                    "interval": _interval_text(metric.interval),
                    "floor": number_text(metric.floor),
                    "better": metric.better,
                    "details": "" if _are_shares(metric.details) else _details_text(metric.details),
                }
                for metric in metrics
            ],
        )
        for provenance, metrics in groups.items()
    ]


def shares(metric: Metric) -> list[Share]:
    """The details of a metric as bars if they are shares of a whole; none otherwise."""
    if not _are_shares(metric.details):
        return []
    largest = max(metric.details.values())
    return [Share(name, f"{value:.1%}", 100 * value / largest) for name, value in metric.details.items()]


def time_rows(contents: Contents) -> list[Row]:
    """How long it took, and on what."""
    endings = [sitting.ending for sitting in contents.sittings if sitting.ending is not None]
    rows = [("training time", duration_text(contents.training_seconds))]
    if endings:
        rows.append(
            ("time in all, with data, metrics and samples", duration_text(sum(e.total_seconds for e in endings)))
        )
    if len(endings) < len(contents.sittings):
        rows[-1] = (rows[-1][0], f"{rows[-1][1]}, and that of sessions without a recorded end")
    rows.append(("images seen", count_text(contents.images_seen)))
    if contents.training_seconds > 0:
        rows.append(("images per second, mean", number_text(contents.images_seen / contents.training_seconds, 3)))
    if endings:
        rows.append(("peak memory", bytes_text(max(ending.peak_memory_bytes for ending in endings))))
    hardware = contents.sittings[-1].session.hardware if contents.sittings else {}
    return rows + [(str(name), str(value)) for name, value in hardware.items()]


def version_rows(contents: Contents) -> list[Row]:
    """Versions of the last session; of others only where they differ."""
    if not contents.sittings:
        return []
    last = contents.sittings[-1].session.versions
    rows = []
    for name, version in last.items():
        earlier = dict.fromkeys(str(s.session.versions.get(name, version)) for s in contents.sittings[:-1])
        others = [other for other in earlier if other != version]
        rows.append((str(name), f"{version} (before: {', '.join(others)})" if others else str(version)))
    return rows


def session_rows(contents: Contents) -> list[Sequence[str]]:
    """One row a process: when it began, from which step, how it ended, how long it took, and its command."""
    return [
        (
            str(number),
            sitting.session.started_at.replace("T", " "),
            "new" if sitting.session.step == 0 else f"resumed at step {count_text(sitting.session.step)}",
            ending_text(sitting.ending),
            duration_text(sitting.ending.total_seconds) if sitting.ending is not None else "–",
            sitting.session.command,
        )
        for number, sitting in enumerate(contents.sittings, start=1)
    ]


def _are_shares(details: Mapping[str, float]) -> bool:
    values = details.values()
    return len(values) > 1 and min(values) >= 0 and math.isclose(sum(values), 1, abs_tol=0.02)


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"95 %: {number_text(interval[0], 3)} to {number_text(interval[1], 3)}"


def _details_text(details: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number_text(value)}" for name, value in details.items())


def _trained_at(data: Mapping[str, Any]) -> str:
    size, channels = data.get("image_size"), data.get("channels")
    color = {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels") if isinstance(channels, int) else "–"
    return f"{size} × {size} pixels, {color}"


def _counts_text(counts: Any) -> str:
    if not isinstance(counts, Mapping) or not counts:
        return "–"
    items = [f"{name} ({_value_text(count)})" for name, count in counts.items()]
    rest = len(items) - _MAX_CLASSES
    return ", ".join(items[:_MAX_CLASSES]) + (f", and {count_text(rest)} more" if rest > 0 else "")


def _value_text(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return count_text(value)
        case float():
            # A setting is shown as it was given: a step size of 0.0002 is not 2e-4 rounded.
            return f"{value:g}"
        case []:
            return "–"
        case list() | tuple():
            return ", ".join(map(_value_text, value))
        case Mapping():
            return ", ".join(f"{name}: {_value_text(item)}" for name, item in value.items())
        case _:
            return str(value)
