"""Pickles of plain things, read without letting them run anything.

A pickle is a program that may call any function. This reader knows numbers, text, bytes, lists, tuples, dictionaries
and arrays of bytes, as the Python version of CIFAR holds them: each name that such a pickle may ask for is answered by
a stand-in of ours, so that not even NumPy's own code meets what was in the file.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from spectralnorm.errors import UserError

__all__ = ["read_pickle"]


def read_pickle(data: bytes, *, what: str) -> Any:
    """The content of a pickle of Python 2 or 3; names of Python 2 are given as bytes.

    Args:
        data: the pickle.
        what: how messages name it.

    Raises:
        UserError: it is damaged, or asks for anything but plain things.
    """
    try:
        return _plain(_Reader(io.BytesIO(data), encoding="bytes").load())
    except UserError:
        raise
    # A damaged pickle meets the reader in any state: UnpicklingError, EOFError, ValueError, KeyError, TypeError...
    except Exception as error:
        asked = f" ({error})" if isinstance(error, pickle.UnpicklingError) else ""
        raise UserError(
            f"{what} is not a pickle of plain arrays, and nothing else in a pickle is read{asked}; "
            "download it again, or use the binary version."
        ) from error


class _Array:
    """Stands in for an array until its state is there."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "uint8") or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array of something else than bytes")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Dtype:
    """Stands in for a type of numbers: its name is enough."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        del state


def _new_array(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    del encoding  # Python 3 writes bytes for Python 2 in this one encoding
    return text.encode("latin-1")


_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to another file")


def _plain(value: Any) -> Any:
    """The value with arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without content")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
