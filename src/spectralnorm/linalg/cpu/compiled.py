"""The kernels compiled, found again, loaded and tried.

What is compiled is for this processor, so a cache that several machines share holds a library for each kind of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from spectralnorm.user_cache import cache_folder

__all__ = ["SWITCH", "compiled_into", "is_trusted", "kernels"]

SWITCH = "SPECTRALNORM_C"
_FOLDER = Path(__file__).parent
# -march=native is not known everywhere; where it is not, the kernels are those of the processor's oldest relatives.
_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_FOR_THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
_POINTER, _COUNT, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_ARGUMENTS = {
    "renew": [_POINTER, _POINTER, _COUNT, *[_POINTER] * 7, _DOUBLE, *[_POINTER] * 4, _INT],
    "divide": [*[_POINTER] * 4, _COUNT, _POINTER, _INT],
    "is_quotient": [*[_POINTER] * 2, *[_COUNT] * 2, *[_DOUBLE] * 3],
    "gradients": [*[_POINTER] * 4, _COUNT, *[_POINTER] * 2, _COUNT, _COUNT, *[_POINTER] * 2, _INT],
    "store": [_POINTER, _COUNT, *[_POINTER] * 3, _COUNT, _POINTER, _DOUBLE],
    "panel_rows": [],
    "panel_matrix_size": [_COUNT],
    "pack_kernel": [_POINTER, *[_COUNT] * 6, *[_POINTER] * 5, _INT],
    "symbol_grams": [_POINTER, *[_COUNT] * 4, *[_POINTER] * 2, _COUNT, *[_POINTER] * 2, _INT],
    "interpolate": [_POINTER, *[_COUNT] * 2, *[_POINTER] * 2, *[_COUNT] * 2, _POINTER, _INT],
    "follow": [*[_POINTER] * 2, *[_COUNT] * 5, _INT, *[_POINTER] * 2, _INT],
    "factorize": [*[_POINTER] * 2, *[_COUNT] * 2, _DOUBLE, _POINTER, _INT],
}
_RESULTS = {"store": None, "interpolate": None, "panel_matrix_size": _COUNT, "factorize": _COUNT}
"""What is not an int: a status, 0 if all is well; of \"renew\" how many weights have no norm, -1 if it failed; of
\"is_quotient\" the answer."""


@cache
def is_trusted() -> bool:
    """Whether the kernels are to be used in this process.

    They are if the environment variable ``SPECTRALNORM_C`` is not ``0``, if there is a C compiler (or a library that it
    has made before), and if they have computed what torch computes: they are tried once in a process. Where there is no
    compiler, torch's own operations do the work without a word; where one fails, or the kernels do, with one warning.
    """
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return False
    from spectralnorm.linalg.cpu.quotients import QuotientPlan
    from spectralnorm.linalg.cpu.symbol_trial import symbol_disagreement
    from spectralnorm.linalg.cpu.tracking import TrackingPlan
    from spectralnorm.linalg.kernel_trial import disagreement

    try:
        if not _can_be_had():
            return False
        reason = disagreement(TrackingPlan, QuotientPlan) or symbol_disagreement()
    except Exception as error:  # a compiler, a file system and a processor take part: torch can do without
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        warnings.warn(
            f"The compiled kernels of spectralnorm do not work on this machine ({reason}); torch's own operations are "
            f"used, which give the same numbers more slowly. Set {SWITCH}=0 to leave the kernels out without this "
            "warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


def _can_be_had() -> bool:
    return _place().is_file() or _compiler() is not None


@cache
def kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        OSError: there is no compiler, it fails, or what it made cannot be loaded.
    """
    path = _place()
    if not path.is_file():
        path = compiled_into(path, _compiler() or "cc")
    loaded = ctypes.CDLL(str(path))
    if path.parent != _place().parent:  # loaded, it needs no file
        shutil.rmtree(path.parent, ignore_errors=True)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, f"spectralnorm_{name}")
        function.argtypes = arguments
        function.restype = _RESULTS.get(name, _INT)
    _share_threads(loaded)
    return loaded


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Let the kernels run on torch's own threads, if those are of GCC's OpenMP.

    Between two operations they wait awake for the next one, and other threads would have to take turns with them.
    """
    everything = ctypes.CDLL(None)
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    if all(hasattr(everything, name) for name in names):
        loaded.spectralnorm_use_threads_of.argtypes = [_POINTER] * 3
        loaded.spectralnorm_use_threads_of.restype = None
        loaded.spectralnorm_use_threads_of(*(ctypes.cast(getattr(everything, name), _POINTER) for name in names))


def compiled_into(path: Path, compiler: str) -> Path:
    """The kernels compiled as ``path``; in a folder of this process alone where that cannot be written.

    Raises:
        OSError: the compiler fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="spectralnorm-"))
        path = folder / path.name
    made = folder / "made.so"
    try:
        for flags in _FOR_THIS_PROCESSOR:
            run = subprocess.run(
                [compiler, *_FLAGS, *flags, *map(str, _sources(".c")), "-o", str(made), "-lm"],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            if run.returncode == 0:
                # In one piece: another process may look for it at the same time, or may have been faster.
                made.replace(path)
                return path
        lines = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
        raise OSError(f"{compiler} does not compile the kernels: {lines[0]}")
    finally:
        if folder != path.parent:
            shutil.rmtree(folder, ignore_errors=True)


def _compiler() -> str | None:
    named = os.environ.get("CC")
    for name in ([named] if named else []) + ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    return None


@cache
def _place() -> Path:
    """Where the library for this source and this kind of processor is, or would be.

    Raises:
        OSError: there is no such place.
    """
    return cache_folder("kernels") / f"kernels-{_identity()}.so"


def _sources(*endings: str) -> list[Path]:
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in endings)


def _identity() -> str:
    """Of the source, of what it is compiled with, and of the kind of processor."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _sources(".c", ".h")))
    digest.update(repr((_FLAGS, _FOR_THIS_PROCESSOR, platform.system(), platform.machine())).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
