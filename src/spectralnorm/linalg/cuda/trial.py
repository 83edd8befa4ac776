"""Whether the kernels do on this machine what torch's own operations do, found out by trying."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.linalg.cuda.quotients import QuotientPlan
from spectralnorm.linalg.cuda.tracking import TrackingPlan
from spectralnorm.linalg.tracking import Frame, track_together

__all__ = ["disagreement"]

_TOLERANCE = 1e-4


def disagreement(device: torch.device) -> str | None:
    """What the kernels compute differently from torch on ``device``, as a sentence; None if nothing.

    Two steps of following, a division and a gradient, of a few small matrices: one for each form of the products that
    the kernels have (aligned or not, either side fast). It waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (24, 136), (9, 21), (136, 24)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    weights[2] = weights[2].t().contiguous().t()
    matrices = [weight.unsqueeze(0) for weight in weights]
    starts = [Frame(torch.randn(1, 8, rows, generator=generator).to(device), True) for rows, _ in shapes]
    tracked = TrackingPlan(matrices).track(starts, num_iterations=2)
    expected = track_together(matrices, starts, [None] * len(starts), num_iterations=2)
    us, vs = tracked.vector_pairs
    plan = QuotientPlan([(weight, 0) for weight in weights], [1.0] * len(weights))
    values = plan.divide(tracked.sigmas).values
    grads = [torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator)) for weight in weights]
    gradients = plan.gradients(grads, values, us, vs, tracked.sigmas)
    for place, (weight, (of_u, of_v, of_sigma, _)) in enumerate(zip(weights, expected, strict=True)):
        sigma, u, v, grad = tracked.sigmas[place], us[place], vs[place], grads[place]
        inner = (grad * weight).sum() / sigma**2
        pairs = {
            "norm": (sigma, of_sigma[0]),
            "left vector": ((u @ of_u[0]).abs(), torch.ones_like(sigma)),
            "right vector": ((v @ of_v[0]).abs(), torch.ones_like(sigma)),
            "quotient": (values[place], weight / sigma),
            "gradient": (gradients[place], grad / sigma - inner * torch.outer(u, v)),
        }
        for name, (found, wanted) in pairs.items():
            if not _is_close(found, wanted):
                return f"the {name} of a {weight.shape[0]} x {weight.shape[1]} matrix differs"
    return None


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    # Not `allclose`: NaN must count as different, and the largest entry sets the scale.
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
