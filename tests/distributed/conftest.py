"""Two processes that run the bodies of tests together."""

import pickle
import re
import selectors
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Where `processes` and `rank_checks` are, for test modules here and in the ranks.
sys.path.insert(0, str(Path(__file__).parent))

from processes import NUM_RANKS, Rank

# What a test may take.
TASK_TIMEOUT_SECONDS = 120
# What torch 2.6 says of what it cannot do: FSDP2 on a CPU, splitting a layer whose parameters have longer names or
# whose weight is computed, and DDP that leaves the ranks as they are.
NOT_IN_2_6 = (
    "'Stream' object has no attribute 'record_event'",
    "parameter name can.+t contain",
    "should be used to distribute leaf tensors",
    "unexpected keyword argument 'init_sync'",
)
NO_ANSWER = "no answer in time"
ENDED = "the process has ended"


class Pair:
    """Two ranks of a gloo process group, started when they are first needed and after a failure."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []

    def run(self, function: Callable[..., None], **arguments: Any) -> None:
        """Run ``function(**arguments)`` on both ranks, where `torch.distributed` is initialized.

        Args:
            function: of a test module's top level. It starts under the same seed on every rank.
            arguments: what can be pickled without the test module.

        Where torch 2.6 cannot do it, the test is marked as one that is expected to fail.

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
        if torch.__version__.startswith("2.6."):
            for words in NOT_IN_2_6:
                if any(re.search(words, text) for text in failures.values()):
                    pytest.xfail(f"torch 2.6 cannot do it: {words}")
        if failures:
            raise AssertionError("\n".join(f"On rank {rank}:\n{text}" for rank, text in sorted(failures.items())))

    def _attempt(self, task: bytes) -> dict[int, str]:
        if not self._ranks:
            meeting_point = tempfile.mktemp(prefix="ranks-")
            self._ranks = [Rank(rank, meeting_point) for rank in range(NUM_RANKS)]
        for rank in self._ranks:
            rank.send(task)
        failures = self._failures()
        self._last_ranks = self._ranks
        # Starting takes a while; ranks that have both come to an end outside of a collective can go on.
        if any(text in (NO_ANSWER, ENDED) or "gloo" in text for text in failures.values()):
            self.stop()
        return failures

    def _signals(self, failures: dict[int, str]) -> list[int]:
        """Which signals ended ranks that ended without an answer."""
        codes = [self._last_ranks[rank].process.exitcode for rank, text in failures.items() if text == ENDED]
        return [-code for code in codes if code is not None and code < 0]

    def stop(self) -> None:
        for rank in self._ranks:
            rank.stop()
        self._ranks = []

    def _failures(self) -> dict[int, str]:
        failures: dict[int, str] = {}
        with selectors.DefaultSelector() as waiting:
            for number, rank in enumerate(self._ranks):
                waiting.register(rank.line, selectors.EVENT_READ, number)
            while waiting.get_map():
                # After a failure the other rank may wait for ever: it gets the time to fail for the same reason.
                ready = waiting.select(2 if failures else TASK_TIMEOUT_SECONDS)
                if not ready:
                    unheard = {key.data: NO_ANSWER for key in waiting.get_map().values()}
                    return failures | unheard
                for key, _ in ready:
                    waiting.unregister(key.fileobj)
                    try:
                        failure = self._ranks[key.data].answer()
                    except (EOFError, ConnectionError):
                        failure = ENDED
                    if failure is not None:
                        failures[key.data] = failure
        return failures


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two ranks that run the bodies of tests together."""
    ranks = Pair()
    yield ranks
    ranks.stop()
