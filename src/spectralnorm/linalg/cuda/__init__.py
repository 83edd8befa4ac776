"""All weights of a model in a handful of launches, by kernels written in Triton.

Whether they can run here is `is_available`; nothing else of this package may be imported where Triton is missing
(``import spectralnorm`` does not import it).

- `spectralnorm.linalg.cuda.tracking`: `TrackingPlan`, the largest singular values of all weights, as
  `spectralnorm.linalg.track_together`;
- `spectralnorm.linalg.cuda.quotients`: `QuotientPlan`, the division by them and its gradient.

A plan is made once for tensors that stay where they are: it remembers addresses, sizes and strides, and holds the
tables that the kernels read. It can be called in a captured CUDA graph.
"""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["is_available"]


def is_available() -> bool:
    """Whether there are a CUDA device and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
