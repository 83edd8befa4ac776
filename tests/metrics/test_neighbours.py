"""Nearest images by pixels, against a loop over all pairs in whole numbers."""

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import nearest_neighbours, neighbours


def noise(num: int, channels: int = 1, size: int = 8, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


def all_squares(queries: Tensor, candidates: Tensor) -> Tensor:
    differences = queries.long()[:, None] - candidates.long()[None]
    return differences.square().flatten(2).sum(2)


@pytest.mark.parametrize("chunk_bytes", [2**26, 8 * 3 * 64 * 7], ids=["one chunk", "many chunks"])
def test_neighbours_agree_with_a_comparison_of_all_pairs(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", chunk_bytes)
    queries, candidates = noise(10, 3), noise(33, 3, seed=1)
    indices, distances = nearest_neighbours(queries, candidates, k=5)
    squares, order = all_squares(queries, candidates).sort(dim=1, stable=True)
    assert torch.equal(indices, order[:, :5])
    assert torch.equal(distances, squares[:, :5].double().sqrt())


def test_a_copy_is_found_at_distance_exactly_zero() -> None:
    candidates = noise(50, size=64)
    indices, distances = nearest_neighbours(candidates[[17, 3]], candidates)
    assert indices.tolist() == [[17], [3]]
    assert distances.tolist() == [[0.0], [0.0]]


def test_a_difference_of_one_level_in_one_pixel_is_told_from_a_copy() -> None:
    image = noise(1, 3, 64)
    other = image.clone()
    other[0, 0, 0, 0] ^= 1
    _, distances = nearest_neighbours(image, other)
    assert distances.item() == 1.0


@pytest.mark.parametrize("chunk_bytes", [2**26, 8 * 64], ids=["one chunk", "one candidate a chunk"])
def test_of_equally_near_candidates_the_first_counts(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", chunk_bytes)
    candidates = noise(1).expand(9, -1, -1, -1)
    indices, _ = nearest_neighbours(noise(2, seed=1), candidates, k=3)
    assert indices.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_images_of_different_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"uint8 \(2, 1, 8, 8\) as queries and uint8 \(2, 1, 9, 9\) as candidates"):
        nearest_neighbours(noise(2), noise(2, size=9))


def test_images_of_another_type_are_refused() -> None:
    with pytest.raises(UserError, match="must be uint8 of one size"):
        nearest_neighbours(noise(2).float(), noise(2))


@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_candidates_are_refused(k: int) -> None:
    with pytest.raises(UserError, match=f"k must be from 1 to the 3 candidates, got {k}"):
        nearest_neighbours(noise(2), noise(3), k=k)
