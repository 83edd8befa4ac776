"""Which capture of a CUDA graph a stream is in.

Torch says whether there is one. What was computed in one capture must not be taken for known in the next, whose graph
is replayed at other times; the driver has a number for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

__all__ = ["capture_id"]

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
# By their versions these take five or six pointers to what they tell, of which all but the first may be null.
_NAMES = "cuStreamGetCaptureInfo_v2", "cuStreamGetCaptureInfo_v3"
_LIBRARIES = "libcuda.so.1", "nvcuda.dll"


def capture_id(device: torch.device) -> int | None:
    """The number of the capture that the current stream of ``device`` is in; None: in none, or nobody can tell."""
    ask = _asked()
    if ask is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    failed = ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None, None)
    return None if failed or status.value != _ACTIVE else number.value


@cache
def _asked() -> Callable[..., int] | None:
    """The function of NVIDIA's driver, which torch has loaded already."""
    for library in _LIBRARIES:
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        for name in _NAMES:
            if hasattr(driver, name):
                return getattr(driver, name)
    return None
