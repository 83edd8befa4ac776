"""`train`, started as a launcher starts it: one folder, records of the first process, and one end for all."""

import signal
import socket
from pathlib import Path

import pytest
from launched import train_and_exit
from processes import started

from spectralnorm.records import Ending, Scalars, Session, read_records


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launch(folder: Path, *, size: int, steps: int, die_at: int = 0) -> list[tuple[int | None, str, str]]:
    """Exit status, output and errors of each process."""
    port = str(_free_port())
    processes, files = [], []
    for rank in range(size):
        launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port}
        environment = {**launch, "MASTER_ADDR": "127.0.0.1"}
        files.append([folder.parent / f"{rank}.{kind}" for kind in ("out", "err")])
        written = [str(file) for file in files[-1]]
        processes.append(started(train_and_exit, environment, written, str(folder), steps, die_at))
    for process in processes:
        process.join(timeout=240)
    return [
        (process.exitcode, _without_greetings(output.read_text()), errors.read_text())
        for process, (output, errors) in zip(processes, files, strict=True)
    ]


def _without_greetings(output: str) -> str:
    """Gloo of some versions of torch, 2.10 for one, prints a line for each connection."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[Gloo] "))


@pytest.mark.slow
def test_processes_train_into_one_folder_and_one_that_is_killed_ends_all(tmp_path: Path):
    folder = tmp_path / "run"
    for status, output, errors in _launch(folder, size=2, steps=4):
        assert status == 0, errors
        assert output == "ended 4 steps\n"
    records = list(read_records(folder / "metrics.jsonl"))
    sessions = [record for record in records if isinstance(record, Session)]
    assert [session.hardware["processes"] for session in sessions] == ["2"]
    assert [record.step for record in records if isinstance(record, Scalars)] == [2, 4]
    assert [record.images_seen for record in records if isinstance(record, Ending)] == [32]

    (first, second) = _launch(folder, size=2, steps=8, die_at=6)
    assert second[0] == -signal.SIGKILL
    assert first[0] == 2
    sentences = [line for line in first[2].splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert "Another of the 2 processes has ended" in sentences[0]
    assert "Traceback" not in first[2]

    ((status, output, errors),) = _launch(folder, size=1, steps=8)
    assert status == 0, errors
    assert output == "ended 8 steps\n"
