"""What the tests of several processes do when one of them is ended by a signal."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist


def end_rank_0(mark: str, times: int) -> None:
    file = Path(mark)
    count = len(file.read_text()) if file.exists() else 0
    if dist.get_rank() == 0 and count < times:
        file.write_text("x" * (count + 1))
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_rank_that_crashed_once_is_told_and_the_test_run_again(pair, tmp_path):
    with pytest.warns(UserWarning, match=r"a rank was ended by signal \[11\]; run again"):
        pair.run(end_rank_0, mark=str(tmp_path / "mark"), times=1)


def test_a_rank_that_crashes_again_fails_the_test(pair, tmp_path):
    with pytest.warns(UserWarning, match="run again"), pytest.raises(AssertionError, match="rank 0:\nthe process has"):
        pair.run(end_rank_0, mark=str(tmp_path / "mark"), times=9)
