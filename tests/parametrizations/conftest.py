from collections import OrderedDict

import pytest
import torch
from tests.parametrizations.kernel_runs import COMPILED, TRITON

from spectralnorm.linalg import cpu
from spectralnorm.parametrizations import plans


@pytest.fixture(params=["kernels", "plain"])
def engine_or_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """With the kernels of the machine, if there are any, and in torch's own operations."""
    if request.param == "plain":
        monkeypatch.setattr(plans, "are_usable", lambda weight: False)
    elif device.type == "cpu" and not cpu.is_trusted():
        pytest.skip("there is no C compiler")


@pytest.fixture(params=[COMPILED, TRITON])
def with_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    """Each kind of kernels in its turn, and its name; Triton's are interpreted where there is no GPU."""
    kind = request.param
    if kind == COMPILED:
        if device.type != "cpu" or not cpu.is_trusted():
            pytest.skip("the compiled kernels need a CPU and a C compiler")
        return kind
    use_triton(monkeypatch, device)
    return kind


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Triton's kernels, interpreted where there is no GPU."""
    use_triton(monkeypatch, device)


def use_triton(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    pytest.importorskip("triton")
    if device.type == "cpu":
        kernels = plans._kernels_for(torch.device("cuda"))
        monkeypatch.setattr(plans, "are_usable", lambda weight: True)
        monkeypatch.setattr(plans, "_kernels_for", lambda device: kernels)
        monkeypatch.setitem(plans._DTYPES, "cpu", plans._DTYPES["cuda"])
        monkeypatch.setattr(plans, "_plans", OrderedDict())
