"""Which rule bounds which operation, and what a rule is given and gives."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_modules

from spectralnorm.errors import UserError
from spectralnorm.lipschitz.graph import Graph, Node, canonical
from spectralnorm.lipschitz.parts import Part, joint_bound

__all__ = [
    "Call",
    "Part",
    "Path",
    "Step",
    "Value",
    "hooks_of",
    "is_of_user",
    "module_rule_of",
    "register_rule",
    "rule",
    "rule_of",
]


@dataclass(frozen=True, slots=True)
class Path:
    """That a value is an explicit linear map of another value, up to a constant.

    Attributes:
        source: the other value.
        map: a `ScaleMap`, `DenseMap` or `ConvolutionMap`; None for the value itself in another shape.
    """

    source: Node
    map: Any


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a node.

    Attributes:
        bound: Lipschitz constant of the map from the input to it, at most.
        path: an explicit map to it, if there is one.
        part: of which part of another value it is made alone.
    """

    bound: float
    path: Path | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a rule gives.

    Attributes:
        factor: Lipschitz constant of the operation, all its inputs taken together, at most; None where the inputs count
            differently.
        bound: of the result, where the rule does more than to multiply with the factor.
        map: the operation as an explicit linear map of its one input, or of the source of ``path`` if that is given.
        path: of the result, where it does not follow from ``map``.
        part: that the result is such a part of the one input.
        is_linear: up to a constant; its norm then has a lower bound too.
        is_hidden: nothing that deserves a line of the table.
    """

    factor: float | None
    bound: float | None = None
    map: Any = None
    path: Path | None = None
    part: Part | None = None
    is_linear: bool = False
    is_hidden: bool = False


@dataclass(slots=True)
class Call:
    """One operation, as a rule sees it.

    Attributes:
        node: with its ``name``, ``args`` and ``kwargs``; arguments that depend on the input are nodes themselves.
        values: what is known of the nodes before.
        graph: that the node is in.
        mode: ``"eval"`` or ``"train"``.
        sizes: ``"given"`` or ``"all"``.
    """

    node: Node
    values: dict[Node, Value]
    graph: Graph
    mode: str = "eval"
    sizes: str = "given"
    inputs: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = self.node.inputs

    @property
    def module(self) -> nn.Module | None:
        """The layer, where the rule is for its class."""
        return self.node.module

    @property
    def input(self) -> Node:
        """The one argument that depends on the input."""
        if len(self.inputs) != 1:
            self.refuse("more than one argument depends on the input")
        return self.inputs[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the one argument, batch first."""
        return self.input.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the result, batch first."""
        return self.node.shape

    @property
    def input_bound(self) -> float:
        """Lipschitz constant of all arguments together."""
        return joint_bound(self.inputs, self.values)

    def bind(self, signature: str) -> SimpleNamespace:
        """Arguments by name.

        Args:
            signature: as in ``def``, such as ``"input, dim=None"``. Functions and methods call the first differently,
                so it is taken by place or as ``input`` or ``self``.
        """
        parsed = _signature(signature)
        first = next(iter(parsed.parameters))
        kwargs = {{"self": first, "input": first, "x": first}.get(k, k): v for k, v in self.node.kwargs.items()}
        try:
            bound = parsed.bind(*self.node.args, **{k: v for k, v in kwargs.items() if k not in _IGNORED})
        except TypeError as error:
            self.refuse(f"it is called in a way that certify does not know ({error})")
        bound.apply_defaults()
        return SimpleNamespace(**bound.arguments)

    def dims(self, dim: Any, ndim: int) -> tuple[int, ...]:
        """Dimensions counted from the front; refused where the batch is among them."""
        given = tuple(range(ndim)) if dim is None or dim == () else (dim,) if isinstance(dim, int) else tuple(dim)
        dims = tuple(each % ndim for each in given)
        if 0 in dims:
            self.refuse("it works along the batch, and so mixes samples", "work along the dimensions after the first")
        return dims

    def constant(self, value: Any) -> Tensor:
        """A number or tensor that does not depend on the input, in float64."""
        if isinstance(value, Node):
            self.refuse("it multiplies values that both depend on the input, so no factor bounds it")
        if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
            self.refuse("it has complex numbers", "certify the real form")
        if isinstance(value, Tensor):
            number = value.detach().to(torch.float64)
            is_exact = value.is_floating_point() or not bool((number.abs() >= 2**53).any())
        else:
            number = torch.tensor(float(value), dtype=torch.float64, device=self.graph.device)
            is_exact = not isinstance(value, int) or float(value) == value
        if not is_exact:
            self.refuse("it has whole numbers that float64 does not hold", "give them as floating point")
        return number

    def refuse(self, reason: str, remedy: str = "") -> NoReturn:
        """Raise the error that says that this layer has no rule, why, and what to do instead."""
        ending = f"; {remedy}" if remedy else ""
        raise UserError(f"certify refuses {self.node.op} at {self.node.name!r}: {reason}{ending}.")


Rule = Callable[[Call], "Step | float"]

_IGNORED = frozenset({"dtype", "_stacklevel", "inplace", "memory_format", "out"})
_RULES: dict[str, Rule] = {}
# What a subclass may have of its own and still compute what its base does.
_KEPT = frozenset({"__init__", "extra_repr", "reset_parameters"})
_MODULE_RULES: dict[type[nn.Module], Rule] = {}


@lru_cache(maxsize=512)
def _signature(text: str) -> inspect.Signature:
    parameters = []
    for part in text.split(", "):
        name, _, default = part.partition("=")
        kind = inspect.Parameter.VAR_POSITIONAL if name.startswith("*") else inspect.Parameter.POSITIONAL_OR_KEYWORD
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name.lstrip("*"), kind, default=value))
    return inspect.Signature(parameters)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of the operations with these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def register_rule(op: Callable[..., Any] | type[nn.Module] | str, rule: Callable[[Call], float]) -> None:
    """Tell `certify` the Lipschitz constant of an operation or of a layer, also in place of a rule it has.

    Args:
        op: a torch function such as ``torch.erfinv``, whose method and in-place forms it covers too; its name; or a
            class of layers, whose ``forward`` is then not looked into. It holds for subclasses that change none of its
            methods; others are looked into, and so is a layer of which a method was replaced, or within which one was
            or a hook was registered that does more than to normalize a weight, or a convolution has yet to learn the
            size of its images.
        rule: gets a `Call` and returns a number that the Lipschitz constant does not exceed: from all arguments that
            depend on the input, taken together, to the result, in the 2-norm, and without mixing samples of a batch.
            The call has ``module``, ``input_shape``, ``output_shape`` (batch first) and ``node.args``.

    Raises:
        UserError: ``op`` is none of these.

    >>> import torch
    >>> import spectralnorm as sn
    >>> class IntoBall(torch.nn.Module):
    ...     def forward(self, inputs):
    ...         return inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1)  # a quotient has no rule
    >>> sn.register_rule(IntoBall, lambda call: 1.0)  # a projection onto a convex set
    >>> sn.certify(IntoBall(), (3,)).upper_bound
    1.0
    """
    if not callable(rule):
        raise UserError(f"register_rule takes a function of the call as its second argument, got {rule!r}.")
    if isinstance(op, type) and issubclass(op, nn.Module):
        _MODULE_RULES[op] = rule
    elif isinstance(op, str):
        _RULES[op] = rule
    elif callable(op) and hasattr(op, "__name__"):
        _RULES[canonical(op)[0]] = rule
    else:
        raise UserError(f"register_rule takes a torch function, its name or a class of layers, got {op!r}.")


def rule_of(node: Node) -> Rule | None:
    """The rule for a node; None where there is none."""
    return module_rule_of(node.module) if node.module is not None else _RULES.get(node.op)


def is_of_user(node: Node) -> bool:
    """Whether its rule comes from outside of this package."""
    found = rule_of(node)
    module = getattr(found, "__module__", None) or type(found).__module__
    return found is not None and module.partition(".")[0] != __name__.partition(".")[0]


def module_rule_of(module: nn.Module) -> Rule | None:
    """The rule for a layer as a whole, that of the nearest class; None where the layer may compute something else."""
    kinds = type(module).__mro__
    place = next((place for place, kind in enumerate(kinds) if kind in _MODULE_RULES), None)
    if place is None or any(_changes(kind, kinds[place]) for kind in kinds[:place]):
        return None
    within = [each for each in module.modules() if each is not module]
    # Hooks of the layer itself are recorded beside it.
    if any(map(_replaces, (module, *within))) or any(map(hooks_of, within)) or (within and _has_global_hooks()):
        return None
    return _MODULE_RULES[kinds[place]]


def _replaces(module: nn.Module) -> bool:
    """Whether an instance has a method of its own in place of one of its class."""
    return any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def hooks_of(module: nn.Module) -> list[int]:
    """Keys of what runs before and after ``forward``, but for what torch sets a weight with and what only looks."""
    before = module._forward_pre_hooks.items()
    ours = [key for key, hook in before if not _is_of_torch(hook) and not _only_looks(hook)]
    return [*ours, *module._forward_hooks]


def _is_of_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


def _only_looks(hook: Any) -> bool:
    """Whether its class, and no base of it, says so."""
    return "only_looks" in vars(type(hook)) and hook.only_looks


def _has_global_hooks() -> bool:
    return bool(_of_modules._global_forward_pre_hooks or _of_modules._global_forward_hooks)


def _changes(kind: type, base: type) -> bool:
    """Whether a subclass has other methods or properties than the class that a rule was registered for."""
    computes = {name for each in base.__mro__ if each not in nn.Module.__mro__ for name in vars(each)} - _KEPT
    return any(name in computes and (callable(each) or isinstance(each, property)) for name, each in vars(kind).items())
