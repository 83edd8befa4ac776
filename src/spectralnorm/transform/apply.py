"""Normalizing the weights of a whole model, and undoing it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from spectralnorm.errors import UserError
from spectralnorm.linalg import view_of
from spectralnorm.parametrizations import SpectralNorm, foreign, normalization_of
from spectralnorm.parametrizations.registration import register, unregister
from spectralnorm.transform.selection import Candidate, Pattern, select
from spectralnorm.transform.upkeep import normalized_weights, raw_weight, weight_label

__all__ = ["add_spectral_norm", "remove_spectral_norm"]

M = TypeVar("M", bound=nn.Module)


def add_spectral_norm(
    model: M,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    norm: str = "matrix",
    mode: str = "normalize",
    coefficient: float = 1.0,
    strict: bool = False,
    update: str = "step",
) -> M:
    """Normalize every weight of a model that makes sense, in place.

    Linear, Bilinear, Conv1-3d, ConvTranspose1-3d, Embedding and their subclasses. Weights that are normalized already
    stay as they are, those of torch's two functions are taken over. A weight that several layers share is normalized
    once. Parameters stay the same objects, so optimizers made before stay valid. `summary` tells what was done.

    Args:
        model: any module; a single layer too.
        include: only these layers: a glob for their names, several, or ``predicate(name, layer)``.
        exclude: not these; given as ``include``.
        n_power_iterations: this and what follows are the options of `spectralnorm.SpectralNorm`.
        eps: a norm up to here counts as zero.
        norm: which norm.
        mode: always, or only above ``coefficient``.
        coefficient: the norm that is wanted.
        strict: whether the bound is guaranteed.
        update: when power iteration advances.

    Returns:
        The model.

    Raises:
        UserError: an option has a value that is not offered, ``include`` matches nothing, or layers share a weight that
            they read as different matrices.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1))
    >>> model = add_spectral_norm(model, exclude="3")
    >>> [type(layer).__name__ for layer in model]
    ['ParametrizedConv2d', 'ReLU', 'Flatten', 'Linear']
    """
    chosen = select(model, include, exclude)
    _refuse_disagreeing_views(chosen)
    # One normalization per parameter: layers that share a weight share the value that is kept of it.
    by_weight = {id(raw_weight(module, name)): found for _, module, name, found in normalized_weights(model)}
    for candidate in chosen:
        module, name, weight = candidate.module, candidate.tensor_name, candidate.weight
        if normalization_of(module, name) is not None:
            continue
        dim = foreign.foreign_dim(module, name)
        if foreign.hook_of(module, name) is not None:
            foreign.undo_hook(module, name)
        normalization = by_weight.get(id(weight))
        if normalization is None:
            normalization = by_weight[id(weight)] = SpectralNorm(
                module,
                name,
                n_power_iterations,
                eps,
                dim,
                norm=norm,
                mode=mode,
                coefficient=coefficient,
                strict=strict,
                update=update,
            )
        register(module, name, normalization)
    return model


def remove_spectral_norm(model: M) -> M:
    """Take the normalization off all weights of a model and write the normalized weights into the parameters.

    The model computes the same function as before, and its parameters are the same objects.

    Returns:
        The model.

    >>> import torch
    >>> model = add_spectral_norm(nn.Sequential(nn.Linear(4, 4)))
    >>> inputs = torch.ones(1, 4)
    >>> before = model(inputs)
    >>> torch.equal(remove_spectral_norm(model)(inputs), before)
    True
    """
    baked: set[int] = set()
    for _, module, name, _ in list(normalized_weights(model)):
        weight = raw_weight(module, name)
        unregister(module, name, bake=id(weight) not in baked)
        baked.add(id(weight))
    return model


def _refuse_disagreeing_views(chosen: list[Candidate]) -> None:
    first_by_weight: dict[int, Candidate] = {}
    for candidate in chosen:
        first = first_by_weight.setdefault(id(candidate.weight), candidate)
        views = [
            view_of(each.module, each.weight, foreign.foreign_dim(each.module, each.tensor_name))
            for each in (first, candidate)
        ]
        if views[0] != views[1]:
            names = [weight_label(each.path, each.tensor_name) for each in (first, candidate)]
            raise UserError(
                f"{names[0]} and {names[1]} share a weight but read it as different matrices, so no one norm is right "
                "for both; exclude one of them."
            )
