"""A learned scale that the optimizer does not have, because it was made before the scale was there."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from spectralnorm.parametrizations.weight_clock import Moment, watch

__all__ = ["ForgottenScale"]


class ForgottenScale:
    """Looks once whether the first step of an optimizer that moves a weight moves its learned scale as well."""

    def __init__(self) -> None:
        self._first: tuple[Moment, Moment] | None = None  # of the weight and the scale
        self._has_seen_step = False

    def look(self, weight: Tensor, scale: nn.Parameter, name: str) -> None:
        """Called at every use of the weight called ``name``: warn if a step has moved it and not ``scale``."""
        if self._has_seen_step:
            return
        if self._first is None or any(
            moment.clock.weight is not now for moment, now in zip(self._first, (weight, scale), strict=True)
        ):
            self._first = watch(weight).now(), watch(scale).now()
            return
        of_weight, of_scale = self._first
        if of_weight.clock.steps == of_weight.steps:
            return
        self._has_seen_step, self._first = True, None
        if scale.requires_grad and of_scale.clock.steps == of_scale.steps:
            warnings.warn(
                f"An optimizer has moved the weight {name!r} and not its learned scale, which it does not have if "
                "it was made before the normalization. Make the optimizer afterwards, or give it the parameter "
                f"parametrizations.{name}.0.scale by add_param_group.",
                stacklevel=3,
            )
