"""Whether the kernels bound convolutions on this machine as torch's own operations do, found out by trying."""

from __future__ import annotations

import torch

from spectralnorm.linalg.cpu.panels import PackedKernel, PanelGrams, kernel_layout
from spectralnorm.linalg.hermitian_batch import Effort
from spectralnorm.linalg.kernel_trial import undisturbed
from spectralnorm.linalg.symbol_grams import SymbolGrams, SymbolTables

__all__ = ["symbol_disagreement"]

_TOLERANCE = 1e-4
# (groups, rows, columns, *taps) and the torus: with and without interpolation, each longer than what is summed at once.
_CASES = (((1, 70, 75, 2, 3), (5, 6)), ((2, 11, 70, 3), (4,)))


@undisturbed(torch.device("cpu"))
def symbol_disagreement() -> str | None:
    """What the kernels compute differently from torch; None if nothing.

    Power iteration from an eigenvector, and factorizations a little above and below the largest eigenvalue, of a few
    small convolutions.

    Returns:
        A clause such as "a factorization of a 70 x 70 matrix ends otherwise".
    """
    generator = torch.Generator().manual_seed(0)
    for shape, sizes in _CASES:
        parts = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        tables = SymbolTables(shape[3:], sizes, parts.device)
        groups, rows = shape[:2]
        taps = parts.flatten(3).movedim(-1, 0).double().contiguous()
        (batch,) = SymbolGrams(taps, tables, chunk_bytes=2**30)
        (panels,) = PanelGrams(PackedKernel(parts, kernel_layout(parts, len(sizes))), 0, tables)
        eigenvalues, eigenvectors = torch.linalg.eigh(batch.matrices)
        largest = eigenvalues[:, -1]
        size = f"of a {rows} x {rows} matrix"
        if len(panels) != tables.num_frequencies * groups:
            return f"there are {len(panels)} Gram matrices and not {tables.num_frequencies * groups}"
        start = eigenvectors[:, :, -1].conj().to(torch.complex64)
        for place in range(len(panels)):
            one = torch.tensor([place], device="cpu")
            value, vectors = panels[one].followed(Effort(1, 0, 0), start[one])
            if not abs(value - float(largest[place])) <= _TOLERANCE * float(largest[place]):
                return f"the largest eigenvalue {size} differs"
            if not bool((vectors * start[one].conj()).sum().abs() >= 1 - _TOLERANCE):
                return f"the leading eigenvector {size} differs"
            for share in (1 - 10 * _TOLERANCE, 1 + 10 * _TOLERANCE):
                square = float(largest[place]) * share
                has_none = torch.zeros(len(panels), dtype=torch.bool, device="cpu")
                failed = panels.without_factor(square)
                if failed is not None:
                    has_none[failed] = True
                is_clear = (largest - square).abs() > _TOLERANCE * largest
                if not torch.equal(has_none[is_clear], (largest > square)[is_clear]):
                    return f"a factorization {size} ends otherwise"
    return None
