import pytest
import torch

pytest.importorskip("triton")
from spectralnorm.linalg.cuda.launch import relative_addresses, uploaded, written


@pytest.mark.parametrize("number", [1, 7, 8, 17])
def test_integers_arrive_either_way(number: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.importorskip("triton", minversion="3.3", reason="older interpreters end the process at long integers")
    values = [(-1) ** index * (2**31 - 3 + index) * 3**index for index in range(number)]
    assert uploaded(values, device).tolist() == values
    assert written(values, device).tolist() == values


def test_addresses_are_counted_from_the_first(device: torch.device) -> None:
    memory = torch.zeros(10, device=device)
    assert relative_addresses([memory[3:], memory, memory[9:]]) == [0, -12, 24]
