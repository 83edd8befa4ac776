"""`train`, started as a launcher starts it: one folder, records of the first process, and one end for all."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spectralnorm.records import Ending, Scalars, Session, read_records

SCRIPT = """
import os, signal, sys
import torch
from spectralnorm.errors import UserError
from spectralnorm.gan import make_config, train

folder, steps, die_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
images = torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
sizes = {"generator_width": 2, "discriminator_width": 2, "latent_dim": 8, "batch_size": 8}
config = make_config("fashion", steps=steps, device="cpu", log_every=2, num_sample_grids=2, **sizes)

def die(trainer):
    if trainer.step == die_at and trainer.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    run = train(config, out=folder, data=images, observers=[die])
    print("ended", run.step, run.reason)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launch(folder: Path, *, size: int, steps: int, die_at: int = 0) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process."""
    port = str(_free_port())
    started = []
    for rank in range(size):
        launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": port}
        environment = {**os.environ, **launch, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, str(folder), str(steps), str(die_at)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ends = []
    for process in started:
        output, errors = process.communicate(timeout=240)
        ends.append((process.returncode, output, errors))
    return ends


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
