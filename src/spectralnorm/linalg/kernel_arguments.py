"""What the kernels of every kind of device take, brought into form or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.layout import Layout, is_dense
from spectralnorm.linalg.tracking import NUM_TRACKED, Frame

__all__ = ["packed_frames", "require_countable", "require_dense", "require_target", "require_vectors", "rule_of"]

# Eight rows of a side, in as many parts as a product with so many entries has, are fewer than 2^31.
_LONGEST, _MOST_ENTRIES = 2**27, 2**35


def packed_frames(frames: Sequence[Frame], shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """The rows of all frames one after the other.

    Args:
        frames: float32 rows, (batch, 8, out or in).
        shapes: of the tensors they belong to: (batch, out, in).

    Raises:
        ValueError: their number, or a frame's shape or type is another.
    """
    if len(frames) != len(shapes):
        raise ValueError(f"Expected a frame for each of {len(shapes)} tensors, got {len(frames)}.")
    for (rows, is_left), (batch, num_rows, num_columns) in zip(frames, shapes, strict=True):
        shape = (batch, NUM_TRACKED, num_rows if is_left else num_columns)
        if rows.shape != shape or rows.dtype != torch.float32:
            raise ValueError(f"Expected frame rows of shape {shape} in float32, got {tuple(rows.shape)} {rows.dtype}.")
    return torch.cat([frame.rows.flatten() for frame in frames])


def require_countable(layout: Layout) -> None:
    """Refuse matrices that are too large for kernels that count in 32 bits.

    Raises:
        ValueError: a side, of all matrices together, has more than 2^27 entries, or a matrix more than 2^35.
    """
    rows, columns = layout.rows, layout.columns
    if layout.batch * max(rows, columns) > _LONGEST or rows * columns > _MOST_ENTRIES:
        raise ValueError(
            f"Kernels that count in 32 bits take sides of up to {_LONGEST} entries and matrices of up to "
            f"{_MOST_ENTRIES}, got {layout.batch} of {rows} x {columns}."
        )


def require_dense(weight: Tensor) -> None:
    """Refuse a weight that is no matrix or has gaps in memory.

    Raises:
        ValueError: it is one.
    """
    if weight.ndim < 2 or not is_dense(weight):
        raise ValueError(
            "weights must have at least two dimensions and no gaps in memory, got "
            f"shape {tuple(weight.shape)} with strides {weight.stride()}."
        )


def require_vectors(us: Iterable[Tensor], vs: Iterable[Tensor], sizes: Iterable[tuple[int, int]]) -> None:
    """Refuse vectors u and v that are not contiguous float32 of their ``sizes``.

    Raises:
        ValueError: one is not.
    """
    for u, v, of_both in zip(us, vs, sizes, strict=True):
        for vector, size in zip((u, v), of_both, strict=True):
            if vector.shape != (size,) or vector.dtype != torch.float32 or not vector.is_contiguous():
                raise ValueError(
                    f"Expected a contiguous float32 vector of {size}, got {tuple(vector.shape)} of {vector.dtype}."
                )


def require_target(vector: Tensor, target: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse to store a vector where it does not fit.

    Raises:
        ValueError: the vector is not contiguous float32, or the target has another size, none of ``dtypes``, or gaps.
    """
    fits = target.numel() == vector.numel() and target.is_contiguous() and target.dtype in dtypes
    if not fits or vector.dtype != torch.float32 or not vector.is_contiguous():
        raise ValueError(
            "Expected contiguous float32 vectors and targets of their sizes, got "
            f"{tuple(vector.shape)} {vector.dtype} for {tuple(target.shape)} {target.dtype}."
        )


def rule_of(coefficient: float, cap: bool, eps: float) -> tuple[float, float, float]:
    """What a norm is divided by, above which norm it is divided at all, and by what the weight is divided else."""
    return coefficient, max(coefficient, eps) if cap else eps, 1.0 if cap else 1 / coefficient
