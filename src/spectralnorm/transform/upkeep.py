"""Walking over the normalized weights of a model, and what can be asked of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralnorm.parametrizations import SpectralNorm, normalization_of
from spectralnorm.parametrizations.stacked import input_of, originals_of, parameter_of
from spectralnorm.parametrizations.weight_clock import as_one_step

__all__ = [
    "invalidate",
    "keep_values",
    "monitor",
    "normalized_weights",
    "optimizer_step",
    "own_parameter",
    "raw_weight",
    "update_",
]


def normalized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, SpectralNorm]]:
    """Every normalized weight of ``model``: the layer's name, the layer, the weight's name in it, its normalization.

    The layer's name is its path in the model; a weight that is not called "weight" has its name appended.

    >>> from spectralnorm import add_spectral_norm
    >>> model = add_spectral_norm(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> [name for name, *_ in normalized_weights(model)]
    ['0', '2']
    """
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name in module.parametrizations:  # type: ignore[union-attr]
            normalization = normalization_of(module, tensor_name)
            if normalization is not None:
                yield weight_label(path, tensor_name), module, tensor_name, normalization


def weight_label(path: str, tensor_name: str) -> str:
    """The layer's path, with the weight's name where it says more."""
    return path if path and tensor_name == "weight" else f"{path}.{tensor_name}".removeprefix(".")


def raw_weight(module: nn.Module, tensor_name: str) -> Tensor:
    """What reaches the normalization: the parameter, or what other parametrizations make of theirs."""
    return input_of(_parts(module, tensor_name), normalization_of(module, tensor_name))


def own_parameter(module: nn.Module, tensor_name: str) -> Tensor | None:
    """The parameter that is normalized; None if it is what other parametrizations make of theirs."""
    normalization = normalization_of(module, tensor_name)
    return None if normalization is None else parameter_of(_parts(module, tensor_name), normalization)


def _parts(module: nn.Module, tensor_name: str) -> nn.Module:
    return module.parametrizations[tensor_name]  # type: ignore[index, return-value]


@torch.no_grad()
def monitor(model: nn.Module) -> dict[str, float]:
    """The norm of each raw weight, by which its layer divides, of a strict one its upper bound; one wait in all.

    >>> from spectralnorm import add_spectral_norm
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    >>> monitor(add_spectral_norm(nn.Sequential(layer)))
    {'0': 3.0}
    """
    found = {
        name: (normalization.sigma_upper if normalization.strict else normalization.sigma)(
            raw_weight(module, tensor_name)
        )
        for name, module, tensor_name, normalization in normalized_weights(model)
    }
    if not found:
        return {}
    devices = {sigma.device for sigma in found.values()}
    if len(devices) > 1:
        return {name: float(sigma) for name, sigma in found.items()}
    return dict(zip(found, torch.stack([sigma.double() for sigma in found.values()]).tolist(), strict=True))


def invalidate(model: nn.Module) -> None:
    """Tell that weights were changed in a way that cannot be seen: by a write through ``.data``.

    >>> from spectralnorm import spectral_norm
    >>> layer = spectral_norm(nn.Linear(2, 2))
    >>> _ = layer.parametrizations.weight.original.data.mul_(5)
    >>> invalidate(layer)
    >>> layer.weight.norm(2).item() <= 2**0.5 + 1e-6
    True
    """
    for *_, normalization in normalized_weights(model):
        normalization.invalidate()


@contextmanager
def optimizer_step(model: nn.Module) -> Iterator[None]:
    """Say that what changes the weights of ``model`` within is a step of training.

    Steps of optimizers are noticed, and the norms follow them by power iteration. Any other write could be of any
    size, so the norm is computed anew, which takes many times as long. Within this context an update that is written
    out, or the work of an optimizer that is not a `torch.optim.Optimizer`, counts as one step, once for all that is
    done within. Writes through ``.data`` are noticed as well.

    Args:
        model: whose normalized weights are all updated within; one that is not is renewed once more for nothing.

    >>> from spectralnorm import spectral_norm
    >>> layer = spectral_norm(nn.Linear(3, 2))
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> with torch.no_grad(), optimizer_step(layer):
    ...     for parameter in layer.parameters():
    ...         _ = parameter.sub_(parameter.grad, alpha=0.1)
    """
    weights: list[Tensor] = []
    for _, module, tensor_name, normalization in normalized_weights(model):
        weights += [*originals_of(_parts(module, tensor_name)), *normalization.parameters()]
    with as_one_step(weights):
        yield


def keep_values(model: nn.Module, keep: bool = True) -> None:
    """Say whether normalized weights that FSDP2 shards are kept whole between uses. At first they are not.

    The norm is kept in any case, so the values are the same. Kept, each layer has a whole normalized weight on every
    process all the time, which is the memory that FSDP2 saves, and what it saves is one division per use. For weights
    that are not sharded by FSDP2 it changes nothing.

    Args:
        model: with normalized weights; it goes for those that it has now.
        keep: whether to.

    >>> from spectralnorm import spectral_norm
    >>> keep_values(spectral_norm(nn.Linear(2, 2)), False)
    """
    for *_, normalization in normalized_weights(model):
        normalization.keeps_value_when_sharded = keep
        normalization.invalidate()


@torch.no_grad()
def update_(model: nn.Module) -> None:
    """Run ``n_power_iterations`` for every normalized weight now, whether or not it has changed.

    The only way to advance weights normalized with ``update="manual"``.

    >>> from spectralnorm import spectral_norm
    >>> update_(spectral_norm(nn.Linear(2, 2), update="manual"))
    """
    # Layers that share a weight share its normalization.
    found = {
        id(normalization): (normalization, raw_weight(module, tensor_name))
        for _, module, tensor_name, normalization in normalized_weights(model)
    }
    for normalization, weight in found.values():
        normalization.advance(weight)
