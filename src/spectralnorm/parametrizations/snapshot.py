"""What a model is, apart from the numbers in its tensors, put back as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from spectralnorm.parametrizations import fsdp

__all__ = ["Snapshot", "unchanged_on_failure"]

_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """The class and the attributes of each module of a model, with the contents of its dictionaries, lists and sets.

    Hooks, parametrizations and modes are among them, and where FSDP2 puts its parameters. Tensors are held, not copied.

    Args:
        model: any module; a single layer too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [_State(module) for module in model.modules()]
        self._places = fsdp.all_places()

    def restore(self) -> None:
        """Put everything back; modules that have come to the model since are no longer in it."""
        for state in self._before:
            state.restore()
        fsdp.put_back(self._places)


class _State:
    """Of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind, self._mode = module, type(module), module.training
        self._attributes = dict(vars(module))
        held = [value for value in self._attributes.values() if type(value) in _CONTAINERS]
        self._contents = [(container, container.copy()) for container in held]

    def restore(self) -> None:
        object.__setattr__(self._module, "__class__", self._kind)
        for container, contents in [(vars(self._module), self._attributes), *self._contents]:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)
        if self._module.training != self._mode:  # torch.jit keeps it elsewhere
            self._module.training = self._mode


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """What is done to ``model`` within is done wholly or not at all; numbers in tensors are not put back."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
