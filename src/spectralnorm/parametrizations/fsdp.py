"""FSDP2's view of a parameter, as far as a normalization must know it.

`fully_shard` replaces a parameter by a DTensor, of which this process holds a part. For a forward or backward it puts
another parameter in its place, whole, whose memory is freed afterwards; only the DTensor is known to optimizers. Torch
offers no way from the one to the other, so its own books are read here: `FSDPParam` knows both, and the module and the
name it puts them at. Nothing is imported: who has not called `fully_shard` does not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from spectralnorm.errors import UserError

__all__ = [
    "all_places",
    "class_before_parametrizations",
    "inner_class",
    "is_anything_sharded",
    "is_between_uses",
    "is_wrapped",
    "move",
    "put_back",
    "require_sharded",
    "sharded_of",
    "wrapped_as",
]

_BOOKS = "torch.distributed._composable_state"
_FULLY_SHARD = "torch.distributed.fsdp"

# For each whole parameter weak references to its FSDPParam and that one's group; for an ordinary parameter None. The
# books are read once for each.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sharded_of(weight: Tensor) -> Tensor | None:
    """The DTensor that stands in for ``weight`` between uses, and which optimizers change; None if there is none."""
    found = _managed(weight)
    return None if found is None else found[0].sharded_param


def is_anything_sharded() -> bool:
    """Whether FSDP2 manages anything in this process."""
    books = sys.modules.get(_BOOKS)
    return books is not None and bool(books._module_state_mapping)


# Older torch cannot compile what is asked of a weak dictionary. A layer that is sharded afterwards is compiled anew,
# because it has another class.
is_anything_sharded._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_between_uses(weight: Tensor) -> bool:
    """Whether ``weight`` is a parameter that FSDP2 has left whole, and no forward or backward is going on."""
    found = _managed(weight)
    return found is not None and found[1]._training_state.name == "IDLE"


def _managed(weight: Tensor) -> tuple[Any, Any] | None:
    """The FSDPParam whose whole parameter ``weight`` is, and its group."""
    if not is_anything_sharded():
        return None
    found = _known.get(weight, _known)
    if found is _known:
        pairs = ((each, group) for group in _groups() for each in group.fsdp_params)
        pair = next((pair for pair in pairs if getattr(pair[0], "_unsharded_param", None) is weight), None)
        found = _known[weight] = None if pair is None else tuple(map(ref, pair))
    if found is None:
        return None
    parameter, group = (reference() for reference in found)
    return None if parameter is None or group is None else (parameter, group)


def require_sharded(module: nn.Module, name: str) -> None:
    """Refuse to change how a parameter is held that FSDP2 has put in its DTensor's place for the moment.

    Raises:
        UserError: it has.
    """
    for parameter in _parameters():
        if (module, name) in _places(parameter) and parameter.sharded_state.name != "SHARDED":
            raise UserError(
                f"{type(module).__name__}.{name} is whole at the moment, as FSDP2 leaves it after some forwards, but "
                "its normalization can be added or removed only while it is sharded; call reshard() first, on every "
                "module that fully_shard was called for."
            )


def move(source: tuple[nn.Module, str], target: tuple[nn.Module, str]) -> None:
    """Tell FSDP2 that a parameter has moved.

    Args:
        source: the module and the name it was at.
        target: those it is at now.
    """
    for parameter in _parameters():
        info = parameter._module_info
        if (info.module, info.param_name) == source:
            info.module, info.param_name = target
        for index, place in enumerate(_places(parameter)[1:]):
            if place == source:
                info.shared_modules[index], info.shared_param_names[index] = target


def all_places() -> list[tuple[Any, list[tuple[nn.Module, str]]]]:
    """Where FSDP2 puts each of its parameters, for `put_back`."""
    return [(parameter, _places(parameter)) for parameter in _parameters()]


def put_back(places: Sequence[tuple[Any, Sequence[tuple[nn.Module, str]]]]) -> None:
    """Undo every `move` since `all_places`."""
    for parameter, ((module, name), *others) in places:
        info = parameter._module_info
        info.module, info.param_name = module, name
        info.shared_modules[:] = [each for each, _ in others]
        info.shared_param_names[:] = [each for _, each in others]


def is_wrapped(kind: type) -> bool:
    """Whether a class is one that `fully_shard` makes, or a subclass: ``FSDPLinear`` of ``Linear``."""
    wrapper = getattr(sys.modules.get(_FULLY_SHARD), "FSDPModule", None)
    return wrapper is not None and issubclass(kind, wrapper)


def inner_class(kind: type) -> type | None:
    """The class for which `fully_shard` made ``kind``; None if it did not make it."""
    return kind.__bases__[1] if is_wrapped(kind) and kind.__bases__[0].__name__ == "FSDPModule" else None


def class_before_parametrizations(module: nn.Module) -> type[nn.Module]:
    """As torch's `type_before_parametrizations`, also for a parametrized layer that was sharded since."""
    inner = inner_class(type(module))
    return parametrize.type_before_parametrizations(module) if inner is None else inner.__bases__[0]


def wrapped_as(kind: type, inner: type) -> type:
    """The class that `fully_shard` makes for ``inner``, as it made ``kind`` for another."""
    name, parts = f"FSDP{inner.__name__}", {"__deepcopy__": kind.__dict__["__deepcopy__"]}
    return type(name, (kind.__bases__[0], inner), parts)


def _places(parameter: Any) -> list[tuple[nn.Module, str]]:
    """Every module and name at which FSDP2 puts a parameter."""
    info = parameter._module_info
    return [
        (info.module, info.param_name),
        *zip(info.shared_modules, info.shared_param_names, strict=True),
    ]


def _parameters() -> Iterator[Any]:
    """Every FSDPParam of this process."""
    return (parameter for group in _groups() for parameter in group.fsdp_params)


def _groups() -> Iterator[Any]:
    """Every group of parameters that FSDP2 gathers together."""
    books = sys.modules.get(_BOOKS)
    mapping = {} if books is None else books._module_state_mapping
    seen: set[int] = set()
    for state in list(mapping.values()):
        state = state() if isinstance(state, ref) else state
        if state is None or id(state) in seen:  # a call for several modules makes one state
            continue
        seen.add(id(state))
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # older versions of torch have one at most
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if group is not None)
