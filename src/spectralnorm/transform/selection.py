"""Which weights of a model are normalized, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import foreign, is_normalized, normalization_of
from spectralnorm.parametrizations.layer_class import plain_class
from spectralnorm.parametrizations.lazy import can_wait
from spectralnorm.parametrizations.stacked import input_of
from spectralnorm.transform.upkeep import weight_label

__all__ = ["Candidate", "Pattern", "candidates", "names", "select"]

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Layers whose weight is a linear map of their input, or a table of vectors. Subclasses count.
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# The output projection is a Linear of its own. Of the others a layer has either the first or the rest.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Candidate:
    """One parameter of a model.

    Attributes:
        paths: the layer's name in the model; of one that stands at several places all its names, in order.
        module: the layer.
        tensor_name: the parameter's name in it.
        weight: the raw parameter.
        obstacle: why it cannot be normalized; None if it can.
        reason: why it is not unless it is named; None if it is.
    """

    paths: tuple[str, ...]
    module: nn.Module
    tensor_name: str
    weight: Tensor
    obstacle: str | None
    reason: str | None

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return weight_label(self.path, self.tensor_name)

    @property
    def path(self) -> str:
        """The layer's first name."""
        return self.paths[0]

    @property
    def full_names(self) -> list[str]:
        """Its names among the parameters of the model before anything was normalized."""
        return [f"{path}.{self.tensor_name}".removeprefix(".") for path in self.paths]

    @property
    def is_bias(self) -> bool:
        """Whether it is added and not multiplied with, going by its name."""
        return self.tensor_name.startswith("bias") or self.tensor_name.endswith("_bias")


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every parameter of ``model`` in order."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    for module, paths in places.items():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for tensor_name, weight in _raw_weights(module):
            obstacle = _obstacle(module, tensor_name, weight)
            yield Candidate(tuple(paths), module, tensor_name, weight, obstacle, _reason(module, tensor_name, weight))


def names(glob: str, candidate: Candidate) -> bool:
    """Whether a glob fits the layer's name or the weight's own."""
    return any(fnmatchcase(name, glob) for name in (*candidate.paths, *candidate.full_names))


def _asks_for(glob: str, candidate: Candidate) -> bool:
    """Whether a glob wants this weight normalized.

    What is normalized by default it only has to fit. Any other weight is asked for only by a glob that ends with the
    tensor's very name, and a vector only by its whole name, so that ``blocks.*`` or ``*.weight`` does not take the
    scales of LayerNorm along.
    """
    if candidate.reason is None:
        return names(glob, candidate)
    if _is_vector(candidate.weight):
        return glob in candidate.full_names
    layer_glob, _, tensor_name = glob.rpartition(".")
    return tensor_name == candidate.tensor_name and any(fnmatchcase(path, layer_glob) for path in candidate.paths)


def select(model: nn.Module, include: Pattern | None, exclude: Pattern | None) -> list[Candidate]:
    """The weights to normalize.

    Raises:
        UserError: ``include`` matches nothing that can be normalized, or ``exclude`` no parameter; of several globs
            each has to. Or one of them is no glob, no list of globs and no predicate.
    """
    everything = list(candidates(model))
    chosen = [candidate for candidate in everything if candidate.obstacle is None]
    if include is None:
        chosen = [candidate for candidate in chosen if candidate.reason is None]
    elif _is_predicate(include, "include"):
        chosen = [each for each in chosen if each.reason is None and _is_meant(include, each)]
        if not chosen:
            raise UserError(_nothing_matches(None, everything))
    else:
        possible, globs = chosen, _globs("include", include)
        chosen = [candidate for candidate in possible if any(_asks_for(glob, candidate) for glob in globs)]
        for glob in globs:
            if not any(_asks_for(glob, candidate) for candidate in possible):
                raise UserError(_nothing_matches(glob, everything))
    if exclude is None:
        return chosen
    if _is_predicate(exclude, "exclude"):
        return [candidate for candidate in chosen if not _is_meant(exclude, candidate)]
    globs = _globs("exclude", exclude)
    for glob in globs:
        if not any(names(glob, candidate) for candidate in everything):
            present = ", ".join(each.label for each in everything if each.obstacle is None and each.reason is None)
            raise UserError(
                f"exclude={glob!r} matches no layer; those that can be normalized are: {present or 'none'}."
            )
    return [candidate for candidate in chosen if not any(names(glob, candidate) for glob in globs)]


