"""A weight seen as a matrix, output dimension first.

The spectral norm of Miyato et al. 2018 is that of the weight reshaped to a matrix with one row per output. Which
dimension is the output, and whether the matrix is one or falls into blocks (a grouped convolution is block diagonal, so
its norm is the largest of its blocks'), depends on the kind of layer and is settled here once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

__all__ = ["MatrixView", "view_of"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How a weight is read as a matrix.

    Attributes:
        out_dim: the weight's dimension that counts outputs; the rows.
        groups: number of diagonal blocks, which follow each other along the weight's dimension 0.
    """

    out_dim: int = 0
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix, columns in torch's order; a view where the strides allow one.

        Args:
            weight: (out, in, *kernel), or with ``out_dim=1`` (in, out, *kernel); two or more dimensions.

        Returns:
            (out, in * kernel), or (groups, out / groups, in / groups * kernel) for ``groups > 1``.
        """
        columns = [dim for dim in range(self.groups > 1, weight.ndim + (self.groups > 1)) if dim != self._row_dim()]
        return self._matrix(weight, columns)

    def memory_matrix(self, weight: Tensor) -> Tensor:
        """As `matrix`, with the columns in the order in which they lie in memory.

        For a weight in ``channels_last`` this is a view where `matrix` has to copy. Its right singular vectors are
        those of `matrix` with their entries in another order; `whole_vectors` puts them back.
        """
        layout = self._layout(weight)
        if layout.is_dense:
            shape = layout.shape if self.groups > 1 else layout.shape[1:]
            return weight.as_strided(shape, layout.strides[-len(shape) :])
        return self._matrix(weight, layout.columns_in_memory)

    def memory_blocks(self, weight: Tensor) -> Tensor:
        """As `memory_matrix`, with the dimension of the groups also where there is only one: (groups, out, in)."""
        matrix = self.memory_matrix(weight)
        return matrix if self.groups > 1 else matrix.unsqueeze(0)

    def blocks_of_columns(self, weight: Tensor) -> Tensor:
        """A view of ``weight`` as (groups, out, *columns), its columns in as many dimensions as they have."""
        if self.groups == 1:
            return weight.movedim(self.out_dim, 0).unsqueeze(0)
        return self._blocked(weight).movedim(self._row_dim(), 1)

    def is_dense_in(self, weight: Tensor) -> bool:
        """Whether `memory_matrix` is a single matrix that lies in the weight's memory without a gap."""
        return self.groups == 1 and self._layout(weight).is_dense

    def whole_vectors(self, u: Tensor, v: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors of `memory_blocks` as those of the whole weight, in torch's shapes and order.

        For several blocks they are the largest block's, zero elsewhere, so that ``u @ whole_matrix @ v`` is its norm.

        Args:
            u: (groups, out / groups).
            v: (groups, in / groups * kernel), in the order of `memory_blocks`.
            sigma: (groups,).
            weight: the weight they belong to, for its shape and strides.

        Returns:
            u, v of `whole_shape`, and the scalar sigma.
        """
        return self.vectors_of_largest(u, self.in_torch_order(v, weight), sigma)

    def in_torch_order(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Entries over the columns of `memory_blocks`, in the last dimension, in the order of `matrix`."""
        layout = self._layout(weight)
        return _reordered(rows, layout.columns_in_memory, layout.columns, self._blocked(weight).shape)

    def in_memory_order(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The inverse of `in_torch_order`."""
        layout = self._layout(weight)
        return _reordered(rows, layout.columns, layout.columns_in_memory, self._blocked(weight).shape)

    def vectors_of_largest(self, u: Tensor, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `whole_vectors`, for ``v`` in torch's order already."""
        if self.groups == 1:
            return u[0], v[0], sigma[0]
        # NaN would never be the largest by comparison with another NaN: argmax takes it as the largest, which is right,
        # because a weight with a NaN in one block has no norm.
        largest = sigma.argmax()
        is_largest = (torch.arange(self.groups, device=sigma.device) == largest).to(u.dtype)
        # The vector along whose dimension the blocks lie is filled up with zeros, the other one is the block's own.
        if self.out_dim == 0:
            return (u * is_largest[:, None]).flatten(), is_largest @ v, sigma.amax()
        return is_largest @ u, (v * is_largest[:, None]).flatten(), sigma.amax()

    def block_vectors(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Undo `whole_vectors`: the vectors of the one block that they belong to, in torch's order, and which it is.

        Args:
            u: (out,).
            v: (in * kernel,).

        Returns:
            u of (out / groups,), v of (in / groups * kernel,), and (groups,) booleans.
        """
        filled, own = (u, v) if self.out_dim == 0 else (v, u)
        blocks = filled.view(self.groups, -1)
        block, is_theirs = blocks.sum(0), blocks.abs().amax(-1) > 0
        return (block, own, is_theirs) if self.out_dim == 0 else (own, block, is_theirs)

    def is_of_one_block(self, u: Tensor, v: Tensor) -> bool:
        """Whether whole vectors are those of one block, as `whole_vectors` returns them, and not of all together.

        Waits for the device, if there is more than one block.
        """
        filled = u if self.out_dim == 0 else v
        if self.groups == 1 or filled.is_meta or filled.shape[0] % self.groups:
            return True  # of one block only, or not of a weight that is seen like this
        return int(filled.view(self.groups, -1).count_nonzero(-1).count_nonzero()) <= 1

    def whole_matrix(self, weight: Tensor) -> Tensor:
        """The matrix without blocks, as torch reads it: (out, everything else)."""
        return MatrixView(self.out_dim).matrix(weight)

    def whole_shape(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of `whole_matrix`."""
        rows = weight.shape[self.out_dim]
        return rows, math.prod(weight.shape) // rows if rows else 0

    def outer_factors(self, u: Tensor, v: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``u`` and ``v`` of the whole weight, shaped so that their product broadcasts to u v^H as a weight."""
        rest = [size for dim, size in enumerate(shape) if dim != self.out_dim]
        row_shape = [1] * len(shape)
        row_shape[self.out_dim] = -1
        return u.reshape(row_shape), v.conj().reshape(rest).unsqueeze(self.out_dim)

    def _blocked(self, weight: Tensor) -> Tensor:
        return weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))

    def _row_dim(self) -> int:
        return self.out_dim if self.groups == 1 else self.out_dim + 1

    def _layout(self, weight: Tensor) -> _Layout:
        blocks = self._blocked(weight)
        return _layout(self._row_dim(), self.groups > 1, tuple(blocks.shape), blocks.stride())

    def _matrix(self, weight: Tensor, column_dims: Sequence[int]) -> Tensor:
        row = self._row_dim()
        if self.groups == 1:
            return weight.permute(row, *column_dims).reshape(weight.shape[row], -1)
        blocks = self._blocked(weight)
        return blocks.permute(0, row, *column_dims).reshape(self.groups, blocks.shape[row], -1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the columns of the matrix lie in memory.

    Attributes:
        columns: dimensions of the blocked weight that count columns, in torch's order.
        columns_in_memory: the same, the one with the largest stride first.
        is_dense: whether the matrix in memory order is a view without gaps, rows outside of columns.
        shape: of the blocks: (groups, out, in).
        strides: of that view.
    """

    columns: tuple[int, ...]
    columns_in_memory: tuple[int, ...]
    is_dense: bool
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]


def _reordered(rows: Tensor, now: tuple[int, ...], then: tuple[int, ...], sizes: Sequence[int]) -> Tensor:
    if now == then:
        return rows
    leading = rows.ndim - 1
    unflattened = rows.unflatten(-1, [sizes[dim] for dim in now])
    return unflattened.permute(*range(leading), *(leading + now.index(dim) for dim in then)).flatten(leading)


@lru_cache(maxsize=4096)
def _layout(row: int, has_blocks: bool, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Layout:
    """Of a blocked weight of this shape and strides; asked for at every renewal, so it is remembered."""
    columns = tuple(dim for dim in range(has_blocks, len(shape)) if dim != row)
    in_memory = tuple(sorted(columns, key=lambda dim: -strides[dim]))
    groups = shape[0] if has_blocks else 1
    width = math.prod(shape[dim] for dim in columns)
    expected, is_dense = 1, True
    for dim in reversed((*((0,) if has_blocks else ()), row, *in_memory)):
        is_dense &= strides[dim] == expected or shape[dim] == 1
        expected *= shape[dim]
    return _Layout(columns, in_memory, is_dense, (groups, shape[row], width), (shape[row] * width, width, 1))


def view_of(module: nn.Module, weight: Tensor, dim: int | None = None) -> MatrixView:
    """How ``module`` uses ``weight``: which dimension counts outputs, and in how many blocks.

    Args:
        module: the layer that owns the weight.
        weight: one of its parameters.
        dim: the output dimension; None: 1 for transposed convolutions, else 0 (torch's rule).

    Raises:
        IndexError: ``dim`` is not a dimension of the weight.
    """
    natural_dim = 1 if isinstance(module, _TRANSPOSED) and weight.ndim > 1 else 0
    if dim is None:
        dim = natural_dim
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            f"dim must lie in [{-weight.ndim}, {weight.ndim - 1}] for a {weight.ndim}-D weight, got {dim}."
        )
    out_dim = dim % weight.ndim
    # Blocks are only meant where rows are outputs, and only of the kernel: a bias has none, nor what a subclass adds.
    in_blocks = out_dim == natural_dim and _is_kernel(module, weight)
    return MatrixView(out_dim, int(module.groups) if in_blocks else 1)  # type: ignore[arg-type]


def _is_kernel(module: nn.Module, weight: Tensor) -> bool:
    if not isinstance(module, _CONVOLUTIONS):
        return False
    channels = (module.out_channels, module.in_channels // module.groups)
    if module.transposed:
        channels = (module.in_channels, module.out_channels // module.groups)
    return tuple(weight.shape) == (*channels, *module.kernel_size)
