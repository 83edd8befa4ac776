"""`SpectralNorm`: one weight, its vectors u and v, and the value it stands for until it changes."""

from __future__ import annotations

import math
import zlib
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.linalg import compute_dtype, power_iteration, probe_rows, refine, tracked_power_iteration, view_of
from spectralnorm.parametrizations import norm_alone
from spectralnorm.parametrizations.arithmetic import is_eager, plain_arithmetic
from spectralnorm.parametrizations.kept import Kept, Verdict
from spectralnorm.parametrizations.normalized_weight import NormalizedWeight, divisor_of
from spectralnorm.parametrizations.shards import is_distributed, local_part, scaled_part, whole
from spectralnorm.parametrizations.weight_clock import WeightClock, watch

__all__ = ["SpectralNorm"]

NORMS = ("matrix",)
MODES = ("normalize", "cap")
UPDATES = ("step", "forward", "manual")

# Lanczos gains a constant factor per step, so ten times better than the promised 1e-4 is nearly free.
_REFINED_RTOL = 1e-5
# Warm vectors of one block say nothing about another that has become the largest; without kept vectors each call
# starts the blocks afresh. As many iterations as torch gives to a new layer.
_COLD_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """The spectral norm of one weight, as a parametrization (`spectral_norm` registers it) or on its own.

    Args:
        module: the layer that owns the weight. It is looked at, not kept.
        name: the weight's name in the layer.
        n_power_iterations: power iterations per change of the weight.
        eps: a norm up to here counts as zero.
        dim: the weight's output dimension; None: 1 for transposed convolutions, else 0.
        norm: ``"matrix"``: the norm of the weight reshaped to a matrix, outputs first (Miyato et al. 2018); of grouped
            convolutions the largest of its blocks'.
        mode: ``"normalize"``: the norm becomes ``coefficient``; ``"cap"``: only if it is larger.
        coefficient: the norm that is wanted.
        update: ``"step"``: once per change of the weight; ``"forward"``: at every use in training mode, as torch;
            ``"manual"``: only by `spectralnorm.update_`.

    Raises:
        UserError: the layer has no such weight, or an option has a value that is not offered.
        IndexError: ``dim`` is not a dimension of the weight.

    >>> layer = nn.Linear(20, 30)
    >>> weight = SpectralNorm(layer).compute_weight(layer)
    >>> round(torch.linalg.matrix_norm(weight, 2).item(), 4)
    1.0
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        module: nn.Module,
        name: str = "weight",
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        dim: int | None = None,
        *,
        norm: str = "matrix",
        mode: str = "normalize",
        coefficient: float = 1.0,
        strict: bool = False,
        update: str = "step",
    ) -> None:
        super().__init__()
        if n_power_iterations < 1:
            raise UserError(f"n_power_iterations must be at least 1, got {n_power_iterations}.")
        if not eps > 0:
            raise UserError(f"eps must be a positive number, got {eps}.")
        _require_choice("norm", norm, NORMS)
        _require_choice("mode", mode, MODES)
        _require_choice("update", update, UPDATES)
        _require_choice("strict", strict, (False,))
        weight = _weight_of(module, name)
        self.name = name
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.norm = norm
        self.mode = mode
        self.update = update
        self.coefficient = coefficient
        self.view = view_of(module, weight, dim)
        self._is_vector = weight.ndim < 2
        self._keeps = update == "step" and not self._is_vector
        self._kept: Kept | None = None
        self._norm_alone: norm_alone.NormAlone | None = None
        self.keeps_value_when_sharded = False
        self.train(module.training)
        if not self._is_vector:
            self._register_vectors(weight)

    def _register_vectors(self, weight: Tensor) -> None:
        rows, columns = self.view.whole_shape(weight)
        u, v = (seeded_direction(f"{self.name}.{side}", size, weight) for side, size in (("u", rows), ("v", columns)))
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        if weight.is_meta or weight.numel() == 0:
            return
        with torch.no_grad():
            if self._keeps and type(weight) is nn.Parameter:
                self._kept = self._computed(weight.detach(), watch(weight), None)
                self._kept.write_vectors(u, v)
            else:
                self._write(*self.cold_vectors(whole(weight)))

    @property
    def coefficient(self) -> float:
        """The norm that is wanted; it can be set at any time."""
        return self._coefficient

    @coefficient.setter
    def coefficient(self, value: float) -> None:
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise UserError(f"coefficient must be a positive number, got {value!r}.")
        self._coefficient = float(value)
        self.invalidate()

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, mode={self.mode}, coefficient={self.coefficient:g}"

    # What it computes

    def compute_weight(self, module: nn.Module) -> Tensor:
        """The normalized weight of ``module``, whether or not this is registered as its parametrization.

        Raises:
            UserError: the module has no weight of this one's name.
        """
        return self(_weight_of(module, self.name))

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as the matrix whose norm is meant: (out, in), or (groups, out / groups, in / groups)."""
        return weight.unsqueeze(1) if self._is_vector else self.view.matrix(weight)

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The norm of ``weight`` by which it is divided: a scalar estimate. Changes nothing that is saved."""
        if self._is_vector:
            return torch.linalg.vector_norm(weight)
        if self._can_keep(weight):
            return self._current(weight).sigma
        parameter = self._changing_parameter(weight)
        if parameter is not None:
            return norm_alone.sigma_of(self, weight, parameter)
        return self._rayleigh(whole(weight), local_part(self._u), local_part(self._v))

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized ``weight``, of its shape and type."""
        if self._is_vector:
            return self._scaled(weight, torch.linalg.vector_norm(weight.to(compute_dtype(weight.dtype))))
        if not self._can_keep(weight):
            return self._unkept(weight)
        kept = self._kept
        if kept is None or not kept.is_current(weight):
            kept = self._current(weight)
        if not kept.is_in_buffers and self.training and torch.is_grad_enabled():
            kept.write_vectors(self._u, self._v)
        return self._as_function_of(weight, kept.value, kept)

    def _as_function_of(self, weight: Tensor, value: Tensor, kept: Kept) -> Tensor:
        """``value``, in the graph if there is one."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return value.detach()
        found, _ = NormalizedWeight.apply(
            weight,
            value,
            kept.sigma,
            kept.u,
            kept.v,
            self.view,
            self._coefficient,
            self.mode == "cap",
            self.eps,
        )
        return found

    def right_inverse(self, value: Tensor) -> Tensor:
        """What the raw weight becomes when ``value`` is assigned: ``value``, which is then normalized."""
        return value

    # Keeping

    def invalidate(self) -> None:
        """Forget the kept value: the next use computes it anew from the weight."""
        self._kept = None
        self._norm_alone = None

    def _can_keep(self, weight: Tensor) -> bool:
        """Whether ``weight`` is a real parameter in ordinary eager execution.

        Not: any other tensor in its place (`functional_call`, DataParallel's replicas, another parametrization below
        this one), wrappers such as DTensor, what FSDP2 puts there for one forward, and whatever is being traced,
        captured or transformed.
        """
        return (
            self._keeps
            and type(weight) is nn.Parameter
            and is_eager(weight)
            and weight.numel() > 0
            and norm_alone.changing_parameter(self, weight) is None
        )

    def _changing_parameter(self, weight: Tensor) -> Tensor | None:
        """The parameter that ``weight`` follows, if the norm of it is kept but not the value."""
        if not self._keeps or not is_eager(weight) or weight.numel() == 0:
            return None
        return norm_alone.changing_parameter(self, weight)

    def _current(self, weight: Tensor) -> Kept:
        """The kept value, renewed if the weight has changed."""
        with plain_arithmetic(weight):
            kept = self._kept
            if kept is not None and kept.clock.weight is weight and kept.was_written_to():
                weight.copy_(kept.value)
            clock = watch(weight)
            clock.observe()
            if kept is None or not kept.is_current(weight):
                warm = kept if kept is not None and kept.is_one_step_old(weight) else None
                kept = self._kept = self._computed(weight.detach(), clock, warm)
        return kept

    def _computed(self, weight: Tensor, clock: WeightClock, warm: Kept | None) -> Kept:
        """The value of ``weight``: by power iteration from the ``warm`` one's frame, or without it to full accuracy."""
        self._require_all_of(weight)
        matrix = self.view.memory_matrix(weight)
        matrix = matrix.to(compute_dtype(matrix.dtype))
        if warm is None or matrix.is_complex():
            start = seeded_direction(f"{self.name}.start", matrix.shape[-1], matrix)
            found = refine(matrix, start, rtol=_REFINED_RTOL, eps=self.eps)
            direction = seeded_direction(f"{self.name}.probe", matrix.shape[-2], matrix)
            probe, age = probe_rows(direction, found.frame.shape[-2]), 0
        else:
            # Rolled, the probe is another direction each time, without random numbers on the hot path.
            probe, age = warm.probe, warm.age + 1
            found = tracked_power_iteration(
                matrix, warm.frame, probe.roll(age, dims=-1), self.n_power_iterations, eps=self.eps
            )
        u, v, sigma = self.view.whole_vectors(found.u, found.v, found.sigma, weight)
        value = self._scaled(weight, sigma)
        return Kept(
            clock=clock,
            steps=clock.steps,
            writes=clock.writes,
            value=value,
            value_version=value._version,
            sigma=sigma,
            u=u,
            v=v,
            frame=found.frame,
            probe=probe,
            age=age,
            is_in_buffers=False,
            verdict=Verdict(sigma, self.eps),
        )

    # Not keeping: free of branches on values, in torch's ordinary operations

    def _unkept(self, weight: Tensor) -> Tensor:
        parameter = self._changing_parameter(weight)
        if parameter is not None:
            return norm_alone.use(self, weight, parameter)
        self._require_all_of(weight)
        full = whole(weight) if is_distributed(weight) else weight
        u, v = local_part(self._u), local_part(self._v)
        if self.training and (self.update == "forward" or (self.update == "step" and torch.is_grad_enabled())):
            with torch.no_grad():
                u, v, _ = self._iterated(full.detach(), u, v, self.n_power_iterations)
                if not torch._C._are_functorch_transforms_active():  # a transform allows no writing outside of it
                    self._write(u, v)
        else:
            # The graph must not see a later write to the buffers.
            u, v = u.clone(), v.clone()
        sigma = self._rayleigh(full, u, v)
        if is_distributed(weight):
            return scaled_part(weight, sigma, u, v, self.view, self._scaled)
        return self._scaled(weight, sigma)

    def cold_vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Whole vectors u and v for a weight that nothing is known about, in its type."""
        rows, columns = self.view.whole_shape(weight)
        u, v = (seeded_direction(f"{self.name}.{side}", size, weight) for side, size in (("u", rows), ("v", columns)))
        u, v, _ = self._iterated(weight, u, v, _COLD_ITERATIONS)
        return u.to(weight.dtype), v.to(weight.dtype)

    def _iterated(self, weight: Tensor, u: Tensor, v: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """New whole vectors after ``num_iterations`` from u and v."""
        if self.view.groups == 1:
            matrix = self.view.matrix(weight)
            matrix = matrix.to(compute_dtype(matrix.dtype))
            return power_iteration(matrix, u.to(matrix), v.to(matrix), num_iterations, eps=self.eps)
        matrix = self.view.memory_matrix(weight)
        matrix = matrix.to(compute_dtype(matrix.dtype))
        groups, rows, columns = matrix.shape
        left = _chirp(rows, matrix).expand(groups, rows)
        right = _chirp(columns, matrix).expand(groups, columns)
        found = power_iteration(matrix, left, right, num_iterations + _COLD_ITERATIONS, eps=self.eps)
        return self.view.whole_vectors(*found, weight)

    def _rayleigh(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """u^H W v, differentiable in the weight."""
        matrix = self.view.whole_matrix(weight)
        matrix = matrix.to(compute_dtype(matrix.dtype))
        u, v = u.to(matrix), v.to(matrix)
        return torch.vdot(u, torch.mv(matrix, v)).real if matrix.is_complex() else torch.dot(u, torch.mv(matrix, v))

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """Power iteration now, whatever the update rule: `spectralnorm.update_` calls it."""
        if self._is_vector:
            return
        if not self._can_keep(weight):
            parameter = self._changing_parameter(weight)
            if parameter is not None:
                return norm_alone.advance(self, weight, parameter)
            u, v = local_part(self._u), local_part(self._v)
            u, v, _ = self._iterated(whole(weight), u, v, self.n_power_iterations)
            return self._write(u, v)
        current = self._current(weight)
        with plain_arithmetic(weight):
            kept = self._kept = self._computed(weight.detach(), current.clock, current)
        kept.write_vectors(self._u, self._v)

    # Shared

    def _require_all_of(self, weight: Tensor) -> None:
        """Refuse what is left of a weight while its entries are elsewhere."""
        if not is_eager(weight):
            return
        expected = self._u.numel() * self._v.numel()
        is_freed = not is_distributed(weight) and weight.untyped_storage().nbytes() == 0 < expected
        if weight.numel() != expected or is_freed:
            raise UserError(
                f"The weight {self.name!r} should have {expected} entries, but {0 if is_freed else weight.numel()} are "
                "here; where FSDP1 shards a model, read its weights within "
                "FullyShardedDataParallel.summon_full_params(model)."
            )

    def _scaled(self, weight: Tensor, sigma: Tensor) -> Tensor:
        divisor, _ = divisor_of(sigma, self._coefficient, cap=self.mode == "cap", eps=self.eps)
        # Half types: the quotient is rounded once, not the divisor as well.
        wide = compute_dtype(weight.dtype)
        return weight / divisor if weight.dtype == wide else (weight.to(wide) / divisor).to(weight.dtype)

    @torch.no_grad()
    def _write(self, u: Tensor, v: Tensor) -> None:
        # In place: DataParallel's replicas share the buffers' memory with the module they were made from.
        local_part(self._u).copy_(u)
        local_part(self._v).copy_(v)

    # Copying and moving

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.half()` and back could leave no other trace.
        self.invalidate()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_norm_alone": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        kept = self._kept
        if kept is not None and kept.is_current(kept.clock.weight):
            weight = memo.get(id(kept.clock.weight))
            if type(weight) is nn.Parameter:  # the copy computes with the very value of the original
                copied._kept = kept.for_copy(weight)
        return copied


def seeded_direction(seed: str, size: int, like: Tensor) -> Tensor:
    """A unit vector that depends on ``seed`` and ``size`` alone, so that it is the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{size}".encode()))
    direction = torch.randn(size, generator=generator, dtype=torch.float64)
    return F.normalize(direction, dim=0).to(device=like.device, dtype=like.dtype)


def _chirp(size: int, like: Tensor) -> Tensor:
    """A unit vector with a share in every direction, made without a random generator: compiled graphs allow none."""
    steps = torch.arange(1, size + 1, dtype=like.real.dtype, device=like.device)
    return F.normalize(torch.cos(0.618034 * steps * steps), dim=0).to(like.dtype)


def _weight_of(module: nn.Module, name: str) -> Tensor:
    """The raw weight."""
    if parametrize.is_parametrized(module, name):
        original = getattr(module.parametrizations[name], "original", None)  # type: ignore[index]
        if isinstance(original, Tensor):
            return original
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        present = ", ".join(name for name, _ in module.named_parameters(recurse=False)) or "none"
        raise UserError(f"{type(module).__name__} has no weight {name!r}; its parameters are: {present}.")
    if is_lazy(weight):
        raise UserError(
            f"The weight {name!r} of {type(module).__name__} has no shape yet; run one forward with real inputs first."
        )
    return weight


def _require_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
