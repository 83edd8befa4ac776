"""Kernels are compared with torch before they are trusted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from tests.parametrizations.kernel_runs import COMPILED

from spectralnorm.linalg import kernel_trial
from spectralnorm.linalg.cpu import symbol_trial
from spectralnorm.parametrizations import plans


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("result", ["norm", "quotient", "gradient"])
@pytest.mark.usefixtures("with_kernels")
def test_kernels_that_compute_something_else_are_found_out(
    result: str, factor: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = plans._kernels_for(device)
    track = kernel_trial.track_together

    class Wrong(kernels.QuotientPlan):
        def divide(self, *arguments):
            found = super().divide(*arguments)
            return found._replace(values=[each * factor for each in found.values]) if result == "quotient" else found

        def gradients(self, *arguments):
            found = super().gradients(*arguments)
            return [each * factor for each in found] if result == "gradient" else found

    if result == "norm":
        # The reference in place of the kernels: what counts is that they differ.
        monkeypatch.setattr(
            kernel_trial,
            "track_together",
            lambda *a, **k: [each._replace(sigma=each.sigma * factor) for each in track(*a, **k)],
        )
    found = kernel_trial.disagreement(kernels.TrackingPlan, Wrong, device)
    assert found == f"the {result} of a 24 x 136 matrix differs"


@contextmanager
def other_settings(device: torch.device) -> Iterator[None]:
    """What a caller may have set, all at once."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.device("meta"), torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=["grad", "inference"])
def test_what_the_caller_has_set_does_not_change_a_trial(
    mode: Callable[[], AbstractContextManager[object]], with_kernels: str, device: torch.device
) -> None:
    kernels = plans._kernels_for(device)
    with other_settings(device), mode():
        assert kernel_trial.disagreement(kernels.TrackingPlan, kernels.QuotientPlan, device) is None
        if with_kernels == COMPILED:
            assert symbol_trial.symbol_disagreement() is None
