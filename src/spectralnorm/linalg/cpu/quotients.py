"""All weights of a model divided by their norms in one call, and the gradient of that in another.

    plan = QuotientPlan([(weight.detach(), 0) for weight in weights], coefficients=[1.0] * len(weights))
    divided = plan.divide(sigmas)                         # sigmas: (weights,), as `TrackingPlan.whole` returns them
    gradients = plan.gradients(grads, divided.values, us, vs, sigmas)

The division reads and writes each entry once. The gradient reads G and W' for the inner product, then G once more, from
the cache if it fits there, and writes dL/dW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from spectralnorm.linalg.cpu.compiled import kernels
from spectralnorm.linalg.cpu.tables import Ends, for_one_call, form_of, integers
from spectralnorm.linalg.kernel_arguments import require_dense, require_vectors, rule_of
from spectralnorm.linalg.layout import layout_of

__all__ = ["Divided", "Division", "QuotientPlan", "is_quotient"]


class _Call(IntEnum):
    """What the table of gradients holds for each weight: ``enum call_field`` of quotients.c."""

    ROWS = 0  # six, as in `Form`
    ROW_PLACES = 6  # three
    COLUMN_PLACES = 9  # three
    WIDTH = 12


class Division(NamedTuple):
    """A division whose norms are still to be found: what the kernels read, one entry for each weight."""

    weights: Tensor  # addresses
    targets: Tensor  # the same of the quotients
    sizes: Tensor
    rules: Tensor

    def divide(self, sigmas: Tensor) -> None:
        """Divide all weights by their norms, (weights,), float32 and contiguous."""
        tables = (each.data_ptr() for each in self)
        if kernels().spectralnorm_divide(*tables, len(self.sizes), sigmas.data_ptr(), torch.get_num_threads()):
            raise MemoryError("No memory for what the weights are divided by.")


class Divided(NamedTuple):
    """What `QuotientPlan.divide` computed.

    Attributes:
        values: for each weight W / d, in its shape and strides.
        divisors: (weights,): d.
        active: (weights,): whether d is ``sigma / coefficient``, not a constant.
    """

    values: list[Tensor]
    divisors: Tensor
    active: Tensor


class QuotientPlan:
    """Where the weights of a model are and how each is divided by its norm.

    Args:
        weights: each weight and its dimension that counts outputs. They are dense in memory, in any order of their
            dimensions, float32 on the CPU, and are read at every call where they were when the plan was made.
        coefficients: for each the norm that is wanted.
        caps: for each whether a smaller norm is left alone; None: for none.
        eps: a norm up to here counts as zero, and is not divided by; nor is one that is not finite.

    Raises:
        ValueError: a weight has another type or device, gaps in memory, fewer than two dimensions or no entries.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, int]],
        coefficients: Sequence[float],
        caps: Sequence[bool] | None = None,
        *,
        eps: float = 1e-12,
    ) -> None:
        if not weights:
            raise ValueError("A plan needs at least one weight, got none.")
        for weight, _ in weights:
            if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "meta"):
                raise ValueError(f"weights must be float32 on the CPU, got {weight.dtype} on {weight.device}.")
            require_dense(weight)
        self._shapes = [(weight.shape, weight.stride()) for weight, _ in weights]
        self._addresses = integers([weight.data_ptr() for weight, _ in weights])
        self._sizes = integers([weight.numel() for weight, _ in weights])
        self._num_entries = sum(weight.numel() for weight, _ in weights)
        caps = [False] * len(weights) if caps is None else caps
        self._rules = torch.tensor(
            [rule_of(coefficient, cap, eps) for coefficient, cap in zip(coefficients, caps, strict=True)],
            dtype=torch.float64,
            device="cpu",
        )
        layouts = [layout_of(weight.movedim(out_dim, 0).unsqueeze(0)) for weight, out_dim in weights]
        forms = [form_of(layout) for layout in layouts]
        self._vector_sizes = [(layout.rows, layout.columns) for layout in layouts]
        self._calls = integers([[*form[: _Call.ROW_PLACES], *form.row_places, *form.column_places] for form in forms])

    def rules_with(self, divisors: Mapping[int, tuple[float, bool]], sigmas: Sequence[float]) -> Tensor:
        """Rules by which some weights are divided by given numbers, for `divide` and `differentiate`.

        Args:
            divisors: of those weights, by place, and whether each is the norm times a constant.
            sigmas: the norms of all.
        """
        rules = self._rules.clone()
        for place, (divisor, is_active) in divisors.items():
            sigma = sigmas[place]
            # sigma / (sigma / d) is d but for rounding in double.
            is_active = is_active and 0 < sigma < math.inf
            row = (sigma / divisor, -math.inf, divisor) if is_active else (1.0, math.inf, divisor)
            rules[place] = torch.tensor(row, dtype=torch.float64, device="cpu")
        return rules

    def divide(self, sigmas: Tensor, outs: Sequence[Tensor] | None = None, *, rules: Tensor | None = None) -> Divided:
        """Each weight divided by its norm.

        Args:
            sigmas: (weights,), float32: the norms.
            outs: for each weight a tensor of its shape and strides to write to; None: new ones. Torch does not notice
                that something is written to them: their versions stay.
            rules: `rules_with`; None: those of the plan.
        """
        sigmas = self._checked(sigmas)
        outs = [_like(shape) for shape in self._shapes] if outs is None else list(outs)
        self.prepared(outs, rules=rules).divide(sigmas)
        return Divided(outs, *self.divisors(sigmas, rules=rules))

    def divisors(self, sigmas: Tensor, *, rules: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `divide` divides by, and whether that is ``sigma / coefficient``; each (weights,)."""
        coefficients, thresholds, constants = (self._rules if rules is None else rules).unbind(1)
        norms = sigmas.double()
        active = (norms > thresholds) & (norms < math.inf)  # false for NaN
        return torch.where(active, norms / coefficients, constants).float(), active

    def prepared(
        self, outs: Sequence[Tensor], *, targets: Tensor | None = None, rules: Tensor | None = None
    ) -> Division:
        """The division into ``outs`` as `TrackingPlan.track` takes it.

        Args:
            outs: as for `divide`.
            targets: their addresses, where the caller has had them checked before; None: not yet.
            rules: as for `divide`.
        """
        if targets is None:
            self._check_layouts(outs, range(len(self._shapes)))
            targets = integers([out.data_ptr() for out in outs])
        return Division(self._addresses, targets, self._sizes, self._rules if rules is None else rules)

    def gradients(
        self,
        grads: Sequence[Tensor],
        values: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        sigmas: Tensor,
        outs: Sequence[Tensor] | None = None,
        *,
        more_grads: Sequence[Tensor | None] | None = None,
        places: Sequence[int] | None = None,
        rules: Tensor | None = None,
        are_checked: bool = False,
    ) -> list[Tensor]:
        """dL/dW, with the vectors held constant (Miyato et al. 2018, eq. 12).

            dL/dW = G / d - active <G, W'> / sigma u v^T

        Args:
            grads: G, of the weights' shapes and strides.
            values: W', as `divide` returned them.
            us: whole left vectors, float32, (out,).
            vs: whole right vectors in torch's order, float32, (everything else,).
            sigmas: (weights,), float32: the norms that all weights were divided by.
            outs: as for `divide`; may be ``grads``.
            more_grads: for each what is added to its G, like that; None: nothing.
            places: of which weights the others are; None: of all.
            rules: that `divide` was given.
            are_checked: whether the caller knows that all tensors fit: looking at each takes as long as the work on a
                small one.

        Raises:
            ValueError: something has another shape, type or layout than the weight it belongs to.
        """
        places = range(len(self._shapes)) if places is None else places
        results = [_like(self._shapes[place]) for place in places] if outs is None else list(outs)
        if not are_checked:
            for tensors in (grads, values, results):
                self._check_layouts(tensors, places)
            for place, more in zip(places, more_grads or (), strict=False):
                if more is not None:
                    self._check_layouts([more], [place])
            require_vectors(us, vs, (self._vector_sizes[place] for place in places))
        # Tables of all weights, of which only those at the places are looked at.
        at_places = [[0] * len(self._shapes) for _ in range(4)]
        for place, *tensors in zip(places, values, results, us, vs, strict=True):
            for table, tensor in zip(at_places, tensors, strict=True):
                table[place] = tensor.data_ptr()
        of_values, targets, *both = map(integers, at_places)
        ends = Ends(None, torch.stack(both, 1))
        self.differentiate(grads, more_grads, of_values, targets, ends, self._checked(sigmas), places, rules)
        return results

    def differentiate(
        self,
        grads: Sequence[Tensor],
        more_grads: Sequence[Tensor | None] | None,
        values: Tensor,
        targets: Tensor,
        ends: Ends,
        sigmas: Tensor,
        places: Sequence[int] | None,
        rules: Tensor | None = None,
    ) -> None:
        """As `gradients`, of what is known to fit.

        Args:
            grads: as for `gradients`.
            more_grads: as for `gradients`.
            values: (weights,): addresses of W'.
            targets: (weights,): addresses of the gradients.
            ends: where u and v are.
            sigmas: as for `gradients`.
            places: as for `gradients`.
            rules: as for `gradients`.
        """
        addresses = [grad.data_ptr() for grad in grads]
        if more_grads is None:
            addresses += [0] * len(grads)
        else:
            addresses += [0 if more is None else more.data_ptr() for more in more_grads]
        of_grads = for_one_call(addresses)
        which = None if places is None else integers(list(places))
        has_failed = kernels().spectralnorm_gradients(
            *(each.data_ptr() for each in (self._calls, values, targets, ends.table)),
            ends.beginning,
            of_grads.buffer_info()[0],
            None if which is None else which.data_ptr(),
            len(grads),
            self._num_entries,
            (self._rules if rules is None else rules).data_ptr(),
            sigmas.data_ptr(),
            torch.get_num_threads(),
        )
        if has_failed:
            raise MemoryError("No memory for the gradients of the weights.")

    def _checked(self, sigmas: Tensor) -> Tensor:
        shape = (len(self._shapes),)
        if sigmas.shape != shape or sigmas.dtype != torch.float32:
            raise ValueError(f"Expected sigmas of shape {shape} in float32, got {tuple(sigmas.shape)} {sigmas.dtype}.")
        return sigmas.contiguous()

    def _check_layouts(self, tensors: Sequence[Tensor], places: Sequence[int]) -> None:
        for tensor, place in zip(tensors, places, strict=True):
            shape, stride = self._shapes[place]
            if tensor.dtype != torch.float32 or tensor.shape != shape or tensor.stride() != stride:
                raise ValueError(
                    f"Expected a float32 tensor of shape {tuple(shape)} and strides {stride} as the weight, got "
                    f"{tensor.dtype}, {tuple(tensor.shape)} and {tensor.stride()}."
                )


def is_quotient(
    value: Tensor, weight: Tensor, size: int, step: int, divisor: float, relative: float, absolute: float
) -> bool:
    """Whether each ``step``th entry in memory of ``value`` is that of ``weight`` by ``divisor``, but for rounding.

    Args:
        value: float32, dense in memory.
        weight: of its shape, type and strides.
        size: entries of each.
        step: in entries.
        divisor: what the weight is divided by.
        relative: what the quotient of an entry may be off by, relative to it.
        absolute: and beside that.
    """
    addresses = value.data_ptr(), weight.data_ptr()
    return bool(kernels().spectralnorm_is_quotient(*addresses, size, step, divisor, relative, absolute))


def _like(shape: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    return torch.empty_strided(*shape, dtype=torch.float32, device="cpu")
