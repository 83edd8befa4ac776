"""Products of float32 matrices that are rounded to float32, whatever faster ones the user allowed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "is_full_precision"]

_FULL = ("ieee", "none")


def is_full_precision(device: torch.device) -> bool:
    """Whether products of float32 matrices on ``device`` are rounded to float32: neither TF32 nor bfloat16.

    A constant inside ``torch.compile``, which compiles anew where the setting has changed.
    """
    settings = _settings(device)
    if settings is None:
        return torch.get_float32_matmul_precision() == "highest"
    return settings.fp32_precision in _FULL


# What torch.compiler.assume_constant_result does, which would import the whole compiler for it.
is_full_precision._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, and float32 products rounded to float32. Inside ``torch.compile`` the latter is left as it is.

    The setting is torch's, of the whole process: what other threads multiply in the meantime is as precise.
    """
    # A setting cannot change within a compiled graph; callers ask is_full_precision there. Nor can the compiler of
    # torch 2.6 look into a context that is a generator.
    if torch.compiler.is_compiling() or is_full_precision(device):
        return torch.autocast(device.type, enabled=False)
    return _raised(device)


@contextmanager
def _raised(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        settings = _settings(device)
        if settings is None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        before = settings.fp32_precision
        # It may be inherited from the setting for everything, and then is left to inherit again.
        inherited = before == torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = "none" if inherited else before


def _settings(device: torch.device) -> Any:
    """Where torch from 2.9 has the precision of products on ``device``; None: an older torch."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    # The older object raises AssertionError for a name it does not know.
    try:
        return matmul if matmul is not None and matmul.fp32_precision is not None else None
    except (AttributeError, AssertionError):
        return None
