"""`compile`: code for a model whose weights go on being normalized together, outside of the code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spectralnorm.parametrizations.options import require_module

__all__ = ["compile"]


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """`torch.compile` for a model with normalized weights, which the compiled code gets instead of computing them.

    Inside of a graph of `torch.compile` nothing can be kept: each use of each layer is a power iteration of its own in
    training. Here the weights are read before each call, as a model that is not compiled reads them: all are renewed
    together once per change, D(real) and D(fake) see the same ones, and every option is possible, also
    ``norm="operator"`` and ``strict=True``. To the graph they are inputs. Outputs and gradients are those of the model
    as it is, but for two things. With ``update="forward"`` each weight advances once per call in training mode, however
    often the call uses it; those of recurrent layers, which torch does not compile, at each use. And where autocast
    begins within the model, or changes its type there, a strict weight is divided by a little more.

    Args:
        model: with its normalized weights. Of those that it gets after the first call, and of those that FSDP2 or
            tensor parallelism shard, the normalization is compiled as by `torch.compile`. A first call that gives lazy
            weights their shapes, or ``norm="operator"`` the size of its images, is not compiled.
        options: those of `torch.compile`: ``fullgraph``, ``dynamic``, ``backend``, ``mode``, ``options``.

    Returns:
        What `torch.compile` returns: a module that shares everything with ``model``, which stays as it is.

    Raises:
        UserError: ``model`` is not a module.

    >>> from spectralnorm import add_spectral_norm
    >>> model = add_spectral_norm(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> compiled = compile(model, fullgraph=True, backend="eager")  # leave the backend out for real
    >>> inputs = torch.randn(5, 4)
    >>> torch.equal(compiled(inputs), model(inputs))
    True
    """
    require_module("compile", model)
    model = getattr(model, "_orig_mod", model)  # of what has been compiled already
    compiled: Any = torch.compile(model, **options)
    if compiled is not model:  # as it is with ``disable=True``
        from spectralnorm.transform.compiled_module import CompiledModule

        compiled.__class__ = CompiledModule
    return compiled
