"""Which capture a stream is in, as the driver tells it; on a CPU a function stands in for the driver."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectralnorm.linalg.cuda import capture

CUDA = torch.device("cuda")


def driver(status: int, failed: int = 0) -> Any:
    """That of a stream in this state."""

    def ask(stream: Any, of_status: Any, of_number: Any, *others: Any) -> int:
        assert stream.value == 5
        assert others == (None,) * 4
        of_status._obj.value, of_number._obj.value = status, 2**40 + 3
        return failed

    return ask


@pytest.mark.parametrize(
    ("ask", "expected"),
    [(driver(1), 2**40 + 3), (driver(0), None), (driver(2), None), (driver(1, failed=1), None), (None, None)],
    ids=["in a capture", "in none", "in one that has failed", "refused", "no driver"],
)
def test_it_is_the_number_of_an_active_capture(ask: Any, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_asked", lambda: ask)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    assert capture.capture_id(CUDA) == expected


@pytest.mark.gpu
def test_each_capture_has_a_number_of_its_own() -> None:
    numbers = []
    for _ in range(2):
        assert capture.capture_id(CUDA) is None
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            numbers += [capture.capture_id(CUDA), capture.capture_id(CUDA)]
            torch.zeros(1, device=CUDA)
    assert None not in numbers
    assert numbers[0] == numbers[1]
    assert numbers[2] == numbers[3]
    assert numbers[0] != numbers[2]
