"""The library that the kernels are compiled into: where it is found, and what happens where it cannot be made."""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.parametrizations.kernel_runs import are_kept_by_kernels, assert_equal_runs, trained
from torch import nn

import spectralnorm as sn
from spectralnorm.linalg import cpu
from spectralnorm.linalg.cpu import compiled


def forget_kernels() -> None:
    for remembered in (compiled.is_trusted, compiled.kernels, compiled._place):
        remembered.cache_clear()


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    forget_kernels()
    yield
    forget_kernels()


def test_a_change_in_any_file_gives_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in compiled._sources(".c", ".h")]
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    names = {compiled._identity()}
    for file in files:
        file.write_text(file.read_text() + "\n")
        names.add(compiled._identity())
    assert len(names) == 1 + len(files)


def test_without_a_compiler_torch_does_the_work_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    plain = nn.Sequential(nn.Linear(12, 10), nn.Flatten(0))
    # By the kernels, where there is a compiler.
    usual = trained(sn.add_spectral_norm(copy.deepcopy(plain)), 2, torch.device("cpu"))
    forget_kernels()
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.is_trusted()
        model = sn.add_spectral_norm(plain)
        alone = trained(model, 2, torch.device("cpu"))
    assert not any(are_kept_by_kernels(model))
    assert_equal_runs(alone, usual, 2e-4, of_vectors=2e-3)


@pytest.mark.parametrize("script", ["exit 3", "echo 'no such target' >&2; exit 1", "touch $7"])
def test_a_compiler_that_fails_is_told_once(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done\n{script}\n'.replace("$7", "$out")
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.warns(RuntimeWarning, match=r"compiled kernels.*SPECTRALNORM_C=0"):
        assert not cpu.is_trusted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.is_trusted()
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "kernels").iterdir())


def test_the_library_is_compiled_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path))
    if not cpu.is_trusted():
        pytest.skip("there is no C compiler")
    (made,) = (tmp_path / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    forget_kernels()
    monkeypatch.setenv("CC", "/bin/false")  # nobody asks it
    assert cpu.is_trusted()
    assert made.stat().st_mtime_ns == before


def test_the_switch_turns_the_compiled_kernels_off(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setenv("SPECTRALNORM_C", "0")
    assert not cpu.is_trusted()


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    if not cpu.is_trusted():
        pytest.skip("there is no C compiler")
    forget_kernels()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert cpu.is_trusted()
    assert not list((tmp_path / "temporary").iterdir())  # it is loaded, and nothing is left behind


@pytest.mark.skipif(not cpu.is_trusted(), reason="there is no C compiler")
def test_other_defaults_of_torch_change_nothing(fresh_kernels: None) -> None:
    models = [nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 300), nn.Linear(300, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    device = torch.device("cpu")
    usual = trained(sn.add_spectral_norm(models[0]), 3, device)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as the default
            forget_kernels()
            assert cpu.is_trusted()
        model = sn.add_spectral_norm(models[1])
        unusual = trained(model, 3, device)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(are_kept_by_kernels(model))
    for mine, its in zip(unusual, usual, strict=True):
        for name, each in mine.items():
            assert torch.equal(each.float(), its[name]), name
