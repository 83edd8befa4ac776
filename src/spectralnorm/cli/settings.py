"""The settings of a run as flags: the fields of `Config` by group, each with the help that stands under it there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import tyro

from spectralnorm.cli.arguments import field_docs, metavar_of
from spectralnorm.gan.config import Config

__all__ = ["flatten", "grouped", "shown_fields"]


def grouped(values: Mapping[str, Any], *, front: Any) -> Any:
    """An instance of a nested dataclass: ``front`` first, then one dataclass for each group of `Config`'s fields.

    Nothing is checked in it, so that values can still be replaced; `flatten` gives them back.

    Args:
        values: of all fields of `Config`.
        front: an instance of a dataclass, shown before the others; fields of `Config` with the name of one of its own
            are left out, and so are those that `Config` suppresses.
    """
    hints, texts = get_type_hints(Config), field_docs(Config)
    taken = {field.name for field in dataclasses.fields(front)}
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for field in shown_fields():
        if field.name in taken:
            continue
        flag = tyro.conf.arg(
            help=texts.get(field.name, ""),
            metavar=metavar_of(hints[field.name]),
            help_behavior_hint=f"(default: {_shown(values[field.name])})",
        )
        group = groups.setdefault(field.metadata.get("group", "Settings"), [])
        group.append((field.name, Annotated[hints[field.name], flag], values[field.name]))
    fields: list[tuple[str, Any, Any]] = [("front", _titled(type(front), "Run"), front)]
    for title, members in groups.items():
        kind = dataclasses.make_dataclass(
            title.title().replace(" ", ""), members, frozen=True, namespace={"__doc__": ""}
        )
        fields.append((title.lower().replace(" ", "_"), _titled(kind, title), kind()))
    return dataclasses.make_dataclass("TrainOptions", fields, frozen=True)()


def flatten(options: Any) -> tuple[Any, dict[str, Any]]:
    """The front of what `grouped` made, and the values of `Config` that it holds."""
    front, *groups = (getattr(options, field.name) for field in dataclasses.fields(options))
    return front, {name: value for group in groups for name, value in vars(group).items()}


def shown_fields() -> list[dataclasses.Field[Any]]:
    """The fields of `Config` that are for a user to set, in its order."""
    hints = get_type_hints(Config, include_extras=True)
    return [field for field in dataclasses.fields(Config) if not _is_suppressed(hints[field.name])]


def _titled(kind: type, title: str) -> Any:
    return Annotated[tyro.conf.OmitArgPrefixes[kind], tyro.conf.arg(name=title)]


def _is_suppressed(hint: Any) -> bool:
    return tyro.conf.Suppress in getattr(hint, "__metadata__", ())


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
