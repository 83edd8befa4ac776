"""On the CPU Triton's interpreter runs the kernel; with ``--device cuda`` the GPU does."""

import pytest
import torch

pytest.importorskip("triton")
from spectralnorm.linalg.cuda.storing import VectorStore
from spectralnorm.linalg.cuda.tracking import Ends


def test_vectors_go_where_their_norm_is_one(device: torch.device) -> None:
    memory = torch.randn(2100 + 7 + 3 + 5, device=device)
    vectors = list(memory.split([2100, 7, 3, 5]))
    sigmas = torch.tensor([1.0, 0.0, torch.nan, torch.inf], device=device)
    dtypes = torch.float32, torch.bfloat16, torch.float32, torch.float16
    targets = [
        torch.full((len(each),), 7.0, dtype=dtype, device=device) for each, dtype in zip(vectors, dtypes, strict=True)
    ]
    store = VectorStore()
    store.copy(vectors, [0, 1, 2, 3], sigmas, targets, eps=1e-12)
    assert torch.equal(targets[0], vectors[0])
    assert all(bool((target == 7).all()) for target in targets[1:])
    store.copy(vectors, [0, 0, 0, 0], sigmas, targets, eps=1e-12)
    for vector, target in zip(vectors, targets, strict=True):
        # The interpreter cuts bfloat16 off where a GPU rounds.
        torch.testing.assert_close(target.float(), vector, rtol=1.01 * torch.finfo(target.dtype).eps, atol=0)
    # The same places with other numbers.
    memory.normal_()
    store.copy(vectors, [0, 0, 0, 0], sigmas, targets, eps=1e-12)
    assert torch.equal(targets[0], vectors[0])


def test_vectors_that_are_known_by_where_they_are_go_there_too(device: torch.device) -> None:
    memory = torch.randn(9, device=device)
    ends = Ends(memory, torch.tensor([[4, 0], [2, 7]], device=device))
    targets = [torch.zeros(size, device=device) for size in (5, 4, 2, 2)]
    sigmas = torch.tensor([1.0, 0.0], device=device)
    VectorStore().copy_from(ends, [5, 4, 2, 2], [0, 0, 1, 1], sigmas, targets, eps=1e-12)
    assert torch.equal(targets[0], memory[4:])
    assert torch.equal(targets[1], memory[:4])
    assert not targets[2].any()
    assert not targets[3].any()


def test_tables_that_a_graph_reads_stay(device: torch.device) -> None:
    vectors, sigmas = list(torch.randn(2, 3, device=device)), torch.ones(1, device=device)
    places = [[torch.zeros(3, device=device) for _ in range(2)] for _ in range(12)]
    store = VectorStore()
    assert not store.hold([0, 0], places[0])
    for targets in places:
        store.copy(vectors, [0, 0], sigmas, targets, eps=1e-12)
        assert store.hold([0, 0], places[0])
    assert not all(store.hold([0, 0], targets) for targets in places)
    assert all(map(torch.equal, places[-1], vectors))


def test_a_target_of_another_size_is_refused(device: torch.device) -> None:
    vector, sigmas = torch.ones(4, device=device), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"\(4,\) torch\.float32 for \(5,\) torch\.float32"):
        VectorStore().copy([vector], [0], sigmas, [torch.ones(5, device=device)], eps=1e-12)
