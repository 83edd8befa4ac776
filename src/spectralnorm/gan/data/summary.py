"""What the preflight found out about a data set, for people and for ``data.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DataSummary", "Unreadable", "printable"]


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file that should be an image and is not."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What a data set holds, before and after it was brought to the training size."""

    name: str
    source: str
    """The path as the user gave it, or where built-in data comes from."""
    licence: str | None
    """None where the user knows and this package does not."""
    num_images: int
    """Images that could be read."""
    num_training: int
    num_held_out: int
    """Images kept for metrics, never trained on."""
    channels: int
    image_size: int
    original_sizes: Mapping[str, int]
    """Images of each width x height, the ten most frequent and ``other``."""
    modes: Mapping[str, int]
    """Images of each Pillow mode: ``L`` gray, ``RGB`` colour, ``P`` palette, ``RGBA`` with transparency..."""
    classes: Mapping[str, int]
    """Images of each class; empty without labels."""
    num_duplicates: int
    """Images whose pixels, once prepared, equal those of an earlier one."""
    unreadable: Sequence[Unreadable]
    ignored: Mapping[str, int]
    """Files of other kinds, by extension."""
    resize: str
    """How images came to the training size."""
    fingerprint: str
    """SHA-256 of the prepared images, their labels and the split."""
    streamed: bool = False
    """Whether images are read while training goes on. Then sizes, modes, duplicates and unreadable files are those of
    the held-out images, which were read before; of the unreadable ones among the others, training tells."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``data.json``: every field under its own name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DataSummary:
        """The summary that `to_json` described."""
        unreadable = tuple(Unreadable(**item) for item in fields["unreadable"])
        return cls(**{**fields, "unreadable": unreadable})

    def rows(self) -> list[tuple[str, str]]:
        """The table as pairs of a heading and a text of one line."""
        rows = [
            ("data", f"{self.name} ({self.source})"),
            (
                "images",
                f"{self.num_images:,}: {self.num_training:,} to train on, {self.num_held_out:,} held out for metrics",
            ),
        ]
        if self.original_sizes:  # points in the plane have none
            rows += [
                ("sizes", _counts(self.original_sizes, limit=4)),
                ("pixels", f"{_counts(self.modes, limit=6)} -> {'gray' if self.channels == 1 else 'RGB'}"),
                ("resize", self.resize),
            ]
        # What was looked for and not found is said, too: a missing line might as well mean that no one looked.
        classes = f"{len(self.classes):,}: {_counts(self.classes, limit=10)}" if self.classes else "none given"
        rows += [("classes", classes), ("duplicates", f"{self.num_duplicates:,}" if self.num_duplicates else "none")]
        if not self.unreadable:
            rows.append(("unreadable", "none"))
        else:
            first = ", ".join(f"{item.file} ({item.reason})" for item in self.unreadable[:3])
            more = f", and {len(self.unreadable) - 3:,} more" if len(self.unreadable) > 3 else ""
            rows.append(("unreadable", f"{len(self.unreadable):,}, skipped: {first}{more}"))
        if self.streamed:
            rows.append(("loading", f"streamed; what is said of pixels is that of the {self.num_held_out:,} held out"))
        if self.ignored:
            rows.append(("other files", f"{_counts(self.ignored, limit=5)}, ignored"))
        if self.licence is not None:
            rows.append(("licence", self.licence))
        return rows

    def render(self) -> str:
        """The table as plain text, one line a row."""
        rows = self.rows()
        width = max(len(heading) for heading, _ in rows)
        return "\n".join(f"{heading:<{width}}  {text}" for heading, text in rows)


def printable(text: str) -> str:
    """Text that fits on one line and into UTF-8, since the name of a file may hold any bytes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _counts(counts: Mapping[str, int], *, limit: int) -> str:
    ordered = sorted(counts.items(), key=lambda item: (item[0] == "other", -item[1]))
    shown = ", ".join(f"{name} ({count:,})" for name, count in ordered[:limit])
    rest = ordered[limit:]
    return shown + (f" and {len(rest):,} others ({sum(count for _, count in rest):,})" if rest else "")
