"""The harness itself: a failure on any rank is a failure of the test, and shows where it happened."""

import pytest
import torch
import torch.distributed as dist


def sum_of_ranks(expected):
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == expected


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("only here")


def test_ranks_compute_together(pair):
    pair.run(sum_of_ranks, expected=1)


def test_failure_of_one_rank_is_reported_with_its_traceback(pair):
    with pytest.raises(AssertionError, match=r"(?s)On rank 1:.*fail_on_rank_one.*only here"):
        pair.run(fail_on_rank_one)
    pair.run(sum_of_ranks, expected=1)
