"""The values of a tensor as bytes, to see whether they are the same as before."""

from __future__ import annotations

import ctypes
import hashlib

import torch
from torch import Tensor

__all__ = ["digest_of", "values_of"]


def values_of(tensor: Tensor) -> bytes:
    """All entries in their order, whatever the device and the layout."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        kept = plain.cpu().resolve_conj().resolve_neg().contiguous()
        return ctypes.string_at(kept.data_ptr(), kept.nbytes)  # numpy may not be there


def digest_of(tensor: Tensor) -> bytes | None:
    """A number that two tensors have in common if their values are the same, and only then; None without values."""
    return None if tensor.is_meta else hashlib.sha256(values_of(tensor)).digest()
