"""``spectralnorm report``: parse, call, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.report import build_report

__all__ = ["run"]


@dataclass(frozen=True)
class ReportOptions:
    """Rebuild report.html of a run from its records and images; needs no model and no GPU."""

    run: tyro.conf.Positional[Path]
    """Run folder."""


def run(words: list[str]) -> int:
    """Write the report and say where it is."""
    print(build_report(parse(ReportOptions, words, prog="spectralnorm report").run))
    return 0
