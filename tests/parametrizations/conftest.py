import pytest
import torch

from spectralnorm.linalg import cpu
from spectralnorm.parametrizations import by_kernels


@pytest.fixture(params=["kernels", "plain"])
def engine_or_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """With the kernels of the machine, if there are any, and in torch's own operations."""
    if request.param == "plain":
        monkeypatch.setattr(by_kernels, "are_usable", lambda weight: False)
    elif device.type == "cpu" and not cpu.is_trusted():
        pytest.skip("there is no C compiler")
