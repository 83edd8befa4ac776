"""The values of a tensor as bytes, to see whether they are the same as before."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from hashlib import sha256

import torch
from torch import Tensor

__all__ = ["Digests", "digest_of", "values_of"]


def values_of(tensor: Tensor) -> bytes:
    """All entries in their order, whatever the device and the layout."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        kept = plain.cpu().resolve_conj().resolve_neg().contiguous()
        return ctypes.string_at(kept.data_ptr(), kept.nbytes)  # numpy may not be there


def digest_of(tensor: Tensor) -> bytes | None:
    """A number that two tensors have in common only if their shapes and values are the same; None without values.

    If they are, and both were expanded along the same dimensions, they have it in common.
    """
    return None if tensor.is_meta else _digest(*_content(tensor))


class Digests:
    """`digest_of` tensors of which some come often: from the third time on they are compared to a copy, not hashed."""

    def __init__(self) -> None:
        # By where a tensor is, which only says what to compare with: the values decide.
        self._found: dict[Hashable, tuple[bytes, tuple[str, bytes] | None]] = {}

    def of(self, tensor: Tensor) -> bytes | None:
        """As `digest_of`."""
        if tensor.is_meta:
            return None
        is_strided = tensor.layout == torch.strided
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if is_strided else id(tensor)
        content = _content(tensor)
        known, copy = self._found.get(place, (None, None))
        if known is not None and content == copy:
            return known
        digest = _digest(*content)
        self._found[place] = digest, content if digest == known else None
        return digest


def _digest(shape: str, values: bytes) -> bytes:
    return sha256(shape.encode() + sha256(values).digest()).digest()


def _content(tensor: Tensor) -> tuple[str, bytes]:
    """Its shape and values, of dimensions that it was expanded along those at one place."""
    with torch._C.DisableTorchFunctionSubclass():
        kept = tensor.detach()
        if tensor.layout == torch.strided:
            kept = kept[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return f"{tuple(tensor.shape)} {tuple(kept.shape)}", values_of(kept)
