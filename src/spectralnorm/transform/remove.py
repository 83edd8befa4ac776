"""Taking the normalization off a whole model, or off one weight of a layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectralnorm.errors import UserError
from spectralnorm.parametrizations import fsdp
from spectralnorm.parametrizations.arithmetic import without_autocast
from spectralnorm.parametrizations.layer_class import plain_class
from spectralnorm.parametrizations.lazy import pending_of, pending_of_module
from spectralnorm.parametrizations.registration import normalization_of, unregister
from spectralnorm.parametrizations.shards import is_distributed, whole
from spectralnorm.parametrizations.snapshot import unchanged_on_failure
from spectralnorm.parametrizations.stacked import in_eval_mode, originals_of
from spectralnorm.transform.upkeep import normalized_weights, weight_label

__all__ = ["remove_spectral_norm"]

M = TypeVar("M", bound=nn.Module)


def remove_spectral_norm(model: M, name: str | None = None) -> M:
    """Take the normalization off all weights of a model and write the normalized weights into the parameters.

    The model computes the same function as before, and its parameters are the same objects. Only a weight that other
    parametrizations make of several parameters, as torch's ``weight_norm`` does, becomes a new one. And where layers
    share a parameter and compute with different values of it, because one of them is not normalized or has a
    normalization of its own, they cannot go on sharing: a warning names those that get a new parameter, which an
    optimizer made before does not have. The old one stays with the layer without a normalization, else with the first.
    What shares a parameter from outside of ``model`` is not seen, and reads the new numbers.

    Args:
        model: a model or a layer; weights that are not normalized are left as they are.
        name: of a layer, the one weight that is meant, as in torch's function; the others stay as they are.

    Returns:
        The model.

    Raises:
        UserError: a weight cannot be read or written where it is sharded, or layers would have to get parameters of
            their own there, or the layer has no normalized weight ``name``. Nothing has been changed then.

    >>> import torch
    >>> from spectralnorm import add_spectral_norm
    >>> model = add_spectral_norm(nn.Sequential(nn.Linear(4, 4)))
    >>> inputs = torch.ones(1, 4)
    >>> before = model(inputs)
    >>> torch.equal(remove_spectral_norm(model)(inputs), before)
    True
    """
    with unchanged_on_failure(model):
        if name is not None and normalization_of(model, name) is None and pending_of(model, name) is None:
            raise UserError(
                f"{name!r} of this {plain_class(model).__name__} is not normalized by this package; name one that is, "
                "or leave the name out to take all normalizations off."
            )
        _end_waiting(model, name)
        found = (_Use(*found[:3]) for found in normalized_weights(model))
        uses = [use for use in found if name is None or (use.module is model and use.tensor_name == name)]
        for use in uses:
            fsdp.require_sharded(use.parts, "original")
            use.value()  # now, because from the first removal on nothing may be refused
        raw_users = _users_of_raw(model, uses)
        own = _own_parameters(uses, raw_users)
        done = set(raw_users)
        for use in uses:
            unregister(use.module, use.tensor_name, bake=use.rule not in own and id(use.weight) not in done)
            if use.rule not in own:
                done.add(id(use.weight))
        for use in uses:
            if use.rule in own:
                setattr(use.module, use.tensor_name, own[use.rule])
    return model


class _Use:
    """One layer's use of a parameter, normalized.

    Attributes:
        label: how it is called in messages.
        module: the layer.
        tensor_name: the weight's name in it.
        parts: its parametrizations.
        weight: the parameter that gets the value; the value itself where that becomes a new one.
        rule: layers with the same one compute with the same value.
    """

    def __init__(self, label: str, module: nn.Module, tensor_name: str) -> None:
        self.label, self.module, self.tensor_name = label, module, tensor_name
        self.parts: nn.ModuleList = module.parametrizations[tensor_name]  # type: ignore[index, assignment]
        self._originals = originals_of(self.parts)
        self.weight = self._originals[0] if len(self._originals) == 1 else self.value()
        self.rule = (id(self.weight), *map(id, self.parts))

    def value(self) -> Tensor:
        """What the layer computes with; nothing advances."""
        with torch.no_grad(), without_autocast(self._originals[0]), in_eval_mode(self.parts):
            return getattr(self.module, self.tensor_name).detach()


def _end_waiting(model: nn.Module, name: str | None) -> None:
    """Leave no weight of those meant that waits for a normalization: it gets it if it has a shape by now."""
    for module in list(model.modules()):
        for pending in pending_of_module(module):
            if name is not None and not (module is model and pending.name == name):
                continue
            if pending.has_shape(module):
                with suppress(UserError, IndexError):  # options that do not fit: no forward has ever succeeded
                    pending.normalize(module)
            pending.cancel(module)


def _users_of_raw(model: nn.Module, uses: list[_Use]) -> dict[int, str]:
    """Who computes with a parameter, or a buffer, as it is: a name of it by its id."""
    normalized = {id(use.parts) for use in uses}
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        if id(module) not in normalized:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                found.setdefault(id(tensor), weight_label(path, name))
    return found


def _own_parameters(uses: list[_Use], raw_users: Mapping[int, str]) -> dict[tuple[int, ...], Tensor]:
    """New parameters by rule, for those whose value the parameter that they share will not have."""
    first_of_rules: dict[int, dict[tuple[int, ...], _Use]] = {}
    for use in uses:
        first_of_rules.setdefault(id(use.weight), {}).setdefault(use.rule, use)
    own: dict[tuple[int, ...], Tensor] = {}
    for identity, of_rules in first_of_rules.items():
        first, *others = of_rules.values()
        owner, kept = first.label, first.weight
        if identity in raw_users:
            owner, others = raw_users[identity], [first, *others]
        elif others:
            kept = first.value()
        apart = {use.rule: use.value() for use in others if not _is_same(use.value(), kept)}
        if not apart:
            continue
        labels = ", ".join(use.label for use in uses if use.rule in apart)
        if is_distributed(first.weight):
            raise UserError(
                f"{labels} and {owner} share a weight of which each process holds a part, and compute with different "
                "values of it, so they would need a parameter each; normalize them together, or remove the "
                "normalization before the model is sharded."
            )
        warnings.warn(
            f"{labels} shared a weight with {owner}, and computed with another value of it. That value is in its own "
            "parameter now, which an optimizer made before does not have.",
            stacklevel=3,
        )
        own |= {rule: _like(first.weight, value) for rule, value in apart.items()}
    return own


def _is_same(first: Tensor, second: Tensor) -> bool:
    return not first.is_meta and torch.equal(whole(first), whole(second))


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A new parameter with this value; a buffer where ``weight`` is one."""
    is_parameter = isinstance(weight, nn.Parameter)
    return nn.Parameter(value.clone(), weight.requires_grad) if is_parameter else value.clone()
