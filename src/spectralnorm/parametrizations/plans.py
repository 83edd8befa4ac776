"""Which weights the kernels can do, by which kernels, and what is remembered of weights in a row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg import MatrixView, cpu, cuda, seeded_direction
from spectralnorm.linalg.kernel_arguments import require_countable
from spectralnorm.linalg.layout import is_dense, layout_of
from spectralnorm.linalg.tracking import PROBE_LENGTH
from spectralnorm.parametrizations.arithmetic import host_has
from spectralnorm.parametrizations.promise import Promise

if TYPE_CHECKING:
    from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["Plans", "Weights", "are_usable", "can_be_read", "can_write", "identity_of", "plans_for"]


_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def are_usable(weight: Tensor) -> bool:
    """Whether weights of that type, one of those that kernels read, and device are renewed by them."""
    return cpu.is_trusted() if host_has(weight.device) else cuda.is_trusted(weight.device, weight.dtype)


def can_be_read(normalization: SpectralNorm, weight: Tensor) -> bool:
    """Whether the kernels are to do all that is to be done for a weight."""
    return (
        weight.dtype in _DTYPES.get(weight.device.type, ())
        and len(normalization.views) == 1
        and not normalization.follows_map
        and are_usable(weight)
        and (not normalization.strict or _kernels_for(weight.device).are_of_host)
        and _has_layout(normalization.views[0], weight.shape, weight.stride(), host_has(weight.device))
    )


def can_write(buffers: Sequence[Tensor]) -> bool:
    """Whether the kernels can write vectors there."""
    dtypes = _DTYPES[buffers[0].device.type]
    return all(buffer.dtype in dtypes and buffer.is_contiguous() for buffer in buffers)


@lru_cache(maxsize=4096)
def _has_layout(view: MatrixView, shape: torch.Size, stride: tuple[int, ...], is_on_cpu: bool) -> bool:
    weight = torch.empty_strided(shape, stride, device="meta")
    try:
        layout = layout_of(view.blocks_of_columns(weight))
        if is_on_cpu:
            cpu.form_of(layout)
            cpu.form_of(layout_of(weight.movedim(view.out_dim, 0).unsqueeze(0)))
        else:
            require_countable(layout)
    except ValueError:
        return False
    return is_dense(weight)


class _Kernels(NamedTuple):
    """Those of a kind of device: classes of the same names, used alike.

    Attributes:
        are_of_host: whether they run on the CPU: they divide a weight while they have it in the cache, read numbers
            without waiting, and cost little more when they are called for each weight.
    """

    TrackingPlan: Any
    QuotientPlan: Any
    VectorStore: Any
    are_of_host: bool


def _kernels_for(device: torch.device) -> _Kernels:
    if host_has(device):
        return _Kernels(cpu.TrackingPlan, cpu.QuotientPlan, cpu.VectorStore, True)
    # Here, because `import spectralnorm` loads no Triton.
    from spectralnorm.linalg.cuda.quotients import QuotientPlan
    from spectralnorm.linalg.cuda.storing import VectorStore
    from spectralnorm.linalg.cuda.tracking import TrackingPlan

    return _Kernels(TrackingPlan, QuotientPlan, VectorStore, False)


Weights = Sequence[tuple["SpectralNorm", Tensor]]
"""Each with its normalization."""


class Plans:
    """What is remembered of weights in a row.

    Attributes:
        device: of the weights.
        kernels: that do the work.
        prototypes: of each its shape, strides and type, without memory.
        are_contiguous: whether all have one type and torch's usual order in memory.
        views: how each is read as a matrix.
        out_dims: of each the dimension that counts outputs.
        rules: of each the norm that is wanted, and whether a smaller one is left alone.
        eps: a norm up to here counts as zero.
        quotients: their division.
        store: their buffers.
    """

    def __init__(self, weights: Weights) -> None:
        self.device = weights[0][1].device
        self.kernels = _kernels_for(self.device)
        self.prototypes = [
            torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
            for _, weight in weights
        ]
        self.are_contiguous = len({like.dtype for like in self.prototypes}) == 1 and all(
            like.is_contiguous() for like in self.prototypes
        )
        self.views = [normalization.views[0] for normalization, _ in weights]
        rows = [(weight.detach(), view.out_dim) for (_, weight), view in zip(weights, self.views, strict=True)]
        self.out_dims = [view.out_dim for view in self.views]
        self.rules, self.eps = [_rule(normalization) for normalization, _ in weights], weights[0][0].eps
        coefficients, caps = zip(*self.rules, strict=True)
        self.quotients = self.kernels.QuotientPlan(rows, coefficients, caps, eps=self.eps)
        self.store = self.kernels.VectorStore()
        self._tracking: Any = None
        self._narrow_prototypes: dict[torch.dtype, list[Tensor]] = {}

    def prototypes_of(self, dtype: torch.dtype) -> list[Tensor]:
        """The prototypes with another type."""
        if dtype not in self._narrow_prototypes:
            self._narrow_prototypes[dtype] = [torch.empty_like(like, dtype=dtype) for like in self.prototypes]
        return self._narrow_prototypes[dtype]

    def tracking(self, weights: Weights) -> Any:
        """The plan of the weights' matrices, for the same weights as these were made for."""
        if self._tracking is None:
            parts = zip(self.views, weights, strict=True)
            matrices = [view.blocks_of_columns(weight.detach()) for view, (_, weight) in parts]
            self._tracking = self.kernels.TrackingPlan(matrices, [_directions(matrix) for matrix in matrices])
        return self._tracking

    def promised(self, promises: Mapping[int, Promise], sigmas: Tensor) -> dict[str, Any]:
        """What `Division` is to know of strict weights on the CPU, whose ``promises`` are given by place."""
        divisors: Any = {place: promise.divisor for place, promise in promises.items()}
        rules = self.quotients.rules_with(divisors, sigmas.tolist())
        return {"rules": rules, "uppers": {place: promise.upper for place, promise in promises.items()}}

    def fitting(self, memory: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those of the tensors that quotients can be written to."""
        return [
            out if out is not None and out.stride() == like.stride() and out.data_ptr() % 16 == 0 else None
            for out, like in zip(memory, self.prototypes, strict=True)
        ]


# By addresses and rules: a plan holds no weight, and is right for whatever lies at its addresses in this form.
_plans: OrderedDict[tuple[Any, ...], Plans] = OrderedDict()
_MOST_PLANS = 64


def plans_for(weights: Weights) -> Plans:
    """Those of these weights, made anew or found again."""
    key = tuple(identity_of(normalization, weight) for normalization, weight in weights)
    plans = _plans.get(key)
    if plans is None:
        plans = _plans[key] = Plans(weights)
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return plans


def identity_of(normalization: SpectralNorm, weight: Tensor) -> tuple[Any, ...]:
    """Where a weight is, in what form, and how it is divided: what plans were made for."""
    place = weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride()
    return *place, normalization.views[0], normalization.eps, *_rule(normalization)


def _rule(normalization: SpectralNorm) -> tuple[float, bool]:
    return normalization.divided_to, normalization.mode == "cap"


def _directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What a frame on either side is stirred with, as `batches.probe_at` has it."""
    like = torch.empty(0, dtype=torch.float32, device=matrix.device)
    rows, columns = matrix.shape[1], matrix[0, 0].numel()
    return PROBE_LENGTH * seeded_direction("probe", rows, like), PROBE_LENGTH * seeded_direction("probe", columns, like)
