"""The module that `compile` returns; imported when something is compiled, because torch's compiler takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parameter import is_lazy

from spectralnorm.parametrizations import SpectralNorm, can_be_handed_over, handed_over
from spectralnorm.parametrizations.stacked import originals_of
from spectralnorm.parametrizations.threads import lock_of
from spectralnorm.transform.upkeep import normalized_weights

__all__ = ["CompiledModule"]


class CompiledModule(OptimizedModule):
    """Torch's own module of compiled code, before each call of which the normalized weights are read."""

    # Of the class, so that it is set here and not on the model, to which torch passes on what it does not know.
    _weights: list[tuple[Any, str, SpectralNorm]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a larger graph has this one in it
            model: Any = self._modules["_orig_mod"]
            return model(*args, **kwargs)
        if self._weights is None:
            if self._learns():
                return self._orig_mod(*args, **kwargs)
            self._weights = [found[1:] for found in normalized_weights(self._orig_mod)]
        with lock_of(self._orig_mod), self._handing_over(self._weights):
            return super().__call__(*args, **kwargs)

    def _learns(self) -> bool:
        """Whether a first call still has to tell shapes of weights, or sizes of images that norms are meant for."""
        return any(is_lazy(each) for each in self._orig_mod.parameters()) or any(
            normalization.waits_for_size for *_, normalization in normalized_weights(self._orig_mod)
        )

    @contextmanager
    def _handing_over(self, weights: list[tuple[Any, str, SpectralNorm]]) -> Iterator[None]:
        """The weights are where compiled code finds them, and nothing of a graph is held between calls."""
        present = [(layer, name, each) for layer, name, each in weights if can_be_handed_over(layer, name)]
        try:
            for layer, name, each in present:
                handed = handed_over(partial(getattr, layer, name), each, originals_of(layer.parametrizations[name])[0])
                layer.__dict__.setdefault("_handed_over", {})[name] = handed
            yield
        finally:
            for layer, *_ in present:
                layer.__dict__.pop("_handed_over", None)
