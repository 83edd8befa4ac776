"""Whether the kernels do on this machine what torch's own operations do, found out by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spectralnorm.linalg.precision import full_precision
from spectralnorm.linalg.tracking import Frame, track_together

__all__ = ["disagreement", "undisturbed"]

_TOLERANCE = 1e-4  # of what is computed and kept in float32


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever its first caller has set, for a trial that decides for the whole process: modes and precision."""
    with torch.inference_mode(False), torch.no_grad(), full_precision(device):
        yield


def disagreement(
    tracking_plan: Any,
    quotient_plan: Any,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """What the kernels compute differently from torch; None if nothing.

    Two steps of following, a division and a gradient, of a few small matrices: one for each form of the products that
    the kernels have (aligned or not, either side fast). It waits for the device.

    Args:
        tracking_plan: the class that follows.
        quotient_plan: the class that divides.
        device: of the weights that are tried.
        dtype: their type.

    Returns:
        A clause such as "the norm of a 24 x 136 matrix differs".
    """
    with undisturbed(device):
        return _disagreement(tracking_plan, quotient_plan, device, dtype)


def _disagreement(tracking_plan: Any, quotient_plan: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults are set to
    shapes = (24, 136), (9, 21), (136, 24)
    weights = [torch.randn(shape, generator=generator, **plain).to(device, dtype) for shape in shapes]
    weights[2] = weights[2].t().contiguous().t()
    matrices = [weight.unsqueeze(0) for weight in weights]
    starts = [Frame(torch.randn(1, 8, rows, generator=generator, **plain).to(device), True) for rows, _ in shapes]
    tracked = tracking_plan(matrices).track(starts, num_iterations=2)
    expected = track_together([matrix.float() for matrix in matrices], starts, [None] * len(starts), num_iterations=2)
    us, vs = tracked.vector_pairs
    plan = quotient_plan([(weight, 0) for weight in weights], [1.0] * len(weights))
    values = plan.divide(tracked.sigmas).values
    grads = [
        torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator, **plain)) for weight in weights
    ]
    gradients = plan.gradients(grads, values, us, vs, tracked.sigmas)
    # A half type's entry may be rounded either way, and the inner product of a gradient is of rounded ones.
    rounded = max(_TOLERANCE, 2 * torch.finfo(dtype).eps)
    for place, (weight, (of_u, of_v, of_sigma, _)) in enumerate(zip(weights, expected, strict=True)):
        sigma, u, v, grad = tracked.sigmas[place], us[place], vs[place], grads[place].float()
        inner = (grad * values[place].float()).sum() / sigma
        results = {
            "norm": (sigma, of_sigma[0], _TOLERANCE),
            "left vector": ((u @ of_u[0]).abs(), torch.ones_like(sigma), _TOLERANCE),
            "right vector": ((v @ of_v[0]).abs(), torch.ones_like(sigma), _TOLERANCE),
            "quotient": (values[place].float(), weight.float() / sigma, rounded),
            "gradient": (gradients[place].float(), grad / sigma - inner * torch.outer(u, v), rounded),
        }
        for name, (found, wanted, tolerance) in results.items():
            # Not `allclose`: NaN must count as different, and the largest entry sets the scale.
            if not bool((found - wanted).abs().max() <= tolerance * wanted.abs().max()):
                return f"the {name} of a {weight.shape[0]} x {weight.shape[1]} matrix differs"
    return None
