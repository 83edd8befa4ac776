"""Residual layers that stretch nothing, whatever their weights are: `spectralnorm.layers` proves it."""

from __future__ import annotations

import math

from torch import nn

from spectralnorm.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from spectralnorm.lipschitz.registry import Call, register_rule
from spectralnorm.lipschitz.rules.activations import is_continuous_softplus

__all__: list[str] = []

_SLOPES_WITHIN_ONE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Identity,
)


def _never_stretches(call: Call) -> float:
    activation = getattr(call.module, "activation", None)
    # Slopes in [0, 1] is what the proof asks of it; a subclass may be anything.
    is_known = type(activation) in _SLOPES_WITHIN_ONE
    if type(activation) is nn.LeakyReLU:
        is_known = 0 <= activation.negative_slope <= 1
    elif type(activation) is nn.ELU:
        is_known = 0 <= activation.alpha <= 1
    elif type(activation) is nn.CELU:
        is_known = 0 < activation.alpha < math.inf
    elif type(activation) is nn.Softplus:
        is_known = is_continuous_softplus(activation.beta, activation.threshold)
    if not is_known:
        call.refuse(
            f"it is 1-Lipschitz for activations with slopes in [0, 1], which is not known of {activation}",
            "use ReLU, LeakyReLU, tanh, sigmoid or softplus",
        )
    layer = call.module
    assert isinstance(layer, SLLLinear | SLLConv2d | CPLLinear | CPLConv2d)
    if not bool(layer._steps().isfinite().all()):
        call.refuse(
            f"its weights are so large that a step is beyond the range of {layer.weight.dtype}", "scale them down"
        )
    return 1.0


for _layer in (SLLLinear, SLLConv2d, CPLLinear, CPLConv2d):
    register_rule(_layer, _never_stretches)
