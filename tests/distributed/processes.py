"""Processes that do not each import torch anew: forks of one that has, and in which nothing has been computed."""

import importlib.util
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

NUM_RANKS = 2
# How long one rank waits for the other in a collective before it says so.
COLLECTIVE_TIMEOUT_SECONDS = 30
# Among them what takes as long to import as torch itself: its compiler, which comes with the first optimizer.
IMPORTED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "spectralnorm.gan.run"]

_context = multiprocessing.get_context("forkserver")


def started(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that runs ``function(*arguments)``, a function of a module that can be imported by its name."""
    _context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        ensure_running()
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


class Rank:
    """One process of a gloo group, and the line to it."""

    def __init__(self, rank: int, meeting_point: str) -> None:
        self.line, theirs = multiprocessing.Pipe()
        self.process = started(_serve, rank, meeting_point, theirs)
        # Theirs alone is open now, so the line ends when they do.
        theirs.close()

    def send(self, task: bytes) -> None:
        self.line.send_bytes(task)

    def answer(self) -> str | None:
        """What failed; raises `EOFError` where the process has ended."""
        return pickle.loads(self.line.recv_bytes())

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()


def _serve(rank: int, meeting_point: str, line: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    modules: dict[str, Any] = {}
    while True:
        path, name, arguments = pickle.loads(line.recv_bytes())
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
        line.send_bytes(pickle.dumps(failure))
