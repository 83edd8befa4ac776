"""Functions of one entry, and of the entries along a dimension."""

from __future__ import annotations

import math
from fractions import Fraction

from spectralnorm.lipschitz.registry import Call, Step, rule
from spectralnorm.lipschitz.upward import root_up

__all__ = ["is_continuous_softplus"]

# Suprema of the derivative's modulus, computed to 30 digits and rounded up in the last digit shown.
_SLOPES = {
    **dict.fromkeys(
        "relu relu6 hardtanh tanh log_sigmoid softsign tanhshrink softshrink abs absolute sin cos atan arctan "
        "asinh arcsinh identity".split(),
        1.0,
    ),
    "sigmoid": 0.25,
    "hardsigmoid": 0.16666666666666669,
    "silu": 1.0998393202,
    "mish": 1.0884981613,
    "selu": 1.7580993409,
    "hardswish": 1.5,
    "erf": 1.1283791671,
}
_GELU = {"none": 1.1289041452, "tanh": 1.1289930687}


@rule(*_SLOPES)
def _fixed_slope(call: Call) -> Step:
    return Step(_SLOPES[call.node.op])


@rule("gelu")
def _gelu(call: Call) -> Step:
    return Step(_GELU[call.bind("input, approximate='none'").approximate])


@rule("leaky_relu")
def _leaky_relu(call: Call) -> Step:
    return Step(max(1.0, abs(call.bind("input, negative_slope=0.01").negative_slope)))


@rule("elu")
def _elu(call: Call) -> Step:
    alpha = call.bind("input, alpha=1.0").alpha
    return Step(max(1.0, abs(alpha)))


@rule("celu")
def _celu(call: Call) -> Step:
    alpha = call.bind("input, alpha=1.0").alpha
    if not 0 < alpha < math.inf:
        call.refuse(f"with alpha {alpha} its slope has no bound", "use a positive alpha")
    return Step(1.0)


@rule("softplus")
def _softplus(call: Call) -> Step:
    given = call.bind("input, beta=1.0, threshold=20.0")
    if not is_continuous_softplus(given.beta, given.threshold):
        call.refuse(
            f"with beta {given.beta} and threshold {given.threshold} it jumps at its threshold",
            "leave the threshold at 20 or above, and beta finite and not zero",
        )
    return Step(1.0)


def is_continuous_softplus(beta: float, threshold: float) -> bool:
    """Whether it jumps at its threshold by no more than it does by default, in units of its value there.

    Above beta x = threshold torch gives x in place of log(1 + exp(beta x)) / beta, which is larger by
    log(1 + exp(-threshold)) / beta: for 20 it is 1e-10 of x.
    """
    return 0 < abs(beta) < math.inf and threshold >= 20


@rule("prelu")
def _prelu(call: Call) -> Step:
    weight = call.constant(call.bind("input, weight").weight)
    return Step(max(1.0, float(weight.abs().max())))


@rule("rrelu")
def _rrelu(call: Call) -> Step:
    given = call.bind("input, lower=0.125, upper=0.3333333333333333, training=False")
    return Step(max(1.0, abs(given.lower), abs(given.upper)))


@rule("threshold")
def _threshold(call: Call) -> Step:
    given = call.bind("input, threshold, value")
    if given.threshold != given.value:
        call.refuse("it jumps at its threshold", "set value to threshold, or use ReLU")
    return Step(1.0)


@rule("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Step:
    if len(call.inputs) != 1 or call.output_shape != call.input_shape:
        call.refuse("its limits depend on the input or change the shape", "clamp between constants")
    return Step(1.0)


@rule("softmax", "softmin", "softmax2d")
def _softmax(call: Call) -> Step:
    # The Jacobian diag(p) - p p' has norm 1/2 at most, attained where two entries share all the weight.
    _dims_of(call)
    return Step(0.5)


@rule("log_softmax")
def _log_softmax(call: Call) -> Step:
    (dim,) = _dims_of(call)
    return Step(root_up(float(call.input_shape[dim])))


@rule("logsumexp")
def _logsumexp(call: Call) -> Step:
    # The gradient along the dimensions is a softmax, no longer than one.
    _dims_of(call)
    return Step(1.0)


def _dims_of(call: Call) -> tuple[int, ...]:
    given = call.bind("input, dim=None, keepdim=False")
    if given.dim is None:
        call.refuse("its dimension is not given", "say dim=")
    return call.dims(given.dim, len(call.input_shape))


@rule("amax", "amin", "max", "min", "maximum", "minimum", "fmax", "fmin")
def _extremum(call: Call) -> Step:
    given = call.bind("input, dim=None, keepdim=False")
    if call.node.op in ("maximum", "minimum", "fmax", "fmin") or hasattr(given.dim, "shape"):
        # |max(a, b) - max(a', b')|^2 <= |a - a'|^2 + |b - b'|^2
        from spectralnorm.lipschitz.rules.arithmetic import copies

        return Step(max(copies(call, node) for node in call.inputs))
    call.dims(given.dim, len(call.input_shape))
    return Step(1.0)


@rule("sort")
def _sort(call: Call) -> Step:
    # The nearest rearrangement of two lists pairs them in order.
    given = call.bind("input, dim=-1, descending=False, stable=False")
    call.dims(given.dim, len(call.input_shape))
    return Step(1.0)


@rule("norm", "linalg_vector_norm")
def _norm(call: Call) -> Step:
    signature = (
        "input, p='fro', dim=None, keepdim=False" if call.node.op == "norm" else "input, ord=2, dim=None, keepdim=False"
    )
    given = call.bind(signature)
    order = given.p if call.node.op == "norm" else given.ord
    dims = call.dims(given.dim, len(call.input_shape))
    if order == 1:
        return Step(root_up(float(math.prod(call.input_shape[dim] for dim in dims))))
    if order not in ("fro", None, 2, math.inf):
        call.refuse(f"it has no rule for order {order}", "use order 1, 2 or inf")
    return Step(1.0)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(call: Call) -> Step:
    given = call.bind("input, p=0.5, training=True")
    if not given.training or given.p == 0:
        return Step(1.0, is_hidden=True)
    if "alpha" in call.node.op:
        call.refuse("in training it replaces entries at random by a constant and rescales", "certify mode='eval'")
    # Each draw multiplies every entry by zero or by 1/(1-p), of which this is right to half a unit in the last place.
    return Step(0.0 if given.p == 1 else math.nextafter(float(1 / (1 - Fraction(given.p))), math.inf))
