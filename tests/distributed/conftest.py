"""Two processes that run the bodies of tests together; run as a script this file is one of them."""

import importlib.util
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest

# Where `rank_checks` is, for test modules here and in the ranks.
sys.path.insert(0, str(Path(__file__).parent))

NUM_RANKS = 2
# What a test may take, and how long one rank waits for the other in a collective before it says so.
TASK_TIMEOUT_SECONDS = 120
COLLECTIVE_TIMEOUT_SECONDS = 30
NO_ANSWER = "no answer in time"
ENDED = "the process has ended"


class Pair:
    """Two ranks of a gloo process group, started when they are first needed and after a failure."""

    def __init__(self) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []

    def run(self, function: Callable[..., None], **arguments: Any) -> None:
        """Run ``function(**arguments)`` on both ranks, where `torch.distributed` is initialized.

        Args:
            function: of a test module's top level. It starts under the same seed on every rank.
            arguments: what can be pickled without the test module.

        Raises:
            AssertionError: it failed on a rank; with the traceback of each that did.
        """
        task = pickle.dumps((function.__code__.co_filename, function.__qualname__, arguments))
        failures = self._attempt(task)
        signals = self._signals(failures)
        if signals:
            # Torch's collectives have been seen to crash a rank, once in thousands of tests. What always crashes will
            # do so again; what does not is told at the end of the test run.
            warnings.warn(f"{function.__qualname__}: a rank was ended by signal {signals}; run again", stacklevel=2)
            failures = self._attempt(task)
        if failures:
            raise AssertionError("\n".join(f"On rank {rank}:\n{text}" for rank, text in sorted(failures.items())))

    def _attempt(self, task: bytes) -> dict[int, str]:
        if not self._workers:
            self._start()
        for worker in self._workers:
            _send(worker.stdin, task)
        failures = self._failures()
        self._last_workers = self._workers
        # Starting takes long; ranks that have both come to an end outside of a collective can go on.
        if any(text in (NO_ANSWER, ENDED) or "gloo" in text for text in failures.values()):
            self.stop()
        return failures

    def _signals(self, failures: dict[int, str]) -> list[int]:
        """Which signals ended ranks that ended without an answer."""
        ended = [self._last_workers[rank] for rank, text in failures.items() if text == ENDED]
        return [-worker.returncode for worker in ended if worker.returncode is not None and worker.returncode < 0]

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()
        self._workers = []

    def _start(self) -> None:
        meeting_point = tempfile.mktemp(prefix="ranks-")
        self._workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), meeting_point],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(NUM_RANKS)
        ]

    def _failures(self) -> dict[int, str]:
        failures: dict[int, str] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, worker in enumerate(self._workers):
                assert worker.stdout is not None
                waiting.register(worker.stdout, selectors.EVENT_READ, rank)
            while waiting.get_map():
                # After a failure the other rank may wait for ever: it gets the time to fail for the same reason.
                ready = waiting.select(2 if failures else TASK_TIMEOUT_SECONDS)
                if not ready:
                    unheard = {key.data: NO_ANSWER for key in waiting.get_map().values()}
                    return failures | unheard
                for key, _ in ready:
                    waiting.unregister(key.fileobj)
                    failure = _receive(self._workers[key.data].stdout)
                    if failure is not None:
                        failures[key.data] = failure
        return failures


def _send(pipe: IO[bytes] | None, message: bytes) -> None:
    assert pipe is not None
    pipe.write(len(message).to_bytes(8, "big") + message)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None
    size = pipe.read(8)
    return pickle.loads(pipe.read(int.from_bytes(size, "big"))) if size else ENDED


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two ranks that run the bodies of tests together."""
    ranks = Pair()
    yield ranks
    ranks.stop()


def _serve(rank: int, meeting_point: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What a test prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    modules: dict[str, Any] = {}
    while (task := _receive(sys.stdin.buffer)) and not isinstance(task, str):
        path, name, arguments = task
        failure = None
        try:
            if path not in modules:
                specification = importlib.util.spec_from_file_location(Path(path).stem, path)
                assert specification is not None
                assert specification.loader is not None
                modules[path] = importlib.util.module_from_spec(specification)
                specification.loader.exec_module(modules[path])
            torch.manual_seed(0)
            getattr(modules[path], name)(**arguments)
        except BaseException:
            failure = traceback.format_exc()
        _send(answers, pickle.dumps(failure))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
