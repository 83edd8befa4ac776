"""The package as a stranger gets it: a wheel in an environment that knows nothing of this source tree.

The new environment sees torch and the other dependencies of the running one by a path at the end of its search path.
A path in a ``.pth`` file is searched, but the ``.pth`` files inside it are not read: an editable install of this
package in the running environment stays invisible.
"""

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="building the wheel needs the development tools: make test installs them")

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "spectralnorm"

EXTRAS = ("PIL", "jinja2", "matplotlib", "numpy", "rich", "safetensors", "tensorboard", "torchmetrics", "tyro")


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment with the wheel installed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False, symlinks=True)
    executables = folder / "bin"
    python = executables / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", wheel, cwd=folder)
    return executables


def test_wheel_holds_every_file_of_the_package(wheel: Path):
    expected = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "spectralnorm/py.typed" in packed


def test_every_shipped_asset_comes_with_its_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {match[1] for name in names if (match := re.match(r"spectralnorm/assets/([^/]+)/", name))}
    assert folders
    for folder in folders:
        files = [Path(name).name.upper() for name in names if name.startswith(f"spectralnorm/assets/{folder}/")]
        assert any(name.startswith(("LICENSE", "NOTICE")) for name in files), f"no licence beside {folder}: {files}"


def test_wheel_is_small_enough_to_fetch_in_seconds(wheel: Path):
    assert wheel.stat().st_size < 16e6


def test_base_install_asks_for_torch_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    base = [requirement for requirement in metadata.get_all("Requires-Dist", []) if "extra ==" not in requirement]
    assert base == ["torch>=2.6"]


def test_wheel_imports_from_its_own_environment(elsewhere: Path, wheel: Path, tmp_path: Path):
    code = "import spectralnorm as sn; print(sn.__file__, sn.__version__)"
    file, version = _run(elsewhere / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert Path(file).is_relative_to(elsewhere.parent)
    assert version == wheel.name.split("-")[1]


def test_import_loads_no_module_of_the_package_and_not_even_torch(elsewhere: Path, tmp_path: Path):
    code = """
        import json, sys
        before = set(sys.modules)
        import spectralnorm
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    added = json.loads(_run(elsewhere / "python", "-c", _dedent(code), cwd=tmp_path).stdout)
    assert [name for name in added if name.partition(".")[0] not in sys.stdlib_module_names] == ["spectralnorm"]


def test_every_name_of_the_library_loads_torch_and_nothing_heavier(elsewhere: Path, tmp_path: Path):
    code = """
        import json, sys, torch
        before = set(sys.modules)
        import spectralnorm as sn
        names = [getattr(sn, name).__name__ for name in sn.__all__ if not name.startswith("_")]
        print(json.dumps([names, sorted(set(sys.modules) - before)]))
    """
    names, added = json.loads(_run(elsewhere / "python", "-c", _dedent(code), cwd=tmp_path).stdout)
    assert {"add_spectral_norm", "certify"} <= set(names)
    assert {"spectralnorm.transform", "spectralnorm.lipschitz"} <= set(added)
    packages = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert packages <= {"spectralnorm", "torch"}
    # torch's compiler takes longer to import than the rest of torch.
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "spectralnorm.gan"))]


def test_library_works_without_the_extras(elsewhere: Path, tmp_path: Path):
    code = f"""
        import importlib.abc, sys, warnings

        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {EXTRAS!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch, spectralnorm as sn

        layer = sn.spectral_norm(torch.nn.Linear(4, 3))
        layer(torch.ones(2, 4)).sum().backward()
        print(float(torch.linalg.matrix_norm(layer.weight, 2)), "numpy" in sys.modules)
    """
    norm, numpy_loaded = _run(elsewhere / "python", "-c", _dedent(code), cwd=tmp_path).stdout.split()
    assert float(norm) == pytest.approx(1, rel=1e-3)
    assert numpy_loaded == "False"


@pytest.mark.slow
def test_installed_command_trains_and_reports(elsewhere: Path, tmp_path: Path):
    run = tmp_path / "run"
    small = "--steps 4 --batch-size 4 --generator-width 2 --discriminator-width 2 --latent-dim 8".split()
    _run(elsewhere / "spectralnorm", "train", *small, "--device", "cpu", "--out", run, cwd=tmp_path)
    made = {path.name for path in run.iterdir()}
    assert {"config.json", "data.json", "metrics.jsonl", "checkpoints", "samples", "generator.safetensors"} <= made
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    assert any((run / "samples").glob("*.png"))


def _dedent(code: str) -> str:
    return "\n".join(line[8:] for line in code.splitlines())
