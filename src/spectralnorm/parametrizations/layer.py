"""`spectral_norm`: normalizing one weight of one layer."""

from __future__ import annotations

from typing import TypeVar, Unpack

from torch import nn
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import foreign
from spectralnorm.parametrizations.lazy import PendingNorm, can_wait, pending_of
from spectralnorm.parametrizations.options import KeywordOptions, refuse_unknown, require_module
from spectralnorm.parametrizations.registration import normalization_of, register
from spectralnorm.parametrizations.snapshot import unchanged_on_failure
from spectralnorm.parametrizations.spectral_norm import SpectralNorm

__all__ = ["is_normalized", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    **options: Unpack[KeywordOptions[float]],
) -> M:
    """Normalize one weight of a layer by its spectral norm, at every use.

    The raw weight stays the same parameter object, under ``module.parametrizations[name].original``; an optimizer that
    holds it stays valid (it does not have the scale of ``mode="learnable"``). A lazy layer's weight, which has no shape
    yet, is normalized when its first forward gives it one, and for that forward already.

    Args:
        module: any layer; one of your own too.
        name: the weight's name in it: ``"weight_hh_l0"`` of an LSTM, ``"in_proj_weight"`` of an attention.
        n_power_iterations: this and what follows are the arguments of `SpectralNorm`.
        eps: a norm up to here counts as zero.
        dim: the weight's output dimension.
        options: ``norm``, ``mode``, ``coefficient``, ``strict``, ``input_size``, ``update``.

    Returns:
        The module.

    Raises:
        UserError: the weight is normalized already, there is no such weight, or an option cannot be.

    >>> import torch
    >>> from torch import nn
    >>> layer = spectral_norm(nn.Conv2d(3, 16, 3))
    >>> round(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item(), 4)
    1.0
    >>> _ = spectral_norm(nn.LSTM(8, 16), "weight_hh_l0", coefficient=2.0, mode="cap")
    """
    refuse_unknown("spectral_norm", options)
    require_module("spectral_norm", module)
    if is_normalized(module, name):
        raise UserError(
            f"The weight {name!r} of this {type(module).__name__} is spectrally normalized already; "
            "add_spectral_norm takes over what torch's functions have normalized."
        )
    if can_wait(module, name):
        PendingNorm(name, dim, {"n_power_iterations": n_power_iterations, "eps": eps, **options}).wait(module)
        return module
    normalization = SpectralNorm(module, name, n_power_iterations, eps, dim, **options)
    if not (name in module._parameters or name in module._buffers or parametrize.is_parametrized(module, name)):
        raise UserError(
            f"{name!r} of this {type(module).__name__} is computed and not a parameter, as under the hooks of "
            "torch.nn.utils.weight_norm and torch.nn.utils.prune; take that off first."
        )
    with unchanged_on_failure(module):
        register(module, name, normalization)
    return module


def is_normalized(module: nn.Module, name: str = "weight") -> bool:
    """Whether a weight is spectrally normalized, by this package or by one of torch's two functions.

    A weight that waits for its shape counts.
    """
    found = (
        normalization_of(module, name)
        or foreign.parametrization_of(module, name)
        or foreign.hook_of(module, name)
        or pending_of(module, name)
    )
    return found is not None
