"""One run of a model on tensors that have a shape and no values: which operations `forward` performs on its input.

Every torch function that is called on such a tensor, by a module, a function or an operator, arrives at one place
(``__torch_function__``) and becomes a `Node`. Everything else is computed as always, so that whatever does not depend
on the input is a constant, parametrized weights included. What escapes the record has no values, and cannot pass for
one.
"""

from __future__ import annotations

import copy
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.graph import (
    FILLED,
    METADATA,
    TEMPLATED,
    Graph,
    Node,
    canonical,
    leaves,
    map_structure,
    with_maxima,
)
from spectralnorm.lipschitz.random_numbers import without_random_numbers
from spectralnorm.lipschitz.registry import hooks_of
from spectralnorm.lipschitz.values import Digests, digest_of

__all__ = ["Record", "record", "refuse_changed"]

# What may stand beside the tensors that a model returns: none of it can be made of values.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# Operations whose result is a view of their input or a copy of it, as the input's type and layout in memory decide.
_MAYBE_VIEWS = frozenset(
    "reshape reshape_as flatten ravel contiguous to type type_as float double half bfloat16 cpu cuda".split()
)
# What else an operation may be given: what is not here may hold a tensor that nobody sees, or change unseen.
_OPTIONS = (EllipsisType, torch.layout, torch.memory_format, Enum, type)


class Constant(NamedTuple):
    """A tensor that an operation read, as it was then.

    Attributes:
        node: of the operation.
        tensor: which is kept.
        version: the number of changes in place it had seen; None: they are not counted.
        digest: of its values, because what is changed through ``.data`` is not counted.
    """

    node: Node
    tensor: Tensor
    version: int | None
    digest: bytes | None


class Record(NamedTuple):
    """What one run has shown.

    Attributes:
        graph: of the operations.
        labels: of the samples.
        ambiguous: where another dimension than the first looks like the batch.
        constants: that were read; none of a model that is known.
    """

    graph: Graph
    labels: Tensor
    ambiguous: str | None
    constants: list[Constant]


class _Traced(torch.Tensor):
    """A tensor that depends on the input: on the meta device, so that it has no values to be lost."""

    node: Node | None
    tracer: _Tracer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found: list[_Traced] = []
        map_structure((args, kwargs or {}), _Traced, found.append)
        tracers = [getattr(each, "tracer", None) for each in found]
        if not tracers or tracers[0] is None:
            raise UserError(
                f"certify lost track of the input before {canonical(func)[0]}: something rebuilt the tensor outside "
                "of torch's functions; register a rule for the module that does it."
            )
        return tracers[0].call(func, args, kwargs or {})


