"""What is asked of Triton's kernels alone."""

import warnings

import pytest
import torch
from tests.parametrizations.kernel_runs import TRITON
from torch import nn

import spectralnorm as sn
from spectralnorm.linalg import MatrixView, cuda, kernel_trial
from spectralnorm.parametrizations import plans

pytest.importorskip("triton")
from spectralnorm.linalg.cuda import launch as launching
from spectralnorm.linalg.cuda import quotients, storing
from spectralnorm.linalg.cuda import tracking as kernels_of_tracking


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_torch(dtype: torch.dtype, device: torch.device) -> None:
    plans = kernels_of_tracking.TrackingPlan, quotients.QuotientPlan
    assert kernel_trial.disagreement(*plans, device, dtype) is None


def test_kernels_that_fail_are_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> str:
        raise OSError("no compiler")

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_trial, "disagreement", refuse)
    pretended = torch.device("cuda", 7), torch.float32  # of which nothing is remembered
    cuda.is_trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"float32 on cuda:7 \(OSError: no compiler\).*SPECTRALNORM_TRITON=0"):
        assert not cuda.is_trusted(*pretended)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda.is_trusted(*pretended)
        cuda.is_trusted.cache_clear()
        monkeypatch.setenv("SPECTRALNORM_TRITON", "0")
        assert not cuda.is_trusted(*pretended)
    cuda.is_trusted.cache_clear()


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)
@pytest.mark.parametrize("number", [2, 5])
def test_launches_of_a_step_do_not_depend_on_the_number_of_layers(
    number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Linear(9 + index % 3, 10, bias=False) for index in range(number)]
    model = sn.add_spectral_norm(nn.ModuleList([*layers, nn.Conv2d(4, 6, 3, groups=2, bias=False)])).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 4, 3, 3, device=device)
    launches: list[str] = []

    def counted(kernel, *arguments, **options):
        launches.append(kernel.fn.__name__)
        return launch(kernel, *arguments, **options)

    launch = launching.launch
    for module in (quotients, storing, kernels_of_tracking):
        monkeypatch.setattr(module, "launch", counted)
    for _ in range(3):
        launches.clear()
        optimizer.zero_grad()
        sum(layer.weight.square().sum() for layer in model[:-1]).add(model[-1](images).sum()).backward()
        optimizer.step()
    assert len(launches) == len(set(launches)) == 7  # with those of the backward


def test_weights_that_are_too_large_for_the_kernels_are_left_to_torch() -> None:
    view = MatrixView(0, 1)
    for shape, is_read in {(2**27, 1): True, (2**27 + 4, 1): False, (4, 2**28): False}.items():
        assert plans._has_layout(view, torch.Size(shape), (shape[1], 1), False) is is_read
        assert plans._has_layout(view, torch.Size(shape), (shape[1], 1), True)
