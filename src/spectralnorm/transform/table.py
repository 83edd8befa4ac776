"""A table of a model's weights: normalized to what, or why not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectralnorm.linalg import compute_dtype, refine, seeded_direction
from spectralnorm.parametrizations import SpectralNorm, normalization_of
from spectralnorm.parametrizations.layer_class import plain_class
from spectralnorm.parametrizations.lazy import pending_of
from spectralnorm.parametrizations.shards import whole
from spectralnorm.transform.selection import candidates

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True, slots=True)
class Row:
    """One weight.

    Attributes:
        layer: the layer's name in the model.
        kind: the layer's class.
        shape: the weight's shape.
        sigma: the norm by which the raw weight is divided, of a strict one a bound of it; None if it is not normalized.
        norm: the norm of the weight that the layer computes with, computed anew; None if it is not normalized.
        note: the wanted norm and how it is kept, or why the weight is not normalized.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    sigma: float | None
    norm: float | None
    note: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary` found; prints as a table.

    Attributes:
        rows: one for each weight, in the model's order.
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        header = ("layer", "type", "shape", "sigma", "norm", "")
        cells = [
            (row.layer, row.kind, "x".join(map(str, row.shape)), _number(row.sigma), _number(row.norm), row.note)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
        right = {3, 4}
        lines = (
            "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in (header, *cells))
        )
        normalized = sum(row.sigma is not None for row in self.rows)
        total = f"{normalized} of {len(self.rows)} weights normalized"
        return "\n".join([*(line.rstrip() for line in lines), total])

    __repr__ = __str__


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """Every weight of a model: its shape, the norm it has, the norm its layer uses, or why it was skipped.

    Biases are left out unless they are normalized.

    >>> from spectralnorm import add_spectral_norm
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    >>> print(summary(add_spectral_norm(nn.Sequential(layer, nn.LayerNorm(2)))))
    layer  type       shape  sigma   norm
    0      Linear     2x2    3.000  1.000  normalize to 1
    1      LayerNorm  2                    a vector, not a matrix
    1 of 2 weights normalized
    """
    rows = []
    found = list(candidates(model))  # held together, so that no two weights can have the same id
    first_by_weight: dict[int, str] = {}
    for candidate in found:
        module, name, weight = candidate.module, candidate.tensor_name, candidate.weight
        normalization = normalization_of(module, name)
        pending = pending_of(module, name)
        if candidate.is_bias and normalization is None and pending is None:
            continue
        sigma = norm = None
        note = candidate.obstacle or candidate.reason or "not normalized"
        if pending is not None:
            options = pending.options
            when = "from its first forward on" if pending.has_shape(module) else "once it has a shape"
            note = f"{options.get('mode', 'normalize')} to {options.get('coefficient', 1):g} {when}"
        if normalization is not None:
            sigma = float(normalization.sigma(weight))
            norm = _norm(getattr(module, name), normalization)
            note = f"{normalization.mode} to {normalization.coefficient:g}"
            if normalization.strict:
                sigma = float(normalization.sigma_upper(weight))
                note = f"{normalization.mode} to at most {normalization.coefficient:g}"
        first = first_by_weight.setdefault(id(weight), candidate.label)
        if first != candidate.label:
            note += f", shared with {first}"
        kind = plain_class(module).__name__
        shape = () if is_lazy(weight) else tuple(weight.shape)
        rows.append(Row(candidate.label, kind, shape, sigma, norm, note))
    return Summary(tuple(rows))


def _norm(weight: Tensor, normalization: SpectralNorm) -> float:
    """Norm of the weight in use, from nothing but the weight."""
    if normalization.geometry is not None:
        return float(normalization.map_of(whole(weight)).sigma)
    matrix = normalization.weight_matrix(whole(weight))
    matrix = matrix.to(compute_dtype(matrix.dtype))
    return float(refine(matrix, seeded_direction("summary", matrix.shape[-1], matrix), rtol=1e-6).sigma.max())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
