"""Vectors of many weights copied to where they are kept, in one call, each only if its norm is one.

store = VectorStore()
store.copy(vectors, owners, sigmas, buffers, eps=1e-12)

A weight that is zero or not finite has no singular vectors: what was kept of it stays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.compiled import kernels
from spectralnorm.linalg.cpu.tables import Ends, for_one_call, integers
from spectralnorm.linalg.kernel_arguments import require_target

__all__ = ["VectorStore"]


class VectorStore:
    """Has nothing to remember; a class, because that of `spectralnorm.linalg.cuda` has."""

    def copy(
        self,
        vectors: Sequence[Tensor],
        owners: Sequence[int],
        sigmas: Tensor,
        targets: Sequence[Tensor],
        *,
        eps: float,
    ) -> None:
        """Write each vector into its target if ``eps < sigmas[owner] < inf``.

        Args:
            vectors: contiguous, float32.
            owners: for each which norm is asked.
            sigmas: float32, 1-D.
            targets: for each where it goes: contiguous, as many entries, float32.
            eps: a norm up to here counts as zero.

        Raises:
            ValueError: a target has another size, another type or gaps.
        """
        for vector, target in zip(vectors, targets, strict=True):
            require_target(vector, target, (torch.float32,))
        sources = Ends(None, integers([vector.data_ptr() for vector in vectors]))
        sizes = integers([target.numel() for target in targets])
        self.copy_from(sources, sizes, integers(list(owners)), sigmas, targets, eps=eps)

    def copy_from(
        self,
        sources: Ends,
        sizes: Tensor,
        owners: Tensor,
        sigmas: Tensor,
        targets: Sequence[Tensor],
        *,
        eps: float,
    ) -> None:
        """As `copy`, of checked vectors that are given by where they are and their sizes."""
        addresses = for_one_call([target.data_ptr() for target in targets])
        self.write(sources, sizes, owners, sigmas, addresses, eps=eps)

    def write(
        self, sources: Ends, sizes: Tensor, owners: Tensor, sigmas: Tensor, addresses: array[int], *, eps: float
    ) -> None:
        """As `copy_from`, where the targets are given by their addresses too."""
        sigmas = sigmas.contiguous()  # a copy has to be there until the kernel has read it
        kernels().spectralnorm_store(
            sources.table.data_ptr(),
            sources.beginning,
            addresses.buffer_info()[0],
            sizes.data_ptr(),
            owners.data_ptr(),
            len(addresses),
            sigmas.data_ptr(),
            eps,
        )
