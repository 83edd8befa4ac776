"""Normalizing the weights of a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, Unpack

from torch import nn
from torch.nn.parameter import is_lazy

from spectralnorm.errors import UserError
from spectralnorm.linalg import ConvolutionGeometry, MatrixView, view_of
from spectralnorm.parametrizations import SpectralNorm, foreign, fsdp, normalization_of
from spectralnorm.parametrizations.image_size import geometry_of, takes_input_size
from spectralnorm.parametrizations.lazy import PendingNorm, can_wait, pending_of, pending_of_module, with_shape
from spectralnorm.parametrizations.options import (
    Options,
    checked_input_size,
    refuse_unknown,
    require_module,
)
from spectralnorm.parametrizations.registration import register
from spectralnorm.parametrizations.snapshot import unchanged_on_failure
from spectralnorm.transform.input_sizes import input_sizes
from spectralnorm.transform.selection import Candidate, Pattern, names, select
from spectralnorm.transform.upkeep import normalized_weights, own_parameter

__all__ = ["add_spectral_norm"]

M = TypeVar("M", bound=nn.Module)


def add_spectral_norm(
    model: M,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    input_shape: Sequence[int] | None = None,
    **options: Unpack[Options[float | Mapping[str, float]]],
) -> M:
    """Normalize every weight of a model that makes sense, in place.

    The weights of Linear, Bilinear, Conv1-3d, ConvTranspose1-3d, Embedding and EmbeddingBag, the in and out projections
    of MultiheadAttention, every matrix of RNN, LSTM, GRU and their cells; of subclasses and lazy layers too. Any other
    matrix where ``include`` names it. A weight that several layers share is normalized once. Parameters stay the same
    objects, so optimizers made before stay valid; but they do not have the scales that ``mode="learnable"`` adds, which
    the first step that leaves one behind warns of. `summary` tells what was done.

    What is normalized already stays, and only the options that are given change, in place. What torch's two functions
    have normalized is taken over, with their options where none are given.

    Args:
        model: any module; a single layer too.
        include: only these: a glob or several, for names of layers (``"blocks.*"``) or of weights
            (``"*.weight_hh_l*"``), or ``predicate(name, layer)``. A glob that ends with the very name of a tensor
            (``"*.my_matrix"``) adds it, whatever the layer; a vector needs its whole name.
        exclude: not these; given as ``include``. A glob has to match some parameter.
        input_shape: of one sample, (channels, height, width), with ``strict`` or ``norm="operator"``. Each convolution
            gets the ``input_size`` that it meets in a forward of such a sample, which is run once, without values. Its
            bound is tighter then and takes a fraction of the time, and images of another size are refused. A
            convolution that this forward does not use is left without.
        options: ``n_power_iterations``, ``eps``, ``norm``, ``mode``, ``coefficient``, ``strict``, ``input_size`` and
            ``update`` as for `spectralnorm.SpectralNorm`. ``coefficient`` may also map globs to values: a weight gets
            that of the first glob that fits its layer's name or its own. Where none fits, a new normalization gets 1
            and an existing one keeps what it has.

    Returns:
        The model.

    Raises:
        UserError: an option has a value that is not offered or cannot be changed in place, no layer takes the
            ``input_size``, a glob of ``include``, ``exclude`` or ``coefficient`` matches nothing, layers share a weight
            that they read as different matrices, or the model cannot be run on one tensor of ``input_shape`` without
            values. Nothing has been changed then, nor after any other error.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1))
    >>> model = add_spectral_norm(model, coefficient={"0": 2.0, "*": 1.0})
    >>> [type(layer).__name__ for layer in model]
    ['ParametrizedConv2d', 'ReLU', 'Flatten', 'ParametrizedLinear']
    >>> model = add_spectral_norm(model, include="0", mode="cap")  # changes the one that is there
    >>> model[0].parametrizations.weight[0]
    SpectralNorm(n_power_iterations=1, mode=cap, coefficient=2)
    """
    refuse_unknown("add_spectral_norm", options)
    require_module("add_spectral_norm", model)
    chosen = select(model, include, exclude)
    by_weight = _existing(model)
    if input_shape is None:
        sizes = _same_size_for_each(chosen, by_weight, options)
    else:
        sizes = _sizes_of_each(model, chosen, input_shape, options)
    wanted = _options_of_each(options, chosen, sizes)
    _refuse_disagreeing_views(model, chosen, options)
    to_change: dict[int, tuple[SpectralNorm | PendingNorm, Options[float]]] = {}
    for candidate in chosen:
        existing, changes = _present(candidate, by_weight), wanted[id(candidate.weight)]
        if _own(candidate) is None:
            fsdp.require_sharded(candidate.module, candidate.tensor_name)
        if existing is None:
            continue
        if isinstance(existing, PendingNorm):
            existing.check_change(candidate.module, **changes)
        else:
            existing.check_change(**changes)
        to_change[id(existing)] = existing, changes

    with unchanged_on_failure(model):
        for candidate in chosen:
            # One normalization per parameter: layers that share a weight share the value that is kept of it.
            normalization = _present(candidate, by_weight)
            if normalization is None:
                normalization = by_weight[id(candidate.weight)] = _made(candidate, wanted[id(candidate.weight)])
            _put_on(candidate, normalization)
    for existing, changes in to_change.values():  # last: it writes into tensors, and nothing is refused any more
        existing.set_options(**changes)
    return model


def _existing(model: nn.Module) -> dict[int, SpectralNorm | PendingNorm]:
    """The normalizations in the model, by the id of the parameter."""
    found: dict[int, SpectralNorm | PendingNorm] = {
        id(module._parameters[pending.name]): pending
        for module in model.modules()
        for pending in pending_of_module(module)
    }
    for _, module, name, normalization in normalized_weights(model):
        parameter = own_parameter(module, name)
        if parameter is not None:
            found[id(parameter)] = normalization
    return found


def _own(candidate: Candidate) -> SpectralNorm | PendingNorm | None:
    module, name = candidate.module, candidate.tensor_name
    return normalization_of(module, name) or pending_of(module, name)


def _present(
    candidate: Candidate, by_weight: Mapping[int, SpectralNorm | PendingNorm]
) -> SpectralNorm | PendingNorm | None:
    """The normalization that a weight has, or else joins because another layer shares the weight."""
    return _own(candidate) or by_weight.get(id(candidate.weight))


def _sizes_of_each(
    model: nn.Module,
    chosen: list[Candidate],
    input_shape: Sequence[int],
    options: Options[float | Mapping[str, float]],
) -> dict[int, tuple[int, ...]]:
    """The ``input_size`` of each convolution, by the id of its weight."""
    if not options.get("strict") and options.get("norm") != "operator":
        raise UserError('input_shape is for strict=True and norm="operator", whose norms depend on it; leave it out.')
    if options.get("input_size") is not None:
        raise UserError(
            "input_size is for all convolutions alike, and input_shape tells each its own; give one of them."
        )
    return input_sizes(model, chosen, input_shape)


def _same_size_for_each(
    chosen: list[Candidate],
    by_weight: Mapping[int, SpectralNorm | PendingNorm],
    options: Options[float | Mapping[str, float]],
) -> dict[int, tuple[int, ...]]:
    """The ``input_size`` that is given, for each weight whose norm depends on it."""
    size = checked_input_size(options.get("input_size"))
    if size is None:
        return {}
    found = {}
    for candidate in chosen:
        existing = _present(candidate, by_weight)
        before: Any = existing.options if isinstance(existing, PendingNorm) else vars(existing) if existing else {}
        norm = options.get("norm", before.get("norm", "matrix"))
        strict = options.get("strict", before.get("strict", False))
        if takes_input_size(candidate.module, candidate.tensor_name, norm=norm, strict=strict):
            found[id(candidate.weight)] = size
    if not found:
        raise UserError(
            'input_size is for convolutions with strict=True or norm="operator", and here is none; leave it out.'
        )
    return found


def _options_of_each(
    options: Options[float | Mapping[str, float]], chosen: list[Candidate], sizes: Mapping[int, tuple[int, ...]]
) -> dict[int, Options[float]]:
    """The options that are given for each weight, by its id."""
    shared: Any = dict(options)
    shared.pop("input_size", None)
    coefficient = shared.pop("coefficient", {})
    by_glob = coefficient if isinstance(coefficient, Mapping) else {"*": coefficient}
    if isinstance(coefficient, Mapping):
        for glob in by_glob:
            if not isinstance(glob, str):
                raise UserError(f"coefficient must map globs to numbers, got the key {glob!r}; write {str(glob)!r}.")
            if not any(names(glob, candidate) for candidate in chosen):
                raise UserError(
                    f"coefficient={{{glob!r}: ...}} matches none of the weights; those are: "
                    f"{', '.join(candidate.label for candidate in chosen) or 'none'}."
                )
    found: dict[int, Options[float]] = {}
    for candidate in chosen:
        fitting = (value for glob, value in by_glob.items() if names(glob, candidate))
        own: Any = {**shared, **dict(zip(("coefficient",), fitting, strict=False))}
        if id(candidate.weight) in sizes:
            own["input_size"] = sizes[id(candidate.weight)]
        if found.setdefault(id(candidate.weight), own) != own:
            raise UserError(f"{candidate.label} shares its weight with a layer for which coefficient is another.")
    return found


def _made(candidate: Candidate, options: Options[float]) -> SpectralNorm | PendingNorm:
    """A new normalization of a weight."""
    module, name = candidate.module, candidate.tensor_name
    if can_wait(module, name):
        return PendingNorm(name, None, options)
    dim = foreign.foreign_dim(module, name)
    options = {**foreign.foreign_options(module, name), **options}
    if foreign.hook_of(module, name) is not None:
        foreign.undo_hook(module, name)
    return SpectralNorm(module, name, dim=dim, **options)


def _put_on(candidate: Candidate, normalization: SpectralNorm | PendingNorm) -> None:
    if _own(candidate) is not None:
        return
    if isinstance(normalization, PendingNorm):
        normalization.wait(candidate.module)
    else:
        register(candidate.module, candidate.tensor_name, normalization)


class _Reading(NamedTuple):
    """How a layer reads its weight.

    Attributes:
        label: how the weight is called in messages.
        view: the matrix.
        map: that of images whose norm is meant; None if it is that of the matrix.
    """

    label: str
    view: MatrixView
    map: ConvolutionGeometry | None


def _refuse_disagreeing_views(
    model: nn.Module, chosen: list[Candidate], options: Options[float | Mapping[str, float]]
) -> None:
    """Layers with one normalization must read their weight as the same matrix, and as the same map if it is of that."""
    of_maps = bool(options.get("strict")) or options.get("norm") == "operator"
    first_by_weight = {
        id(parameter): _Reading(label, normalization.view, normalization.geometry)
        for label, module, name, normalization in normalized_weights(model)
        if (parameter := own_parameter(module, name)) is not None
    }
    for candidate in chosen:
        name, weight, layer = candidate.tensor_name, candidate.weight, candidate.module
        if is_lazy(weight):
            layer = with_shape(layer, name)
            weight = None if layer is None else layer._parameters[name]
        if layer is None or weight is None or normalization_of(layer, name) is not None:
            continue
        view, geometry = view_of(layer, weight, foreign.foreign_dim(layer, name)), geometry_of(layer, name, weight)
        own = _Reading(candidate.label, view, geometry if of_maps else None)
        first = first_by_weight.setdefault(id(candidate.weight), own)
        if first.view != view or first.map not in (None, geometry):
            raise UserError(
                f"{first.label} and {candidate.label} share a weight but read it as different matrices, so no one norm "
                "is right for both; exclude one of them."
            )
