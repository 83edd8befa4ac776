"""`SpectralNorm`: one weight, its vectors u and v, and the value it stands for until it changes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.linalg import compute_dtype
from spectralnorm.parametrizations import captured, engine, foreign, norm_alone, renewal, unkept
from spectralnorm.parametrizations.arithmetic import holds_numbers, host_has, is_capturing, is_eager, plain_arithmetic
from spectralnorm.parametrizations.forgotten_scale import ForgottenScale
from spectralnorm.parametrizations.kept import Kept
from spectralnorm.parametrizations.options import (
    Options,
    check_dim,
    check_options,
    checked_input_size,
    plain_value,
    require_module,
)
from spectralnorm.parametrizations.quotient import divided, divisor_of
from spectralnorm.parametrizations.shards import whole
from spectralnorm.parametrizations.stacked import input_of
from spectralnorm.parametrizations.strict import Target, autocast_dtype
from spectralnorm.parametrizations.threads import one_at_a_time
from spectralnorm.parametrizations.weight_clock import WeightClock, watch
from spectralnorm.parametrizations.weight_norms import WeightNorms
from spectralnorm.parametrizations.written_values import HandedOut, WrittenValues, is_ordinary

__all__ = ["SpectralNorm"]

# The layers that only multiply with their weight, in an operation that autocast rounds for.
_CAST_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}
# Asked at every use. In a forward the caches hold the last layer's numbers, and what is looked up in a module as large
# as torch comes from memory.
_are_transforms_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_is_autocast_enabled, _is_grad_enabled = torch._C._is_any_autocast_enabled, torch.is_grad_enabled


class SpectralNorm(WeightNorms, WrittenValues):
    """The spectral norm of one weight, as a parametrization (`spectral_norm` registers it) or on its own.

    Args:
        module: the layer that owns the weight. It is looked at, not kept.
        name: the weight's name in the layer.
        n_power_iterations: power iterations per change of the weight.
        eps: a norm up to here counts as zero.
        dim: the weight's output dimension; None: 1 for transposed convolutions, else 0.
        norm: ``"matrix"``: the norm of the weight reshaped to a matrix, outputs first (Miyato et al. 2018); of grouped
            convolutions the largest of its blocks'. ``"operator"``: of a convolution that of its map from image to
            image, else the same. ``"bidirectional"``: the mean of that and the norm of the weight
            reshaped with inputs first (Lin, Sekar and Fanti 2021).
        mode: ``"normalize"``: the norm becomes ``coefficient``; ``"cap"``: only if it is larger; ``"learnable"``: a
            trained parameter ``scale``, which starts at ``coefficient``. An optimizer made before does not have it,
            which the first step that leaves it behind warns of.
        coefficient: the norm that is wanted.
        strict: divide by a guaranteed upper bound of the norm in place of an estimate, so that the norm of the weight
            that the layer computes with is never above ``coefficient``, rounding included; under autocast it is so
            after autocast's rounding. Of a convolution it is the norm of the map of images. Not with
            ``norm="bidirectional"`` or ``mode="learnable"``.
        input_size: of a convolution with ``strict`` or ``norm="operator"``, the size of the images (height, width) that
            the norm is meant for; another one is refused. None: if strict whatever their size, else that of the first
            image that comes.
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
        input_size: tuple[int, ...] | None = None,
        update: str = "step",
    ) -> None:
        check_options(
            n_power_iterations=n_power_iterations,
            eps=eps,
            norm=norm,
            mode=mode,
            coefficient=coefficient,
            strict=strict,
            input_size=input_size,
            update=update,
        )
        check_dim(dim)
        require_module("SpectralNorm", module)
        weight = _weight_of(module, name)
        super().__init__(module, name, weight, norm=norm, strict=strict, input_size=input_size, dim=dim)
        self._refuse_other_updates(update)
        self.n_power_iterations: int = plain_value("n_power_iterations", n_power_iterations)
        self.eps: float = plain_value("eps", eps)
        self.mode = mode
        self.update = update
        self._kept: Kept | None = None
        self._norm_alone: norm_alone.NormAlone | None = None
        self.keeps_value_when_sharded = False
        self.handed_out: HandedOut | None = None
        self.remembers_numbers = False
        self._forgotten_scale = ForgottenScale()
        self.scale: nn.Parameter | None = None
        if mode == "learnable":
            dtype = weight.real.dtype if weight.is_complex() else weight.dtype
            self.scale = nn.Parameter(torch.full((), float(coefficient), dtype=dtype, device=weight.device))
        self._coefficient = float(coefficient)
        # Whether autocast would round the weight at every use, so that it is handed out rounded.
        self._is_cast = name == "weight" and type(module).forward in _CAST_FORWARDS
        self._is_captured = False
        # With which others the weight is renewed in captured CUDA graphs.
        self.in_graphs: captured.InGraphs | None = None
        self._keeps = self._may_keep()
        self.train(module.training)
        if not self._is_vector:
            self.register_vectors(weight)
            if holds_numbers(weight) and weight.numel() > 0:
                self._fill_vectors(weight)

    def _fill_vectors(self, weight: Tensor) -> None:
        if self._can_keep(weight):
            self.write_vectors(*self._current(weight).quotient.pairs)
            self._kept.is_in_buffers = True  # type: ignore[union-attr]
        else:
            self.find_first_vectors(weight)

    @property
    def coefficient(self) -> float:
        """The norm that is wanted; it can be set at any time. Of a learnable one the present ``scale``."""
        return self._coefficient if self.scale is None else float(self.scale.detach())

    @coefficient.setter
    def coefficient(self, value: float) -> None:
        self.set_options(coefficient=value)

    def check_change(self, **changes: Unpack[Options[float]]) -> None:
        """Raise a `UserError` if the options cannot be changed to these in place."""
        check_options(**changes)
        if "input_size" in changes:
            changes["input_size"] = checked_input_size(changes["input_size"])
        for option in ("norm", "strict", "input_size"):
            if (wanted := changes.get(option, getattr(self, option))) != getattr(self, option):
                raise UserError(
                    f"{option} cannot be changed from {getattr(self, option)!r} to {wanted!r} in place; "
                    "remove_spectral_norm first."
                )
        self._refuse_other_updates(changes.get("update", self.update))
        if "learnable" in (modes := {self.mode, changes.get("mode", self.mode)}) and len(modes) > 1:
            raise UserError(
                "mode cannot be changed to or from 'learnable' in place, because that adds or removes a parameter that "
                "an optimizer would not know; remove_spectral_norm first."
            )

    def set_options(self, **changes: Unpack[Options[float]]) -> None:
        """Change options; those that are not given stay.

        The parameter and the buffers stay the same objects. The norm is found anew only if ``eps`` or ``update`` has
        changed: for another ``coefficient`` or ``mode`` the weight is divided again by the norm that is known.

        Raises:
            UserError: a value is not offered, or an option cannot be changed in place.

        >>> layer = nn.Linear(4, 4)
        >>> normalization = SpectralNorm(layer)
        >>> normalization.set_options(coefficient=2.0, mode="cap")
        >>> normalization
        SpectralNorm(n_power_iterations=1, mode=cap, coefficient=2)
        """
        self.check_change(**changes)
        self.settle()
        if changes.get("update", self.update) != self.update:
            self._hand_over_vectors()
        if changes.get("eps", self.eps) != self.eps:
            self.invalidate()
        before = self.divided_to, self.mode, self.n_power_iterations
        for option, value in changes.items():
            setattr(self, "_coefficient" if option == "coefficient" else option, plain_value(option, value))
        if self.scale is not None and "coefficient" in changes:
            with torch.no_grad():
                self.scale.fill_(self._coefficient)
        kept_before, self._keeps = self._keeps, self._may_keep()
        if self._keeps and not kept_before:
            WeightClock.num_watches += 1  # the others are to find it
        if (self.divided_to, self.mode, self.n_power_iterations) != before:
            renewal.divide_again(self)

    def _may_keep(self) -> bool:
        # A CUDA graph that trains the weight changes it at every replay without anybody seeing it.
        return self.update == "step" and not self._is_vector and not self._is_captured

    @property
    def divided_to(self) -> float:
        """The norm that the weight is divided to; a learned scale comes after it."""
        return self._coefficient if self.scale is None else 1.0

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, mode={self.mode}, coefficient={self.coefficient:g}"

    # What it computes

    def compute_weight(self, module: nn.Module) -> Tensor:
        """The normalized weight of ``module``, whether or not this is registered as its parametrization.

        Raises:
            UserError: the module has no weight of this one's name.
        """
        return self(_weight_of(module, self.name))

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The norm of ``weight`` by which it is divided: a scalar estimate, a copy. Changes nothing that is saved."""
        self.settle()
        if self._is_vector:
            return torch.linalg.vector_norm(weight)
        if self._can_keep(weight):
            with one_at_a_time:
                return self._current(weight).sigma.clone()
        if self.follows_map:
            return self.map_of(whole(weight)).sigma
        parameter = self._changing_parameter(weight)
        if parameter is not None:
            return norm_alone.sigma_of(self, weight, parameter).clone()
        return unkept.rayleigh(self.views, whole(weight), self.pairs())

    @torch.no_grad()
    def sigma_upper(self, weight: Tensor) -> Tensor:
        """A number that the norm of ``weight`` is guaranteed not to exceed: a float64 scalar.

        Of a strict normalization it is what the weight is divided by, up to rounding.

        Raises:
            UserError: the norm is the mean of two.
        """
        self.settle()
        if self.norm == "bidirectional":
            raise UserError('There is no guaranteed bound for norm="bidirectional"; use norm="matrix".')
        if self.strict and self._can_keep(weight):
            with one_at_a_time:
                upper = self._current(weight).quotient.upper
            assert upper is not None
            return upper.clone()
        return self.upper_bound(whole(weight))

    def target(self, dtype: torch.dtype) -> Target:
        """What a strict value has to be whose entries are rounded to ``dtype``."""
        return Target(self.divided_to, self.mode == "cap", self.eps, dtype, self._gain)

    def learn_size(self, size: tuple[int, ...]) -> None:
        """From now on the norm is meant for images of ``size``."""
        self.learned_size = size
        self.invalidate()

    def _refuse_other_updates(self, update: str) -> None:
        if self.follows_map and update != "step":
            raise UserError(
                f'norm="operator" of a convolution is offered with update="step" alone, got {update!r}; leave it out.'
            )

    def read(self, weight: Tensor) -> Tensor:
        """As `forward`; quick where the value is kept, because every use of the layer comes here."""
        own = self.__dict__  # asked for once: each attribute of a module is looked for in its classes first
        if (
            own.get("scale", self) is None
            and not _are_transforms_active()
            and _tracing_state() is None
            and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            with one_at_a_time:
                kept = own["_kept"]
                if kept is not None and kept.is_current(weight):
                    fresh = kept.outputs.fresh
                    if (  # as `_handed_out` finds after several calls
                        fresh
                        and kept.is_in_buffers
                        and _is_grad_enabled()
                        and weight.requires_grad
                        and not _is_autocast_enabled()
                    ):
                        kept.was_used = True
                        return fresh.pop()
                    return self._handed_out(weight, kept)
        return self.forward(weight)

    @torch.no_grad()
    def vectors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors u and v that `sigma` belongs to: sigma = u^H W v. Changes nothing that is saved.

        Of a bidirectional norm they are those of the matrix with outputs first.

        Returns:
            Unit vectors of (out,) and (in * kernel,); of a 1-D weight, a matrix with one column, (out,) and (1,). They
            are copies.
        """
        self.settle()
        if self._is_vector:
            return torch.nn.functional.normalize(weight, dim=0, eps=self.eps), weight.new_ones(1)
        if self._can_keep(weight):
            with one_at_a_time:
                u, v = self._current(weight).quotient.pairs[0]
        elif self.follows_map:
            u, v = self._u, self._v
        else:
            u, v = unkept.turned(self.views, whole(weight), self.pairs())[0]
        return u.clone(), v.clone()

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized ``weight``, of its shape and type."""
        if self.scale is None and self._keeps:
            return self._divided(weight)
        if self.scale is not None:
            norm_alone.refuse_sharded(weight, 'mode="learnable"')
        sees_writes = self.sees_writes(weight)
        if sees_writes:
            handed = self.handed_out
            if handed is not None and handed.was_changed_unseen():
                return handed.value  # being initialized, in several writes
            self.settle()
        value = self._divided(weight)
        if self.scale is not None:
            # A copy: else a step of an optimizer would change the numbers that a graph from before it needs.
            value = value * self.scale.clone()
            if sees_writes:
                self._forgotten_scale.look(weight, self.scale, self.name)
        if sees_writes:
            self._hand_out(value, weight)
        return value

    def hands_out_kept(self, weight: Tensor) -> bool:
        """Whether the value of ``weight`` is kept and handed out itself, not what a learned scale makes of it."""
        return self.scale is None and self._can_keep(weight)

    def _divided(self, weight: Tensor) -> Tensor:
        if self.in_graphs is not None and is_eager(weight):
            self.in_graphs.forget()
        if weight.is_meta and (self.strict or self.follows_map):
            return weight * 1  # there are no values to bound
        if self.strict and not self._can_keep(weight):
            return unkept.use_strict(self, weight)
        if self._is_vector:
            return self.quotient(weight, torch.linalg.vector_norm(weight.to(compute_dtype(weight.dtype))))
        if not self._can_keep(weight):
            value = captured.use(self, weight) if is_capturing(weight) else None
            if value is not None:
                return value
            if self.follows_map:
                return unkept.use_map(self, weight)
            parameter = self._changing_parameter(weight)
            return unkept.use(self, weight) if parameter is None else norm_alone.use(self, weight, parameter)
        with one_at_a_time:
            kept = self._kept
            if kept is None or not kept.is_current(weight):
                kept = self._current(weight, into_buffers=_is_grad_enabled() and self.training)
            return self._handed_out(weight, kept)

    def _handed_out(self, weight: Tensor, kept: Kept) -> Tensor:
        kept.was_used = True
        dtype = self.type_for_use(weight) if _is_autocast_enabled() else None
        has_grad = _is_grad_enabled()
        if has_grad and self.training and not kept.is_in_buffers:
            engine.write_buffers(self, kept)
        if not has_grad or not weight.requires_grad:
            value = kept.value if dtype is None else engine.rounded_for_autocast(self, kept, weight, dtype).value
            return value.detach()
        if dtype is None:
            return engine.output_for_use(self, kept, weight)
        return engine.rounded_output_for_use(self, kept, engine.rounded_for_autocast(self, kept, weight, dtype), weight)

    def type_for_use(self, weight: Tensor) -> torch.dtype | None:
        """To which type a use under autocast would round the value, which is handed out rounded; None: to none."""
        if _is_autocast_enabled() and (self.strict or (self._is_cast and self.scale is None)):
            return autocast_dtype(weight)
        return None

    def right_inverse(self, value: Tensor) -> Tensor:
        """What the raw weight becomes when ``value`` is assigned: ``value``, which is then normalized."""
        return value

    # Keeping

    def invalidate(self) -> None:
        """Forget the kept value: the next use computes it anew from the weight."""
        self.settle()
        state = self._norm_alone
        self.forget()
        if state is not None and state.was_written_to():  # of a part of the weight alone, which settles at the next use
            self._norm_alone = state

    def forget(self) -> None:
        """As `invalidate`, with what may have been written into the value."""
        self._kept = self._norm_alone = self.handed_out = None

    def train(self, mode: bool = True) -> SpectralNorm:
        """As that of every module. Averaged weights are often swapped in for evaluation."""
        if self._kept is not None and mode != self.training:
            self._kept.looks.soon()
        return super().train(mode)

    def leave_to_graphs(self) -> None:
        """Keep nothing outside of captured CUDA graphs any more, because one trains the weight."""
        if self._kept is not None:
            engine.forget_nodes(self, self._kept)
        self._is_captured, self._keeps = True, False
        self.invalidate()

    def was_stepped_in_graph(self) -> None:
        """A captured step of an optimizer moves the weight, at every replay."""
        self.leave_to_graphs()
        if self.in_graphs is not None:
            self.in_graphs.forget()

    def _hand_over_vectors(self) -> None:
        """Leave in the buffers what another update rule goes on from."""
        if self._kept is not None:
            engine.write_buffers(self, self._current(self._kept.moment.clock.weight))
        if self._norm_alone is not None:
            norm_alone.write_vectors(self, self._norm_alone)
        self.invalidate()

    def _can_keep(self, weight: Tensor) -> bool:
        """Whether ``weight`` is a real parameter in ordinary eager execution.

        Not: any other tensor in its place (`functional_call`, DataParallel's replicas, another parametrization below
        this one), wrappers such as DTensor, what FSDP2 puts there for one forward, and whatever is being traced,
        captured or transformed.
        """
        return is_eager(weight) and self._is_own(weight) and weight.numel() > 0

    def _is_own(self, weight: Tensor) -> bool:
        """What `_can_keep` asks of the weight itself; all that may have changed of one of which something is kept."""
        return self._keeps and is_ordinary(weight)

    def _changing_parameter(self, weight: Tensor) -> Tensor | None:
        """The parameter that ``weight`` follows, if the norm of it is kept but not the value."""
        if not self._keeps or not is_eager(weight) or weight.numel() == 0:
            return None
        return norm_alone.changing_parameter(self, weight)

    def _current(self, weight: Tensor, *, into_buffers: bool = False) -> Kept:
        """The kept value, renewed if the weight has changed."""
        return renewal.current(self, weight, into_buffers=into_buffers)

    def expect_initialization(self) -> None:
        """Until an optimizer moves a new weight it may be initialized, through ``.data`` as well."""
        self.awaits_initialization = False
        kept = self._kept
        if kept is not None and kept.moment.steps == 0 and host_has(kept.value.device):
            kept.looks.expect_initialization(kept.value)

    # What the engine asks for

    def watched(self, weight: Tensor) -> WeightClock:
        """The weight's clock, through which an optimizer's step finds this normalization."""
        clock = watch(weight)
        clock.add_watcher(self)
        return clock

    def keep(self, kept: Kept) -> None:
        """Hold ``kept`` until the weight changes."""
        self.__dict__["_kept"] = kept  # without nn.Module's search for a parameter in it

    def kept_to_follow(self, clock: WeightClock) -> Kept | None:
        """What is kept, if the weight is one optimizer step further and nothing else has happened to it."""
        kept, weight = self._kept, clock.weight
        if kept is None or kept.moment.clock is not clock or weight.is_complex() or not self._is_own(weight):
            return None
        clock.observe()
        return kept if kept.can_be_followed() and not kept.was_written_to() else None

    # Vectors

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """Power iteration now, whatever the update rule: `spectralnorm.update_` calls it."""
        self.settle()
        self._restore_scale()
        if self._is_vector:
            return
        parameter = self._changing_parameter(weight)
        if parameter is not None:
            return norm_alone.advance(self, weight, parameter)
        if not self._can_keep(weight) or weight.is_complex():
            self.require_vectors(weight)
            return self.write_vectors(*unkept.iterated(self, whole(weight), self.pairs(), self.n_power_iterations))
        with one_at_a_time:
            kept = self._current(weight)
            with plain_arithmetic(weight):
                engine.refresh_together([engine.Member(self, weight, kept)])
            engine.write_buffers(self, self._kept)  # type: ignore[arg-type]

    # Shared

    def quotient(self, weight: Tensor, sigma: Tensor) -> Tensor:
        """The value of ``weight`` if its norm is ``sigma``."""
        divisor, _ = divisor_of(sigma, self.divided_to, cap=self.mode == "cap", eps=self.eps)
        return divided(weight, divisor)

    def find_vectors(self, weight: Tensor) -> bool:
        has_norm = super().find_vectors(weight)
        if has_norm:
            self._restore_scale()
        return has_norm

    @torch.no_grad()
    def _restore_scale(self) -> None:
        """Set a learned scale that is not finite back to the coefficient."""
        if self.scale is not None and not self.scale.isfinite():
            self.scale.fill_(self._coefficient)

    @torch.no_grad()
    def _start_afresh(self) -> None:
        """Fill memory that came after construction as construction does without a weight."""
        if not self._is_vector:
            self.start_vectors_afresh()
        if self.scale is not None:
            self.scale.fill_(self._coefficient)

    # Loading, copying and moving

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate()  # what is loaded twice is the same function, whatever was there before
        self.symbol_vectors = None
        if self.in_graphs is not None:  # the weight is there already: its parameter is the parent's
            self.in_graphs.restart(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.half()` and back could leave no other trace.
        self.invalidate()
        was_meta = self._is_meta()
        super()._apply(fn, recurse)
        if was_meta and not self._is_meta():
            self._start_afresh()
        return self

    def _is_meta(self) -> bool:
        return any(tensor.is_meta for tensor in (*self.buffers(), *self.parameters()))

    def __getstate__(self) -> dict[str, Any]:
        held = ("_kept", "_norm_alone", "handed_out", "_forgotten_scale", "in_graphs")
        # A graph that trains the weight does not train a copy of it.
        return {**super().__getstate__(), **dict.fromkeys(held), "_is_captured": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forgotten_scale = ForgottenScale()
        self._keeps = self._may_keep()

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        with one_at_a_time:
            kept = self._kept
            if kept is not None and kept.is_current(kept.moment.clock.weight):
                weight = memo.get(id(kept.moment.clock.weight))
                # The copy computes with the very value of the original.
                if type(weight) is nn.Parameter and not weight.is_inference():
                    copied._kept = kept.for_copy(weight)
                    copied.watched(weight)
        return copied


def _weight_of(module: nn.Module, name: str) -> Tensor:
    """The raw weight: what reaches the normalization that is there, or one that would be put on."""
    if parametrize.is_parametrized(module, name):
        parts: Any = module.parametrizations[name]  # type: ignore[index]
        found = (part for part in parts if isinstance(part, SpectralNorm))
        weight = input_of(parts, next(found, foreign.parametrization_of(module, name)))
    else:
        weight = getattr(module, name, None)
    if isinstance(weight, parametrize.ParametrizationList):
        raise UserError(
            f"This {type(module).__name__} holds the parametrizations of a layer, whose weight is normalized through "
            "the layer. A loop over model.modules() that normalizes layers comes to it: take list(model.modules()), or "
            "add_spectral_norm(model) without a loop."
        )
    if not isinstance(weight, Tensor):
        present = ", ".join(name for name, _ in module.named_parameters(recurse=False)) or "none"
        raise UserError(f"{type(module).__name__} has no weight {name!r}; its parameters are: {present}.")
    if is_lazy(weight):
        raise UserError(
            f"The weight {name!r} of {type(module).__name__} has no shape yet; run one forward with real inputs first."
        )
    if weight.ndim == 0:
        raise UserError(
            f"{name!r} of {type(module).__name__} is a single number; only vectors and matrices have a norm."
        )
    return weight
