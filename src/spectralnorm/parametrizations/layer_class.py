"""The class of layers with a normalized weight: one for all layers of a kind.

Torch gives every parametrized module a class of its own, with a property for each parametrized tensor. That costs:
copies share their original's class, so that taking the parametrization off a copy takes the property away from the
original; `torch.compile` compiles equal blocks once per class; `torch.func.stack_module_state` refuses to stack them;
and they cannot be pickled. So our layers' class is shared by all layers of the same base class, and its properties
look at the layer they are read from.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import fsdp, norm_alone, recurrent, tensor_parallel
from spectralnorm.parametrizations.applied import apply_of
from spectralnorm.parametrizations.cached import one_while_cached, one_while_kept
from spectralnorm.parametrizations.image_size import forget_input_size
from spectralnorm.parametrizations.occasions import Occasions
from spectralnorm.parametrizations.shards import is_distributed
from spectralnorm.parametrizations.spectral_norm import SpectralNorm
from spectralnorm.parametrizations.stacked import parameter_of
from spectralnorm.parametrizations.state_dict import forget_other_formats

__all__ = ["can_be_handed_over", "plain_class", "share_class"]

_shared: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def share_class(module: nn.Module) -> None:
    """Move a parametrized module from the class that torch made for it to the one for all of its kind."""
    names: list[str] = list(module.parametrizations)  # type: ignore[arg-type]
    shared = fsdp.inner_class(type(module))
    if shared is not None:  # normalized before it was sharded, and once more since
        return _add_properties(shared, names)
    _adopt(module, parametrize.type_before_parametrizations(module), names)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote, without what parametrizations and `fully_shard` put before it."""
    kind = type(module)
    if parametrize.is_parametrized(module) and not isinstance(kind, _SharedClass):
        kind = parametrize.type_before_parametrizations(module)
    return next(each for each in kind.__mro__ if not isinstance(each, _SharedClass) and not fsdp.is_wrapped(each))


def can_be_handed_over(module: nn.Module, name: str) -> bool:
    """Whether what is computed of a layer's weight can be an input of compiled code, because all of it is here."""
    if isinstance(module, nn.RNNBase) and recurrent.is_left_by_compiler():  # which reads it as it does uncompiled
        return False
    parts = module._modules.get("parametrizations")
    if not isinstance(type(module), _SharedClass) or parts is None or name not in parts._modules:
        return False
    original = getattr(parts._modules[name], "original", None)
    return isinstance(original, Tensor) and not is_distributed(original) and fsdp.sharded_of(original) is None


