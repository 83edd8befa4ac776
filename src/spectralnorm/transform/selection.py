"""Which weights of a model are normalized, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import foreign, normalization_of
from spectralnorm.parametrizations.layer_class import plain_class

__all__ = ["Candidate", "Pattern", "candidates", "select"]

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


@dataclass(frozen=True)
class Candidate:
    """One weight of a model.

    Attributes:
        path: the layer's name in the model.
        module: the layer.
        tensor_name: the weight's name in it.
        weight: the raw parameter.
        obstacle: why it is not normalized by default; None if it is.
    """

    path: str
    module: nn.Module
    tensor_name: str
    weight: Tensor
    obstacle: str | None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every weight of ``model`` in order; biases are left out."""
    for path, module in model.named_modules():
        if isinstance(module, (parametrize.ParametrizationList, nn.ParameterList, nn.ParameterDict)):
            continue
        for tensor_name, weight in _raw_weights(module):
            yield Candidate(path, module, tensor_name, weight, _obstacle(module, tensor_name, weight))


def select(model: nn.Module, include: Pattern | None, exclude: Pattern | None) -> list[Candidate]:
    """The weights to normalize.

    Raises:
        UserError: ``include`` matches none of those that can be.
    """
    possible = [candidate for candidate in candidates(model) if candidate.obstacle is None]
    chosen = possible
    if include is not None:
        is_included = _predicate(include)
        chosen = [candidate for candidate in chosen if is_included(candidate.path, candidate.module)]
        if not chosen:
            names = ", ".join(candidate.path or "(the model itself)" for candidate in possible) or "none"
            raise UserError(f"include matches no layer that can be normalized; those are: {names}.")
    if exclude is not None:
        is_excluded = _predicate(exclude)
        chosen = [candidate for candidate in chosen if not is_excluded(candidate.path, candidate.module)]
    return chosen


def _raw_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    under_hooks = foreign.names_under_hooks(module)
    for name, parameter in module._parameters.items():
        name = name.removesuffix("_orig") if name.removesuffix("_orig") in under_hooks else name
        if parameter is not None and not name.startswith("bias"):
            yield name, parameter
    if parametrize.is_parametrized(module):
        for name, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]
            original = getattr(parts, "original", None)
            if isinstance(original, Tensor) and not name.startswith("bias"):
                yield name, original


def _obstacle(module: nn.Module, name: str, weight: Tensor) -> str | None:
    if not isinstance(module, _LAYERS) or name != "weight":
        return f"{_kind(module)}.{name} is not among the weights that are normalized"
    if is_lazy(weight):
        return "has no shape yet: run one forward first"
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"holds {weight.dtype}, not real or complex numbers"
    is_ours = normalization_of(module, name) is not None
    is_torchs = foreign.parametrization_of(module, name) is not None
    if parametrize.is_parametrized(module, name) and not is_ours and not is_torchs:
        parts = ", ".join(type(part).__name__ for part in module.parametrizations[name])  # type: ignore[index]
        return f"is parametrized already, by {parts}"
    return None


def _kind(module: nn.Module) -> str:
    return plain_class(module).__name__


def _predicate(pattern: Pattern) -> Callable[[str, nn.Module], bool]:
    if callable(pattern):
        return pattern
    globs = [pattern] if isinstance(pattern, str) else list(pattern)
    return lambda path, module: any(fnmatchcase(path, glob) for glob in globs)
