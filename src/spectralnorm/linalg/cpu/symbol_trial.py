"""Whether the kernels bound convolutions on this machine as torch's own operations do, found out by trying."""

from __future__ import annotations

import torch

from spectralnorm.linalg.cpu.panels import PackedKernel, PanelGrams
from spectralnorm.linalg.symbol_grams import SymbolGrams, SymbolTables
from spectralnorm.linalg.torus import OnTorus

__all__ = ["symbol_disagreement"]

_TOLERANCE = 1e-4
# (groups, rows, columns, *taps) and the torus: with and without interpolation, each longer than what is summed at once.
_CASES = (((1, 70, 75, 2, 3), (5, 6)), ((2, 11, 70, 3), (4,)))


@torch.no_grad()
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
        (panels,) = PanelGrams(PackedKernel(OnTorus(parts, sizes, 1.0, 0.0)), 0, tables)
        eigenvalues, eigenvectors = torch.linalg.eigh(batch.matrices)
        largest = eigenvalues[:, -1]
        values, vectors = panels.rayleigh(1, eigenvectors[:, :, -1].conj().to(torch.complex64))
        cosines = (eigenvectors[:, :, -1] * vectors).sum(-1).abs()
        size = f"of a {rows} x {rows} matrix"
        if len(panels) != tables.num_frequencies * groups:
            return f"there are {len(panels)} Gram matrices and not {tables.num_frequencies * groups}"
        if not bool(((values - largest).abs() <= _TOLERANCE * largest).all()):
            return f"the largest eigenvalue {size} differs"
        if not bool((cosines >= 1 - _TOLERANCE).all()):
            return f"the leading eigenvector {size} differs"
        for share in (1 - 10 * _TOLERANCE, 1 + 10 * _TOLERANCE):
            for place in range(len(panels)):
                square = float(largest[place]) * share
                is_clear = (largest - square).abs() > _TOLERANCE * largest
                passed = panels.have_factor(square)
                if not bool((passed == (largest < square))[is_clear].all()):
                    return f"a factorization {size} ends otherwise"
    return None
