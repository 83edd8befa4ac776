import pytest
import torch

pytest.importorskip("triton")
from spectralnorm.linalg.cuda.launch import relative_addresses, uploaded, written
from spectralnorm.linalg.cuda.storing import VectorStore
from spectralnorm.linalg.cuda.tracking import Ends


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


@pytest.mark.gpu
def test_a_compiled_kernel_is_started_for_other_memory_and_alignment() -> None:
    memory = torch.zeros(64, device="cuda")
    for shift in (0, 0, 1, 0, 1):
        target, ends = torch.zeros(70, device="cuda")[shift : shift + 64], torch.zeros(1, 2, dtype=torch.int64)
        memory.normal_()
        VectorStore().copy_from(Ends(memory, ends.cuda()), [64], [0], torch.ones(1, device="cuda"), [target], eps=1e-9)
        assert torch.equal(target, memory)
        vector = torch.randn(70, device="cuda")[shift : shift + 64]
        VectorStore().copy([vector], [0], torch.ones(1, device="cuda"), [target], eps=1e-9)
        assert torch.equal(target, vector)