class _Tracer:
    """Of one run.

    Attributes:
        nodes: all operations so far.
        constants: that they read; none of a model that is known.
        ambiguous: where another dimension than the first looks like the batch.
    """

    def __init__(
        self, *, batch_size: int, device: torch.device, is_whole: Callable[[nn.Module], bool], is_known: bool
    ) -> None:
        self.batch_size = batch_size
        self.device = device
        self.is_whole = is_whole
        self.nodes: list[Node] = []
        self.active = True
        self.constants: list[Constant] = []
        self.ambiguous: str | None = None
        self._stack: list[tuple[str, bool]] = []
        self._by_storage: dict[int, weakref.WeakSet[_Traced]] = {}
        # Of copies and of what they are copies of: kept, so that no other has the place of one of these.
        self._copied: list[torch.UntypedStorage] = []
        self._names: dict[str, int] = {}
        self._num_modes = torch._C._len_torch_dispatch_stack()
        self._stand_ins: dict[int, Any] = {}
        self._digests = None if is_known else Digests()

    def wrap(self, meta: Tensor, node: Node) -> _Traced:
        traced = torch.Tensor._make_subclass(_Traced, meta)
        traced.node, traced.tracer = node, self
        self._siblings(meta).add(traced)
        if self.ambiguous is None and any(size % self.batch_size == 0 and size > 0 for size in meta.shape[1:]):
            self.ambiguous = f"{node.op} at {node.name!r}"
        return traced

    def _siblings(self, meta: Tensor) -> weakref.WeakSet[_Traced]:
        with torch._C.DisableTorchFunctionSubclass():
            return self._by_storage.setdefault(meta.untyped_storage()._cdata, weakref.WeakSet())

    def _count_as_view(self, meta: Tensor, source: _Traced) -> None:
        """Of an input with another layout it is one."""
        with torch._C.DisableTorchFunctionSubclass():
            storages = meta.untyped_storage(), source.untyped_storage()
            self._by_storage[storages[0]._cdata] = self._siblings(source)
        self._copied += storages

    def node_of(self, traced: _Traced) -> Node:
        if traced.node is None:
            raise UserError(
                f"certify cannot follow {self._place()}: it uses a view of a tensor that was changed in place since; "
                "use the operation that is not in place."
            )
        return traced.node

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One torch function with at least one traced argument."""
        name, in_place = canonical(func)
        args, kwargs = _with_numbers((args, kwargs))
        if torch._C._len_torch_dispatch_stack() != self._num_modes:
            raise UserError(
                f"certify cannot follow {self._place()}: it runs {name} under a TorchDispatchMode, which may change "
                "what that does; leave the mode out."
            )
        if name == "requires_grad" and in_place:
            return args[0]
        if name in METADATA:
            if name in ("device", "is_cuda", "is_cpu", "is_meta"):
                return {
                    "device": self.device,
                    "is_cuda": self.device.type == "cuda",
                    "is_cpu": self.device.type == "cpu",
                }.get(name, False)
            return _on_meta(func, args, kwargs)
        if name in FILLED:
            meta = _on_meta(func, args, kwargs | {"device": "meta"})
            return torch.full(meta.shape, FILLED[name], dtype=meta.dtype, device=self.device)
        if name in ("full_like", "new_full"):
            meta = _on_meta(func, args, kwargs | {"device": "meta"})
            value = kwargs["fill_value"] if "fill_value" in kwargs else args[-1]
            return torch.full(meta.shape, value, dtype=meta.dtype, device=self.device)
        if name in TEMPLATED:
            # What a tensor is made like counts by its shape and type alone; and a constant stays one.
            others, kwargs = map_structure((args[1:], kwargs), _Traced, self._template)
            args = (args[0], *others)
            if not isinstance(args[0], _Traced):
                return func(*args, **kwargs)
        if kwargs.get("out") is not None:
            raise UserError(f"certify cannot follow {self._place()}: {name} writes with out=; use its result instead.")
        target = None
        if kwargs.get("inplace"):
            target, kwargs = args[0], kwargs | {"inplace": False}
        elif in_place:
            target, func = args[0], self._out_of_place(name, func)
        if target is not None and not isinstance(target, _Traced):
            raise UserError(
                f"certify cannot follow {self._place()}: {name} in place writes what depends on the input into a "
                "tensor that does not; use the operation that is not in place."
            )
        result = self._record(name, func, args, kwargs)
        if target is None:
            return result
        return self._replace(target, result)

    def _template(self, traced: _Traced) -> Tensor:
        """A constant of the same shape and type, that takes no memory."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.zeros((), dtype=traced.dtype, device=self.device).expand(traced.shape)

    def _out_of_place(self, name: str, func: Callable[..., Any]) -> Callable[..., Any]:
        plain = getattr(torch.Tensor, name, None) or getattr(nn.functional, name, None) or getattr(torch, name, None)
        if plain is None:
            raise UserError(f"certify cannot follow {self._place()}: it knows {name}_ only in place.")
        return plain

    def _replace(self, target: _Traced, result: _Traced) -> _Traced:
        """``target`` becomes the result of an operation on it; the other views of its memory become unusable."""
        for other in self._siblings(target):
            if other is not target:
                other.node = None
        if tuple(result.shape) != tuple(target.shape):
            raise UserError(f"certify cannot follow {self._place()}: an operation in place changed a shape.")
        target.node = result.node
        return target

    def _record(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            outcome = _on_meta(func, args, kwargs)
        except RuntimeError as error:  # also NotImplementedError
            if not isinstance(error, NotImplementedError) and "meta" not in str(error):
                raise
            raise UserError(
                f"certify cannot follow {self._place()}: {name} needs the values of its input, and what is certified "
                "holds for every input; compute it without looking at values, or register a rule for the module."
            ) from error
        return self._remember(name, func, args, kwargs, outcome)

    def _remember(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outcome: Any,
        module: nn.Module | None = None,
    ) -> Any:
        if name in _MAYBE_VIEWS and isinstance(outcome, Tensor):
            self._count_as_view(outcome, next(each for each in leaves((args, kwargs)) if isinstance(each, _Traced)))
        args, kwargs = map_structure((args, kwargs), _Traced, self.node_of)
        if isinstance(outcome, Tensor):
            return self.wrap(outcome, self._new(name, func, args, kwargs, tuple(outcome.shape), outcome, module))
        if not (isinstance(outcome, tuple | list) and outcome and all(isinstance(each, Tensor) for each in outcome)):
            raise UserError(
                f"certify cannot follow {self._place()}: {name} gives no tensor ({type(outcome).__name__}) from what "
                "depends on the input."
            )
        node = self._new(name, func, args, kwargs, tuple(tuple(each.shape) for each in outcome), outcome[0], module)
        items = [
            self.wrap(
                each,
                Node(node.name, "item", _item, (node, index), {}, tuple(each.shape), None, each.is_floating_point()),
            )
            for index, each in enumerate(outcome)
        ]
        self.nodes += [self.node_of(item) for item in items]
        return (
            type(outcome)(items)
            if isinstance(outcome, tuple | list) and not hasattr(outcome, "_fields")
            else _rebuilt(outcome, items)
        )

    def _new(
        self, name: str, func: Any, args: Any, kwargs: Any, shape: Any, sample: Tensor, module: nn.Module | None
    ) -> Node:
        node = Node(self._unused_name(name), name, func, args, kwargs, shape, module, sample.is_floating_point())
        for each in leaves((args, kwargs)):
            if not isinstance(each, (Tensor, Node, *_CONSTANTS, *_OPTIONS)):
                raise UserError(
                    f"certify cannot look into the {type(each).__name__} that {name} at {node.name!r} is given; give "
                    "it numbers and tensors, also in tuples, lists, dictionaries or dataclasses."
                )
        self.nodes.append(node)
        for read in leaves((args, kwargs)):
            if isinstance(read, Tensor):
                if not _is_plain(read):
                    raise UserError(
                        f"certify cannot look into the {type(read).__name__} that {name} at {node.name!r} reads: its "
                        "class changes what torch's functions do; convert it to a torch.Tensor."
                    )
                if self._digests is not None:
                    self.constants.append(Constant(node, read, _version(read), self._digests.of(read)))
        return node

    def _unused_name(self, op: str) -> str:
        name, is_leaf = self._stack[-1] if self._stack else ("", False)
        if not is_leaf:
            name = f"{name}.{op}" if name else op
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name} ({count})"

    def _place(self) -> str:
        return f"layer {self._stack[-1][0]!r}" if self._stack and self._stack[-1][0] else "the model"

    def run_module(self, name: str, module: nn.Module, forward: Callable[..., Any], *, is_whole: bool) -> Any:
        """What stands in for the ``forward`` of a module while the model is recorded."""
        is_leaf = name != "" and (is_whole or all(child == "parametrizations" for child, _ in module.named_children()))

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return forward(*args, **kwargs)
            found: list[_Traced] = []
            map_structure((args, kwargs), _Traced, found.append)
            self._stack.append((name, is_leaf))
            try:
                if not is_whole or not found:
                    return forward(*args, **kwargs)
                args, kwargs = _with_numbers((args, kwargs))
                kept = self._kept(module)
                try:
                    outcome = _on_meta(copy.deepcopy(kept).to("meta"), args, kwargs)
                except Exception:
                    # It computes something of its weights that needs their values; of its input it gets zeros.
                    outcome = _on_zeros(copy.deepcopy(kept), args, kwargs, self.device)
                return self._remember(type(module).__name__, kept, args, kwargs, outcome, kept)
            finally:
                self._stack.pop()

        self._stand_ins[id(recorded)] = recorded
        return recorded

    def is_stand_in(self, forward: Any) -> bool:
        """Whether a module's own ``forward`` is what `run_module` gave."""
        return id(forward) in self._stand_ins

    def _kept(self, module: nn.Module) -> nn.Module:
        """A copy of a layer as it is now, without its own hooks: they are recorded beside it."""
        for each in module.modules():
            if any(isinstance(leaf, _Traced) for leaf in leaves(vars(each))):
                raise UserError(
                    f"certify cannot follow {self._place()}: it keeps a tensor that depends on the input and that it "
                    "is not given; give it as an argument."
                )
        kept = copy.deepcopy(module)
        for each in kept.modules():
            if self.is_stand_in(vars(each).get("forward")):
                vars(each).pop("forward")
        for key in hooks_of(kept):
            kept._forward_pre_hooks.pop(key, None)
            kept._forward_hooks.pop(key, None)
        return kept


