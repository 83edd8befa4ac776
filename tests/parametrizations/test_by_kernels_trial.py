"""Kernels are compared with torch before they are trusted."""

import pytest
import torch

from spectralnorm.linalg import kernel_trial
from spectralnorm.parametrizations.plans import _kernels_for


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("result", ["norm", "quotient", "gradient"])
@pytest.mark.usefixtures("with_kernels")
def test_kernels_that_compute_something_else_are_found_out(
    result: str, factor: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = _kernels_for(device)
    track = kernel_trial.track_together

    class Wrong(plans.QuotientPlan):
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
    found = kernel_trial.disagreement(plans.TrackingPlan, Wrong, device)
    assert found == f"the {result} of a 24 x 136 matrix differs"
