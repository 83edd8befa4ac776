"""Nearest images by pixels: whether a generated image is a copy of a training image."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["nearest_neighbours"]

# Of one chunk of images in float64, of which there are two, and of their distances.
_CHUNK_BYTES = 2**26
_MAX_QUERIES = 1024


@torch.inference_mode()
def nearest_neighbours(queries: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the candidates nearest to each query: the root of the sum of squared pixel differences, levels 0 to 255.

    Exact: squares of whole numbers add up in float64 without rounding. Of equally near candidates the first counts.
    Works through both sets in chunks, so that candidates may be memory-mapped and larger than memory.

    Args:
        queries: uint8 (n, channels, height, width).
        candidates: uint8 (m, channels, height, width), the same size of image.
        k: neighbours of each query, at most m.

    Returns:
        Indices int64 (n, k) into the candidates and distances float64 (n, k), nearest first, on the CPU.

    Raises:
        UserError: the images differ in type or size, or there are fewer than k candidates.
    """
    if queries.dtype != torch.uint8 or candidates.dtype != torch.uint8 or queries.shape[1:] != candidates.shape[1:]:
        raise UserError(
            "Images to compare must be uint8 of one size, "
            f"got {_describe(queries)} as queries and {_describe(candidates)} as candidates."
        )
    if not 1 <= k <= len(candidates):
        raise UserError(f"k must be from 1 to the {len(candidates)} candidates, got {k}.")
    chunk = max(1, _CHUNK_BYTES // (8 * max(1, queries[0].numel()))) if len(queries) else 1
    parts = [_nearest(part, candidates, k, chunk) for part in queries.split(min(chunk, _MAX_QUERIES))]
    indices, squares = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return indices, squares.sqrt()


def _nearest(queries: Tensor, candidates: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of the k nearest candidates, looking at ``chunk`` of them at a time."""
    wanted = _rows(queries)
    best_indices = torch.empty(len(queries), 0, dtype=torch.int64)
    best_squares = torch.empty(len(queries), 0, dtype=torch.float64)
    for start in range(0, len(candidates), chunk):
        offered = _rows(candidates[start : start + chunk])
        squares = wanted.square().sum(1)[:, None] + offered.square().sum(1) - 2 * wanted @ offered.T
        indices = torch.arange(start, start + len(offered)).expand(len(queries), -1)
        squares = torch.cat([best_squares, squares], dim=1)
        indices = torch.cat([best_indices, indices], dim=1)
        # Stable, so that an earlier candidate stays before a later one that is just as near.
        best_squares, order = squares.sort(dim=1, stable=True)
        best_squares = best_squares[:, :k].clone()
        best_indices = indices.gather(1, order[:, :k])
    return best_indices, best_squares


def _rows(images: Tensor) -> Tensor:
    return images.flatten(1).cpu().double()


def _describe(images: Tensor) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
