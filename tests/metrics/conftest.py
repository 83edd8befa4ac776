"""What the tests of the metrics share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def images() -> Tensor:
    """Gray noise, uint8 (6, 1, 32, 32)."""
    return torch.randint(0, 256, (6, 1, 32, 32), dtype=torch.uint8)
