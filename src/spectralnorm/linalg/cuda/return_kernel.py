"""Frames copied back to where they were read, for `TrackingPlan.track_in_place`."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# The kernel's body is Triton's language, which looks like Python and is not typed like it.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["RETURNED", "return_kernel"]

RETURNED = 1024  # entries that one program copies

_RETURNED = tl.constexpr(RETURNED)


@triton.jit
def return_kernel(spans, memory, sigmas, eps, frames, REVISION: tl.constexpr):
    """One piece of the frames, if its matrix has a norm."""
    span = spans + 3 * tl.program_id(0)
    sigma = tl.load(sigmas + tl.load(span + 2))
    if (sigma > eps) & (sigma < float("inf")):  # false for NaN
        index = tl.load(span) + tl.arange(0, _RETURNED)
        mask = index < tl.load(span + 1)
        tl.store(frames + index, tl.load(memory + index, mask=mask), mask=mask)
