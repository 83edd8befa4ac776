"""All weights of a model in a handful of launches, by kernels written in Triton.

Whether they can run here is `is_available`, and whether they are to be used `is_trusted`; nothing else of this package
but `capture` may be imported where Triton is missing (``import spectralnorm`` does not import it).

- `spectralnorm.linalg.cuda.tracking`: `TrackingPlan`, the largest singular values of all weights, as
  `spectralnorm.linalg.track_together`;
- `spectralnorm.linalg.cuda.quotients`: `QuotientPlan`, the division by them and its gradient;
- `spectralnorm.linalg.cuda.storing`: `VectorStore`, what was found copied into the buffers;
- `spectralnorm.linalg.cuda.capture`: which capture of a CUDA graph a stream is in.

A plan is made once for tensors that stay where they are: it remembers addresses, sizes and strides, and holds the
tables that the kernels read. It can be called in a captured CUDA graph.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache, partial

import torch

__all__ = ["is_available", "is_trusted"]

_SWITCH = "SPECTRALNORM_TRITON"
# The first generation that Triton compiles for.
_OLDEST = (7, 0)


def is_available() -> bool:
    """Whether there are a CUDA device and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@cache
def is_trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are to be used on ``device`` for weights of ``dtype``.

    They are if they are available, if the environment variable ``SPECTRALNORM_TRITON`` is not ``0``, and if they have
    computed what torch computes: they are tried once in a process for each, which compiles them (seconds, the first
    time on a machine). Where they fail there is one warning, and torch's own operations do the work.
    """
    if os.environ.get(_SWITCH) == "0" or device.type != "cuda" or not is_available():
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    from spectralnorm.linalg.cuda.quotients import QuotientPlan
    from spectralnorm.linalg.cuda.tracking import TrackingPlan
    from spectralnorm.linalg.kernel_trial import disagreement

    try:
        plans = TrackingPlan, partial(TrackingPlan, is_split=True)  # as for small sets, and for large ones
        reasons = (disagreement(plan, QuotientPlan, device, dtype) for plan in plans)
        reason = next((reason for reason in reasons if reason is not None), None)
    except Exception as error:  # a compiler, a driver and a device take part: whatever they raise, torch can do it
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        warnings.warn(
            f"The Triton kernels of spectralnorm do not work for {dtype} on {device} ({reason}); torch's own "
            f"operations are used, which give the same numbers more slowly. Set {_SWITCH}=0 to leave the kernels out "
            "without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None
