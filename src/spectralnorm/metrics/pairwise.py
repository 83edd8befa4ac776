"""Distances between all pairs of two sets of features, block by block: on the device, with bounded memory.

In float64, and around the mean of the candidates: squares of float32 features lose the digits that tell near neighbours
apart. Every function takes matrices on any device and computes on ``device``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectralnorm.errors import UserError

__all__ = ["ball_counts", "check_pair", "mean_distance", "smallest_distances"]

# Distances in one block; in float64 and with what is made of them, about 100 MB.
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 4096
# By so much of itself may a radius be exceeded: a tie is no matter of rounding, and rounding is far below this.
_TIE = 1e-9


@torch.inference_mode()
def smallest_distances(queries: Tensor, candidates: Tensor, *, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Distances to the k nearest candidates of each query: float64 (n, k), nearest first, on the CPU.

    Args:
        queries: (n, d).
        candidates: (m, d), m >= k. A query that is one of them is its own first neighbour, at distance 0.
        k: neighbours.
        device: where to compute.
    """
    center = _center(candidates, device)
    found = []
    for rows in queries.split(_BLOCK_ROWS):
        best = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        for squares in _squares(rows, candidates, center):
            best = torch.cat([best, squares], dim=1)
            best = best.topk(min(k, best.shape[1]), largest=False).values
        found.append(best.sqrt().cpu())
    return torch.cat(found)


@torch.inference_mode()
def ball_counts(
    points: Tensor, centers: Tensor, radii: Tensor, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """How many balls hold each point, and how many points each ball holds; a point on the border counts.

    Args:
        points: (n, d).
        centers: of the balls, (m, d).
        radii: of the balls, (m,).
        device: where to compute.

    Returns:
        int64 (n,) and int64 (m,), on the CPU.
    """
    center = _center(centers, device)
    limits = radii.to(device, torch.float64).square() * (1 + _TIE)
    of_points, of_balls = [], torch.zeros(len(centers), dtype=torch.int64, device=device)
    for rows in points.split(_BLOCK_ROWS):
        counts = torch.zeros(len(rows), dtype=torch.int64, device=device)
        start = 0
        for squares in _squares(rows, centers, center):
            end = start + squares.shape[1]
            inside = squares <= limits[start:end]
            counts += inside.sum(1)
            of_balls[start:end] += inside.sum(0)
            start = end
        of_points.append(counts.cpu())
    return torch.cat(of_points), of_balls.cpu()


@torch.inference_mode()
def mean_distance(features: Tensor, *, device: torch.device | str = "cpu") -> float:
    """Mean distance between two different rows of a matrix (n, d), n >= 2, over all pairs."""
    center = _center(features, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(features), _BLOCK_ROWS):
        rows = features[start : start + _BLOCK_ROWS]
        begin = 0
        for squares in _squares(rows, features, center):
            # Rounding leaves an image a little away from itself; the square root would make much of it.
            same = torch.arange(start, start + len(rows), device=device)[:, None] == torch.arange(
                begin, begin + squares.shape[1], device=device
            )
            total += squares.masked_fill_(same, 0).sqrt().sum()
            begin += squares.shape[1]
    return float(total) / (len(features) * (len(features) - 1))


def check_pair(real: Tensor, fake: Tensor, *, least: int = 2) -> None:
    """Check that two sets of features can be compared.

    Raises:
        UserError: they are no matrices of one width, or have fewer than ``least`` rows.
    """
    shapes = tuple(real.shape), tuple(fake.shape)
    if real.ndim != 2 or fake.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise UserError(f"Features must be two matrices with as many columns, got {shapes[0]} and {shapes[1]}.")
    if min(shapes[0][0], shapes[1][0]) < least:
        raise UserError(
            f"A comparison needs at least {least} images on each side, got {shapes[0][0]} and {shapes[1][0]}."
        )


def _center(features: Tensor, device: torch.device | str) -> Tensor:
    return features.double().mean(dim=0).to(device)


def _squares(rows: Tensor, candidates: Tensor, center: Tensor) -> Iterator[Tensor]:
    """Squared distances of some rows to all candidates, a block of columns at a time."""
    rows = rows.to(center.device, torch.float64) - center
    lengths = rows.square().sum(1)[:, None]
    for part in candidates.split(_BLOCK_COLUMNS):
        part = part.to(center.device, torch.float64) - center
        yield torch.addmm(lengths + part.square().sum(1), rows, part.T, alpha=-2).clamp_(min=0)