class _SharedClass(ABCMeta):
    """What torch does to the class of one module must not happen to the others.

    It is a metaclass of abstract classes, so that tools can derive from a layer's class and an abstract one together.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        # Torch's own property, when something else of such a layer is parametrized: it is bound to one module.
        if isinstance(value, property):
            is_table = issubclass(cls, (nn.Embedding, nn.EmbeddingBag))
            value = _tensor_property(name, _reader_of_table if is_table else _reader)
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        # When one layer's parametrization is removed. The property stays for the others, and steps aside for this one.
        if not isinstance(cls.__dict__.get(name), property):
            super().__delattr__(name)


def _adopt(module: nn.Module, base: type[nn.Module], names: list[str]) -> None:
    shared = _shared.get(base)
    if shared is None:
        # Under a metaclass of its own, the base's stays in force.
        metaclass: Any = _SharedClass if type(base) is type else type("_SharedClass", (_SharedClass, type(base)), {})
        methods: dict[str, Any] = {
            # Where its base stands: torch.fx keeps layers of torch.nn whole by this, and tools look for them there.
            "__module__": base.__module__,
            "__delattr__": _delattr_of(base),
            "__prepare_scriptable__": _baked,
            "__reduce_ex__": _reduce,
            "__setstate__": _set_state_of(base),
            "_replicate_for_data_parallel": _replicate_of(base),
            "apply": apply_of(base),
            "named_modules": _settled(base.named_modules),
            "register_parameter": _register_parameter_of(base),
            "state_dict": _settled(base.state_dict),
            "_distribute_module_applied": tensor_parallel.distribute_module_applied,
            "_handed_over": None,  # to compiled code: a `HandedOver` by name, for the time of a call
        }
        is_recurrent = issubclass(base, nn.RNNBase)
        if not hasattr(base, "__deepcopy__"):  # else copying would go through __reduce_ex__
            methods["__deepcopy__"] = recurrent.alone(_deepcopy) if is_recurrent else _deepcopy
        if is_recurrent:
            methods |= recurrent.METHODS
        shared = _shared[base] = metaclass(f"Parametrized{base.__name__}", (base,), methods)
    _add_properties(shared, names)
    module.__class__ = shared
    if isinstance(module, nn.RNNBase) and hasattr(module, "_flat_weights_names"):  # not while it is being restored
        recurrent.forget_flat_weights(module)


def _add_properties(shared: type[nn.Module], names: list[str]) -> None:
    for name in names:
        if not isinstance(shared.__dict__.get(name), property):
            setattr(shared, name, property())


def _tensor_property(name: str, reader: Callable[[str], Callable[[Any], Any]]) -> property:
    """Reading, assigning and deleting ``layer.<name>``; an ordinary attribute of layers that do not parametrize it."""
    get = reader(name)

    def set_raw(self: Any, value: Any) -> None:
        if name in self.parametrizations:
            _require_like(self, name, value)
            # A copy: torch would make the parameter share its memory with the tensor that was assigned.
            self.parametrizations[name].right_inverse(value.detach().clone())
        else:
            self.__dict__[name] = value

    def delete(self: Any) -> None:
        if self.__dict__.pop(name, self) is self:
            is_normalized = name in self._modules.get("parametrizations", ())
            hint = f"{name!r} of this {plain_class(self).__name__} is normalized; remove_spectral_norm first."
            raise AttributeError(hint if is_normalized else name)

    return property(get, set_raw, delete)


def _require_like(layer: Any, name: str, value: Any) -> None:
    """Refuse to assign ``value`` if it is no tensor of the weight's shape."""
    original = getattr(layer.parametrizations[name], "original", None)
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or (original is not None and value.shape != original.shape):
        wanted = "a tensor" if original is None else f"a tensor of shape {tuple(original.shape)}"
        got = f"one of shape {tuple(value.shape)}" if is_tensor else type(value).__name__
        raise UserError(
            f"{name!r} of this {plain_class(layer).__name__} is normalized and takes {wanted}, got {got}; "
            "remove_spectral_norm first to make it something else."
        )


def _settle(layer: Any) -> list[Tensor]:
    """Let what was written into the layer's normalized weights reach the parameters, which are returned."""
    Occasions.num += 1  # who asks for parameters may write into them
    changed = []
    lists = layer._modules.get("parametrizations")
    for parts in () if lists is None else lists._modules.values():
        for part in parts._modules.values():
            weight = part.settle() if type(part) is SpectralNorm else None
            if weight is not None:
                changed.append(weight)
    return changed


def _settled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method through which others come to the parameters, where they should find what was written into the values.

    All parameters of a model are found through the ``named_modules`` of its layers.
    """

    @wraps(method)
    def settled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_compiling():
            _settle(self)
        return method(self, *args, **kwargs)

    return settled


def _register_parameter_of(base: type[nn.Module]) -> Callable[..., None]:
    """The method that assigning a parameter calls; torch's says that the attribute exists already."""

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        if name in self.parametrizations:
            raise UserError(
                f"{name!r} of this {plain_class(self).__name__} is normalized and cannot be another parameter; assign "
                "a tensor (value.detach()) to give it new numbers, share weights before they are normalized, or "
                "remove_spectral_norm first, as before layers are fused."
            )
        base.register_parameter(self, name, param)

    return register_parameter


def _delattr_of(base: type[nn.Module]) -> Callable[..., None]:
    """The method that torch calls when it has taken the last parametrization off, whoever asked it to."""

    def delete(self: Any, name: str) -> None:
        base.__delattr__(self, name)
        if name == "parametrizations":
            forget_input_size(self)
            forget_other_formats(self)

    return delete


_module_call = nn.Module.__call__
# Not `is_compiling`, which asks for more: where an export does without Dynamo, the weight is another than the one
# of which a value is kept.
_is_compiling = torch.compiler.is_dynamo_compiling