def _is_meant(predicate: Callable[[str, nn.Module], bool], candidate: Candidate) -> bool:
    return any(predicate(path, candidate.module) for path in candidate.paths)


def _is_predicate(pattern: Pattern, option: str) -> TypeGuard[Callable[[str, nn.Module], bool]]:
    if isinstance(pattern, type):
        raise UserError(
            f"{option} takes globs or a predicate, got the class {pattern.__name__}; for layers of a kind give "
            f"{option}=lambda name, layer: isinstance(layer, {pattern.__name__})."
        )
    return callable(pattern)


def _globs(option: str, pattern: Any) -> list[str]:
    globs = [pattern] if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Iterable) else [pattern]
    for glob in globs:
        if not isinstance(glob, str):
            raise UserError(
                f"{option} must be a glob, a list of globs or predicate(name, layer), got {glob!r}; for a regular "
                f"expression give {option}=lambda name, layer: re.search(pattern, name) is not None."
            )
    return globs


def _nothing_matches(glob: str | None, everything: list[Candidate]) -> str:
    for candidate in everything:
        if glob is not None and candidate.obstacle is not None and _asks_for(glob, candidate):
            return f"include matches only what cannot be normalized: {candidate.label} {candidate.obstacle}."
    known = [each.label for each in everything if each.obstacle is None and each.reason is None]
    others = [each.full_names[0] for each in everything if each.obstacle is None and each.reason and not each.is_bias]
    which = "include" if glob is None else f"include={glob!r}"
    message = f"{which} matches no layer that can be normalized; those are: {', '.join(known) or 'none'}"
    return message + (f"; by their full names also: {', '.join(others)}." if others else ".")


def _raw_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    under_hooks = [*foreign.names_under_hooks(module), *foreign.derived_hooks(module)]
    for name, parameter in module._parameters.items():
        name = name.removesuffix("_orig") if name.removesuffix("_orig") in under_hooks else name
        if parameter is not None:
            yield name, parameter
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for name, parts in lists.items():
            normalization = normalization_of(module, name) or foreign.parametrization_of(module, name)
            if normalization is None and parts.is_tensor:
                yield name, parts.original
            else:  # of one that is not normalized and made of several tensors, what they make
                with torch.no_grad():
                    yield name, input_of(parts, normalization)
    if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
        yield "weight", module.weight()  # type: ignore[operator]  # a quantized layer


def _reason(module: nn.Module, name: str, weight: Tensor) -> str | None:
    is_known = (
        (isinstance(module, _LAYERS) and name == "weight")
        or (isinstance(module, _RECURRENT) and name.startswith("weight_"))
        or (isinstance(module, nn.MultiheadAttention) and name in _PROJECTIONS)
    )
    if is_known or is_normalized(module, name):
        return None
    if _is_vector(weight):
        return "a vector, not a matrix"
    return f"not a known weight of {_kind(module)}; include can name it"


def _obstacle(module: nn.Module, name: str, weight: Tensor) -> str | None:
    if is_lazy(weight):
        return None if can_wait(module, name) else "has no shape yet: run one forward first"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"holds {weight.dtype}, not real or complex numbers"
    if weight.ndim == 0:
        return "is a single number"
    if weight.numel() == 0:
        return "is empty"
    derived = foreign.derived_hooks(module).get(name)
    if derived is not None:
        return f"is normalized already, by {type(derived).__name__}"
    is_ours = normalization_of(module, name) is not None
    is_torchs = foreign.parametrization_of(module, name) is not None
    if parametrize.is_parametrized(module, name) and not is_ours and not is_torchs:
        parts = ", ".join(type(part).__name__ for part in module.parametrizations[name])  # type: ignore[index]
        return f"is parametrized already, by {parts}"
    return None


def _is_vector(weight: Tensor) -> bool:
    return not is_lazy(weight) and weight.ndim < 2


def _kind(module: nn.Module) -> str:
    return plain_class(module).__name__
