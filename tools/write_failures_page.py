"""Run the tests that show where torch's spectral norms fail, and write what they found to the docs.

    python tools/write_failures_page.py           # runs TESTS, writes docs/library/torchs-failures.md

A test stands in the table if it is parametrized by ``sn``, one of the three implementations. The number is from its
name, what must hold is the first line of its docstring.
"""

import datetime
import re
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = (
    ROOT / "tests" / "contracts" / "test_torch_failures.py",
    ROOT / "tests" / "distributed" / "test_torch_failures.py",
)
PAGE = ROOT / "docs" / "library" / "torchs-failures.md"
CONTENDERS = ("ours", "P", "O")

# Without a table of contents beside it, the table has room.
TEXT = """\
---
hide:
  - toc
---

# Where torch's fails

Torch has two spectral norms: the parametrization `torch.nn.utils.parametrizations.spectral_norm` and the older hook
`torch.nn.utils.spectral_norm`. What follows must hold for any of them, and one and the same test asks it of torch's
two and of ours ([how to replace them](replacing-torchs.md)). Where torch's are known to fail, the test suite expects
them to: if a later torch passes, the suite fails until this page is corrected.

Observed on {date} with torch {torch}:

{table}

{missing}The tests are the files `test_torch_failures.py` in `tests/contracts` and `tests/distributed`;
`python tools/write_failures_page.py` runs them and writes this page.
"""


@dataclass
class Failure:
    """One test, and how it went.

    Attributes:
        number: in the list of failures; several tests can show one.
        holds: what must hold.
        passed: by implementation, whether each of the test's cases passed.
        reason: why ours fails; empty if it does not.
    """

    number: int
    holds: str
    passed: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in CONTENDERS})
    reason: str = ""


def failure_of(function: Any) -> Failure:
    """An entry for a test function, without outcomes."""
    number = re.match(r"test_(\d+)", function.__name__)
    if number is None or not function.__doc__:
        raise ValueError(f"{function.__name__} needs a number in its name and a docstring that tells what must hold.")
    return Failure(int(number[1]), function.__doc__.strip().splitlines()[0])


def table(failures: Iterable[Failure]) -> str:
    """The table, in the order of the numbers."""
    lines = ["| | What must hold | spectralnorm | torch's parametrization | torch's hook |", "|---|---|---|---|---|"]
    for failure in sorted(failures, key=lambda failure: failure.number):
        verdicts = (_verdict(failure.passed[name]) for name in CONTENDERS)
        lines.append(f"| {failure.number} | {failure.holds} | {' | '.join(verdicts)} |")
    return "\n".join(lines)


def _verdict(passed: list[bool]) -> str:
    if not passed:
        return "not asked"
    if any(passed) and not all(passed):
        return f"**fails** in {passed.count(False)} of {len(passed)} cases"
    return "passes" if passed[0] else "**fails**"


def _missing(failures: Iterable[Failure]) -> str:
    reasons = [f"- {failure.number}: {failure.reason}." for failure in failures if failure.reason]
    return "\n".join(["Where ours fails as well:", "", *reasons, "", ""]) if reasons else ""


class Observer:
    """A plugin for pytest that notes how each test went."""

    def __init__(self) -> None:
        self.failures: dict[str, Failure] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        is_known = hasattr(report, "wasxfail")
        if "sn" in parameters and report.when == "call" and (report.passed or is_known):
            failure = self.failures.setdefault(f"{item.path}::{item.originalname}", failure_of(item.function))
            failure.passed[parameters["sn"].name].append(not is_known)
            if is_known and parameters["sn"].name == "ours":
                failure.reason = report.wasxfail.removeprefix("reason: ")
        return report


def main() -> None:
    observer = Observer()
    status = pytest.main([*map(str, TESTS), "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider"], plugins=[observer])
    if status != 0:
        sys.exit("Something went otherwise than the tests expect; the page is left as it was.")
    failures = list(observer.failures.values())
    text = TEXT.format(
        date=datetime.date.today().isoformat(),
        torch=torch.__version__.partition("+")[0],
        table=table(failures),
        missing=_missing(failures),
    )
    PAGE.write_text(text, encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}: {len(failures)} tests.")


if __name__ == "__main__":
    main()
