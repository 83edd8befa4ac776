"""What tensor parallelism does to a layer, made possible for a layer with a normalized weight.

`distribute_module` replaces the parameters of a layer by DTensors. It expects them in the layer itself, under the names
that an ordinary layer has, and looks into the modules inside of the layer as if they were such layers, too. So while it
is at work, the layer is an ordinary one with the raw weights. It asks for ``_distribute_module_applied`` first and sets
it last.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["distribute_module_applied"]

_MARK = "_distribute_module_applied"
_NORMALIZED = "_normalized_after_distribution"


def _begin(self: nn.Module) -> bool:
    applied = self.__dict__.get(_MARK, False)
    caller = sys._getframe(1).f_code.co_name
    if not applied and caller == "distribute_module":
        lists: Any = self._modules["parametrizations"]
        for parts in lists.values():
            for part in parts:
                if hasattr(part, "settle"):
                    part.settle()  # what is written afterwards is distributed
        del self._modules["parametrizations"]
        self.__dict__[_NORMALIZED] = type(self), lists
        for name, parts in lists.items():
            self._parameters[name] = parts.original
        base: Any = type(self).__bases__[0]
        self.__class__ = type(base)(base.__name__, (base,), {_MARK: property(lambda self: False, _end)})
    return applied


def _end(self: nn.Module, applied: bool) -> None:
    self.__class__, lists = self.__dict__.pop(_NORMALIZED)
    for name, parts in lists.items():
        parts.register_parameter("original", self._parameters.pop(name))
        for part in parts:
            if hasattr(part, "forget"):
                part.forget()  # it holds the whole weight
    self._modules["parametrizations"] = lists
    self.__dict__[_MARK] = applied


def _mark(self: nn.Module, applied: bool) -> None:
    self.__dict__[_MARK] = applied


# For the class of layers with normalized weights.
distribute_module_applied = property(_begin, _mark)
