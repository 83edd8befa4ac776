"""What is kept between evaluations, and what is not."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectralnorm.metrics import cache as cache_module
from spectralnorm.metrics.cache import hash_of, remember


def entries(cache: Path) -> set[str]:
    return {file.name for file in (cache / "features").iterdir()}


def never() -> dict[str, Tensor]:
    raise AssertionError("computed again")


def test_what_was_computed_is_read_back_bit_for_bit(cache: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(0.1, dtype=torch.float64)}
    remember("key", lambda: tensors)
    found = remember("key", never)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_only_whole_entries_are_left(cache: Path) -> None:
    remember("key", lambda: {"a": torch.zeros(3)})
    assert entries(cache) == {"key.safetensors"}


def test_entries_not_used_for_longest_make_way(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, key in enumerate(("young", "old", "oldest")):
        remember(key, lambda: {"a": torch.zeros(1000)})
        file = cache / "features" / f"{key}.safetensors"
        os.utime(file, (1e9 - age, 1e9 - age))
    remember("oldest", never)  # used just now
    monkeypatch.setattr(cache_module, "MAX_BYTES", 3 * 4200)
    remember("new", lambda: {"a": torch.zeros(1000)})
    assert entries(cache) == {"oldest.safetensors", "young.safetensors", "new.safetensors"}


def test_what_is_larger_than_the_cache_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_BYTES", 100)
    remember("key", lambda: {"a": torch.zeros(1000)})
    assert not cache.exists()


def test_the_cache_lies_where_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRALNORM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    remember("key", lambda: {"a": torch.zeros(3)})
    assert (tmp_path / "elsewhere" / "spectralnorm" / "features" / "key.safetensors").exists()


def test_without_a_home_everything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPECTRALNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert remember("key", lambda: {"a": torch.ones(3)})["a"].sum() == 3


def test_a_hash_tells_images_apart_by_every_pixel_and_by_shape() -> None:
    images = torch.zeros(1500, 1, 2, 2, dtype=torch.uint8)
    changed = images.clone()
    changed[1499, 0, 1, 1] = 1
    hashes = {hash_of("x", images=part) for part in (images, changed, images.view(1500, 1, 1, 4), images[:1499])}
    assert len(hashes) == 4


def test_a_hash_does_not_depend_on_how_images_lie_in_memory() -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert hash_of(images=strided) == hash_of(images=images)