def _reader(name: str) -> Callable[[Any], Any]:
    """What reads the tensor ``name``.

    We keep values ourselves, so torch's cache of them is left out (`spectralnorm.parametrizations.cached` takes its
    place); and so are the two calls of modules, where nobody listens to them. It is one function because every use of
    the layer comes here.
    """

    def read(self: Any) -> Any:
        parts = self._modules["parametrizations"]._modules.get(name)
        if parts is None:
            return _ordinary(self, name)
        if _is_compiling():
            handed = self._handed_over
            return parts() if handed is None or name not in handed else handed[name].for_use()
        of_parts = parts.__dict__  # asked for once: each attribute of a module is looked for in its classes first
        modules = of_parts["_modules"]
        weight = of_parts["_parameters"].get("original")
        only = modules["0"]
        of_only = only.__dict__
        if (
            weight is None
            or type(only) is not SpectralNorm
            or len(modules) > 1
            or nn.Module.__call__ is not _module_call  # torch.fx replaces it to see what is called
            or of_only["_forward_hooks"]
            or of_only["_forward_pre_hooks"]
            or of_parts["_forward_hooks"]
            or of_parts["_forward_pre_hooks"]
            or "forward" in of_parts  # tools that bring parameters from elsewhere replace it
            or "forward" in of_only
        ):
            return one_while_cached(self, name, parts) if parametrize._cache_enabled else parts()
        return one_while_kept(self, name, only, weight) if parametrize._cache_enabled else only.read(weight)

    return read


def _ordinary(self: Any, name: str) -> Any:
    """The tensor ``name`` of a layer in which it is an ordinary parameter."""
    # What else it may be nn.Module.__getattr__ finds; torch.compile can follow this line, but not that way.
    if name in self._parameters:
        return self._parameters[name]
    if name in self.__dict__:  # DataParallel's replicas hold their parameters so
        return self.__dict__[name]
    raise AttributeError(name)


def _reader_of_table(name: str) -> Callable[[Any], Any]:
    """As `_reader`; a copy where the layer scales rows to ``max_norm``, which it does by writing into what it reads."""
    read = _reader(name)

    def read_table(self: Any) -> Any:
        weight = read(self)
        return weight if self.max_norm is None or weight is None else weight.clone()

    return read_table


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for weight in _settle(self):
        copied = memo.get(id(weight))
        if copied is not None:  # already, because a layer before this one shares it
            with torch.no_grad():
                copied.copy_(weight)
    replica = self.__class__.__new__(self.__class__)
    memo[id(self)] = replica
    # Of what inference mode makes no value can be kept.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        deepcopy(self._modules.get("parametrizations"), memo)  # before the hooks, which lead to one without its weight
        replica.__dict__.update(deepcopy(self.__dict__, memo))
    # Code that `Module.compile` made is bound to the layer that it was made for, and torch gives copies none.
    replica.__dict__.pop("_compiled_call_impl", None)
    return replica


def _replicate_of(base: type[nn.Module]) -> Callable[..., nn.Module]:
    """The method that makes a copy for one forward in DataParallel."""

    def replicate(self: Any) -> nn.Module:
        # What the copies need is brought up to date here, once for all of them.
        for parts in self.parametrizations.values():
            weight = parameter_of(parts, parts[0])
            if isinstance(parts[0], SpectralNorm) and weight is not None:
                norm_alone.refresh_for_replicas(parts[0], weight)
        return base._replicate_for_data_parallel(self)

    return replicate


def _baked(self: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` takes instead of the layer: a plain one that computes the same."""
    warnings.warn(
        "torch.jit.script compiles normalized layers as plain ones with the weights of now, and leaves those in the "
        "model that it was given. To train on, script remove_spectral_norm(copy.deepcopy(model)).",
        stacklevel=2,
    )
    plain = deepcopy(self)
    for name in list(plain.parametrizations):  # type: ignore[arg-type]
        parametrize.remove_parametrizations(plain, name)
    recurrent.restore_flat_weights(plain)
    return plain


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickled as the base class and the state; the shared class is made again where it is loaded."""
    _settle(self)
    state = dict(self.__getstate__())  # type: ignore[call-overload]
    return _restored, (parametrize.type_before_parametrizations(self),), state


def _restored(base: type[nn.Module]) -> nn.Module:
    module = base.__new__(base)
    _adopt(module, base, [])
    return module


def _set_state_of(base: type[nn.Module]) -> Callable[..., None]:
    """The method ``__setstate__``; the state tells which tensors are parametrized."""

    def set_state(self: Any, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        share_class(self)

    return set_state
