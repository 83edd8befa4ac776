"""Attention by distance: `spectralnorm.layers.attention` derives its constant."""

from __future__ import annotations

import math

from spectralnorm.layers.attention import L2Attention, l2_attention_bound
from spectralnorm.lipschitz.registry import Call, register_rule

__all__: list[str] = []


def _l2_attention(call: Call) -> float:
    layer = call.module
    assert isinstance(layer, L2Attention)
    if layer.temperature is not None and not 0 < layer.temperature < math.inf:
        call.refuse(f"with temperature {layer.temperature} it has no bound", "use a positive temperature")
    return 1.0 if layer.bounded else l2_attention_bound(call.input_shape[1])


register_rule(L2Attention, _l2_attention)
