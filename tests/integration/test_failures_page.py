"""The page in the docs says of each test of torch's failures what the test itself says."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """The script that writes the page."""
    return load(ROOT / "tools" / "write_failures_page.py")


@pytest.fixture(scope="module")
def pinned_torch() -> str:
    """The version that the page is about."""
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def comparisons() -> Iterator[tuple[Callable, list[Any]]]:
    """Each test that asks all implementations the same, with its case for each of them."""
    for path in load(ROOT / "tools" / "write_failures_page.py").TESTS:
        for function in vars(load(path)).values():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize" and mark.args[0] == "sn":
                    yield function, mark.args[1]


def is_pinned(pinned_torch: str) -> bool:
    return torch.__version__.split(".")[:2] == pinned_torch.split(".")[:2]


def test_page_holds_the_outcomes_that_the_tests_insist_on(writer, pinned_torch):
    if not is_pinned(pinned_torch):
        pytest.skip("the page is of the pinned torch")
    failures = []
    for function, cases in comparisons():
        failures.append(writer.failure_of(function))
        for case in cases:
            failures[-1].passed[case.id].append(not case.marks)
    assert writer.table(failures) in writer.PAGE.read_text(encoding="utf-8")


def test_tests_insist_on_what_fails_in_the_pinned_torch(pinned_torch):
    marks = [mark for _, cases in comparisons() for case in cases for mark in case.marks]
    assert marks
    assert {mark.name for mark in marks} == {"xfail"}
    assert {mark.kwargs["strict"] for mark in marks} == {is_pinned(pinned_torch)}


def test_page_was_written_with_the_pinned_torch(writer, pinned_torch):
    assert f"with torch {pinned_torch}:" in writer.PAGE.read_text(encoding="utf-8")
