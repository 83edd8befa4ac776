"""Operations that have no Lipschitz constant, or none worth telling; each says why, and what to use instead."""

from __future__ import annotations

from torch import nn

from spectralnorm.lipschitz.registry import Call, Step, register_rule, rule

__all__: list[str] = []

_NORMALIZATION = (
    "it divides by a statistic of its input that may be near to zero, so its Lipschitz constant is infinite or near to "
    "1/sqrt(eps)"
)
_USE = "use spectral normalization of the weights, or BatchNorm with running statistics in eval mode"
_ATTENTION = "products of values that depend on the input have no Lipschitz constant for inputs of any length"
_GATE = "it multiplies values that depend on the input, which has no Lipschitz constant for inputs of any length"
_JUMPS = "it jumps, so no Lipschitz constant holds"
_STEEP = "its slope has no bound for inputs of any size"
_BOUNDED = "clamp before it and register a rule for both as one layer, or use an activation of bounded slope"

_REASONS = {
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), (_NORMALIZATION, _USE)),
    **dict.fromkeys(("normalize", "local_response_norm", "var", "std", "var_mean", "std_mean"), (_NORMALIZATION, _USE)),
    "scaled_dot_product_attention": (
        _ATTENTION,
        "use attention by distance, spectralnorm.layers.L2Attention, or a convolution",
    ),
    "multi_head_attention_forward": (
        _ATTENTION,
        "use attention by distance, spectralnorm.layers.L2Attention, or a convolution",
    ),
    **dict.fromkeys(
        ("lstm", "gru", "lstm_cell", "gru_cell"), (_GATE, "use a plain recurrence of linear layers and activations")
    ),
    **dict.fromkeys(
        ("glu", "bilinear", "dot", "outer", "prod", "cumprod"),
        (_GATE, "use a linear layer and an activation"),
    ),
    **dict.fromkeys(("addcmul", "addcdiv", "cosine_similarity"), (_GATE, "multiply by constants")),
    **dict.fromkeys(
        ("hardshrink", "sign", "round", "floor", "ceil", "trunc", "frac", "heaviside"),
        (_JUMPS, "use softshrink or tanh"),
    ),
    **dict.fromkeys(
        (
            "argmax",
            "argmin",
            "gt",
            "lt",
            "ge",
            "le",
            "eq",
            "ne",
            "where",
            "masked_fill",
            "topk",
            "remainder",
            "fmod",
            "bool",
            "long",
            "int",
        ),
        (_JUMPS, "use maximum, sort or clamp"),
    ),
    **dict.fromkeys(
        (
            "exp",
            "expm1",
            "exp2",
            "pow",
            "square",
            "rpow",
            "sqrt",
            "rsqrt",
            "reciprocal",
            "log",
            "log2",
            "log10",
            "log1p",
            "tan",
            "sinh",
            "cosh",
        ),
        (_STEEP, _BOUNDED),
    ),
    "embedding": ("it looks up what the input says", "give labels as the second argument, with num_classes="),
}


@rule(*_REASONS)
def _refuse(call: Call) -> Step:
    reason, remedy = _REASONS[call.node.op]
    call.refuse(reason, remedy)


def _refuse_attention(call: Call) -> float:
    call.refuse(*_REASONS["multi_head_attention_forward"])


register_rule(nn.MultiheadAttention, _refuse_attention)
