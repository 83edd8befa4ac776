"""The library that the kernels are compiled into: its name, and how it is made."""

import shutil
from pathlib import Path

import pytest

from spectralnorm.linalg.cpu import compiled


def test_a_change_in_any_file_gives_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in compiled._sources(".c", ".h")]
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    names = {compiled._identity()}
    for file in files:
        file.write_text(file.read_text() + "\n")
        names.add(compiled._identity())
    assert len(names) == 1 + len(files)