def _with_numbers(structure: Any) -> Any:
    """With Python's numbers in place of numpy's and of tensors in slices: rules and records read no others."""
    numpy = sys.modules.get("numpy")  # not imported: it may not be there

    def number(given: Any) -> Any:
        if not isinstance(given, slice):
            return given.item()
        return slice(
            *(None if part is None else operator.index(part) for part in (given.start, given.stop, given.step))
        )

    return map_structure(structure, (slice, numpy.generic) if numpy else slice, number)


def _is_plain(tensor: Tensor) -> bool:
    """Whether torch's functions do with it what they do with every tensor."""
    plain = (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    function = type(tensor).__torch_function__
    dispatch = [getattr(kind, "__torch_dispatch__") for kind in (type(tensor), torch.Tensor)]  # noqa: B009  not typed
    return getattr(function, "__func__", function) in plain and dispatch[0] is dispatch[1]


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; it is not counted of one from inference mode."""
    return None if tensor.is_inference() else tensor._version


def _rebuilt(outcome: Any, items: list[Any]) -> Any:
    try:
        return type(outcome)(items)  # torch's named tuples take a sequence
    except TypeError:
        return type(outcome)(*items)


def _item(structure: Sequence[Any], index: int) -> Any:
    return structure[index]


@torch.no_grad()
def _on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The shapes that come out: ``func`` without any values."""

    def plain(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(torch.Tensor) if isinstance(tensor, _Traced) else tensor.to("meta")

    with torch._C.DisableTorchFunctionSubclass():
        args, kwargs = map_structure((args, kwargs), Tensor, plain)
        return func(*args, **kwargs)


@torch.no_grad()
def _on_zeros(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
    with torch._C.DisableTorchFunctionSubclass():

        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor

        args, kwargs = map_structure((args, kwargs), Tensor, zeros)
        return map_structure(module(*args, **kwargs), Tensor, lambda tensor: tensor.to("meta"))


def record(
    model: nn.Module,
    input_shape: Sequence[int],
    labels: Tensor,
    *,
    is_whole: Callable[[nn.Module], bool],
    is_labelled: bool,
    is_known: bool,
) -> Record:
    """Run ``model``, which is changed for that time, on as many samples as there are labels.

    Args:
        model: a copy of the user's.
        input_shape: of one sample.
        labels: one for each sample.
        is_whole: whether a module is one node, because there is a rule for its class.
        is_labelled: whether the model takes labels.
        is_known: whether it was recorded before, so that nothing has to be found out of what it reads.

    Raises:
        UserError: something cannot be recorded.
        Exception: whatever the model raises for so many samples.
    """
    batch_size = len(labels)
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((each.dtype for each in tensors if each.is_floating_point()), torch.get_default_dtype())
    tracer = _Tracer(batch_size=batch_size, device=device, is_whole=is_whole, is_known=is_known)
    start = Node("input", "input", None, shape=(batch_size, *input_shape))
    tracer.nodes.append(start)
    inputs: list[Any] = [tracer.wrap(torch.empty(batch_size, *input_shape, dtype=dtype, device="meta"), start)]
    if is_labelled:
        inputs.append(labels.to(device))
    with _recorded(model, tracer), without_random_numbers(device, seed=batch_size), torch.no_grad():
        result = model(*inputs)
    tensors = _returned(result)
    outputs = tuple(tracer.node_of(tensor) for tensor in tensors if isinstance(tensor, _Traced))
    tracer.active = False
    graph = with_maxima(Graph(tuple(tracer.nodes), outputs, batch_size, device, dtype))
    return Record(graph, labels, tracer.ambiguous, tracer.constants)


@contextmanager
def _recorded(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Let every module of ``model``, a copy, tell the tracer when it runs."""
    modules = list(model.named_modules())
    own = [vars(module).get("forward") for _, module in modules]
    whole = [tracer.is_whole(module) for _, module in modules]
    for (name, module), is_whole in zip(modules, whole, strict=True):
        object.__setattr__(module, "forward", tracer.run_module(name, module, module.forward, is_whole=is_whole))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (_, module), forward in zip(modules, own, strict=True):
            # What the model put there stays for its next call.
            if tracer.is_stand_in(vars(module).get("forward")):
                vars(module).pop("forward")
                if forward is not None:
                    object.__setattr__(module, "forward", forward)


def refuse_changed(records: Iterable[Record]) -> None:
    """What was read must still have the values that it had: they are what is certified."""
    now: dict[int, bytes | None] = {}  # of each tensor, which is kept among the constants
    for each in records:
        for node, tensor, version, digest in each.constants:
            if id(tensor) not in now:
                now[id(tensor)] = digest_of(tensor)
            if _version(tensor) != version or now[id(tensor)] != digest:
                raise UserError(
                    f"certify refuses {node.op} at {node.name!r}: a tensor that it reads is changed in place "
                    "afterwards, in this call or the next; use operations not in place, and keep weights and buffers "
                    "still."
                )


def _returned(result: Any) -> list[Tensor]:
    """All tensors of what the model returned."""
    tensors: list[Tensor] = []
    for each in leaves(result):
        if isinstance(each, Tensor):
            tensors.append(each)
        elif not isinstance(each, _CONSTANTS):
            raise UserError(
                f"certify cannot look into the {type(each).__name__} that the model returns; let forward return a "
                "tensor, or tensors in tuples, lists, dictionaries or dataclasses."
            )
    if not tensors:
        raise UserError(
            f"certify found no tensor in what the model returns ({type(result).__name__}); let forward return the "
            "tensor that it computes."
        )
    if any(tensor.is_meta and not isinstance(tensor, _Traced) for tensor in tensors):
        raise UserError("certify lost track of the input: an operation is hidden from torch's function protocol.")
    return tensors
