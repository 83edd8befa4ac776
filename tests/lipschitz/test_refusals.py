"""What has no constant, no rule, or mixes samples is refused by name, with what to use instead."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import TorchDispatchMode

import spectralnorm as sn
from spectralnorm.layers import CPLLinear, SLLLinear
from spectralnorm.lipschitz import mlp_bound


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


def _write(inputs: Tensor) -> Tensor:
    written = torch.zeros(inputs.shape)
    written[:, 0] = inputs[:, 0]
    return written


def _stale_view(inputs: Tensor) -> Tensor:
    doubled = 2 * inputs
    view = doubled[:, :2]
    doubled.relu_()
    return view


def _changed_constant(inputs: Tensor) -> Tensor:
    constant = torch.full((4,), 5.0)
    scaled = inputs * constant[:]
    constant.zero_()
    return scaled


def _branch(inputs: Tensor) -> Tensor:
    return inputs if inputs.sum() > 0 else -inputs


def _maybe_view(inputs: Tensor) -> Tensor:
    # Of an input in the memory format channels_last it is one.
    images = inputs.unflatten(1, (2, 2, 1))
    view = torch.flatten(input=images.permute(0, 2, 3, 1), start_dim=1)
    view *= 3
    return images


class _Larger(Tensor):
    """Ten times as large in every product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return 10 * result if func is Tensor.mul else result


class _LargerRelu(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 10 * result if func is torch.ops.aten.relu.default else result


def _under_a_mode(inputs: Tensor) -> Tensor:
    with _LargerRelu():
        return inputs.relu()


REFUSED = {
    "tensor that multiplies in another way": (Lambda(lambda x: x * torch.ones(4).as_subclass(_Larger)), "the _Larger"),
    "function under a mode": (Lambda(_under_a_mode), "relu under a TorchDispatchMode"),
    "layer norm": (nn.LayerNorm(4), "layer_norm at '0'.*spectral normalization"),
    "batch norm, statistics of the batch": (nn.BatchNorm1d(4, track_running_stats=False), "batch_norm at '0'.*mixes"),
    "group norm": (nn.GroupNorm(2, 4), "group_norm at '0'"),
    "normalize": (Lambda(F.normalize), "normalize at '0'"),
    "hardshrink": (nn.Hardshrink(), "hardshrink.*jumps.*softshrink"),
    "threshold": (nn.Threshold(0.1, 20), "threshold.*jumps"),
    "softplus with a threshold at zero": (nn.Softplus(threshold=0), "softplus.*jumps at its threshold"),
    "softplus with a low threshold": (nn.Softplus(beta=10, threshold=1), "softplus.*jumps at its threshold"),
    "softplus without a scale": (nn.Softplus(beta=0), "softplus.*jumps at its threshold"),
    "CELU with a negative alpha": (nn.CELU(-1.0), "celu.*no bound.*positive alpha"),
    **{
        f"{name} with a parameter that is no number": (Lambda(function), f"{name}.*not a number")
        for name, function in {
            "elu": lambda x: F.elu(x, math.nan),
            "leaky_relu": lambda x: F.leaky_relu(x, math.nan),
            "clamp": lambda x: x.clamp(min=math.nan),
            "pad": lambda x: F.pad(x, (1, 1), value=math.nan),
            "add": lambda x: x + pytest.importorskip("numpy").float32("nan"),
        }.items()
    },
    "residual layer with softplus that jumps": (
        SLLLinear(4, activation=nn.Softplus(threshold=1)),
        "SLLLinear.*not known of Softplus",
    ),
    "residual layer with CELU that falls": (
        CPLLinear(4, activation=nn.CELU(-1.0)),
        "CPLLinear.*not known of CELU",
    ),
    "glu": (nn.GLU(), "glu.*multiplies"),
    "bilinear": (Lambda(lambda x: F.bilinear(x, x, torch.ones(2, 4, 4))), "bilinear.*multiplies"),
    "product": (Lambda(lambda x: x * x.sigmoid()), r"mul at '0 \(2\)'.*both depend"),
    "einsum of values": (Lambda(lambda x: torch.einsum("bi,bi->b", x, x)), "einsum at '0'.*multiplies"),
    "einsum over the batch": (Lambda(lambda x: torch.einsum("bi->i", x)), "einsum at '0'.*mixes samples"),
    "einsum that sums a weight": (Lambda(lambda x: torch.einsum("bi,j->bi", x, torch.ones(2))), "einsum.*weight alone"),
    "einsum that sums a weight, the input repeated": (
        Lambda(lambda x: torch.einsum("bji,kji->bi", x[:, None], torch.ones(2, 3, 4))),
        "einsum.*weight alone",
    ),
    "einsum with a trace": (Lambda(lambda x: torch.einsum("bi,jj->bi", x, torch.eye(2))), "einsum.*diagonal"),
    "matrix product": (Lambda(lambda x: x[:, :, None] @ x[:, None]), r"matmul at '0 \(3\)'.*attention"),
    "quotient": (Lambda(lambda x: 1 / x), "rdiv.*near to zero"),
    "exp": (Lambda(torch.exp), "exp.*no bound"),
    "power": (Lambda(lambda x: x**2), "pow.*no bound"),
    "comparison": (Lambda(lambda x: (x > 0).float()), "gt.*jumps"),
    "positions": (Lambda(lambda x: x.sort(dim=1).indices.float()), "positions"),
    "rounding": (Lambda(lambda x: x.to(torch.int64).float()), "whole numbers"),
    "bits": (Lambda(lambda x: x.view(torch.float16).float()), "view at '0'.*bits"),
    "bits, by name": (Lambda(lambda x: x.view(dtype=torch.float32)), "view at '0'.*bits"),
    "padding that crops": (Lambda(lambda x: F.pad(x[:, None], (1, -1), mode="circular")), "pad at.*crops"),
    "unknown": (Lambda(torch.special.bessel_j0), "no rule for .*bessel_j0 at '0'.*register_rule"),
    "branch on values": (Lambda(_branch), "needs the values"),
    "values": (Lambda(lambda x: x * x.max().item()), "needs the values"),
    "random numbers": (Lambda(lambda x: x + torch.randn(4)), "random numbers"),
    "written into a constant": (Lambda(_write), "writes|__setitem__"),
    "view of what has another layout": (Lambda(_maybe_view), "view of a tensor that was changed"),
    "stale view": (Lambda(_stale_view), "view of a tensor that was changed"),
    "constant changed after its use": (Lambda(_changed_constant), "mul at '0'.*changed in place afterwards"),
    "copy of the input without a record": (Lambda(lambda x: x + torch.tensor(x)), "add at '0'.*hidden"),
    "mean over the batch": (Lambda(lambda x: x - x.mean(0)), "mixes samples"),
    "softmax over the batch": (nn.Softmax(dim=0), "mixes samples"),
    "total": (Lambda(lambda x: x.sum()), "mixes samples"),
    "permuted batch": (Lambda(lambda x: x.flip(0)), "mixes samples"),
    "one sample": (Lambda(lambda x: x[0]), "samples of the batch"),
    "transposed batch": (Lambda(lambda x: x.T), "T at '0'.*batch moves"),
    "batch against features": (Lambda(lambda x: x[:, :1] + x[:, 0]), "batch"),
    "matrix on the batch": (Lambda(lambda x: torch.ones(3, len(x)) @ x), "batch"),
    "repeated batch": (Lambda(lambda x: x.repeat(2, 1)), "batch"),
    "repeated first sample": (
        Lambda(lambda x: x.repeat_interleave(torch.tensor([len(x)] + [0] * (len(x) - 1)), 0, output_size=len(x))),
        "repeat_interleave at .*something else",
    ),
    "divided by zero": (Lambda(lambda x: x / 0), "divides by zero"),
    "added infinity": (Lambda(lambda x: x + float("inf")), "add at '0'.*not finite"),
    "choice that is no maximum": (Lambda(lambda x: torch.where(x > 0, x, -3 * x)), "gt at '0'.*jumps"),
    "choice turned around": (Lambda(lambda x: torch.where(x > x.tanh(), x, 2 * x)), "gt at.*jumps"),
    "overflow": (Lambda(lambda x: 1e200 * (1e200 * x)), "beyond the range"),
    "overflow of two outputs together": (Lambda(lambda x: (1.5e308 * x, 1.5e308 * x)), "outputs.*beyond the range"),
    "factor between": (Lambda(lambda x: torch.add(x, 5, x)), "add at '0'.*alpha="),
    "multiplied by a number between two of float64": (Lambda(lambda x: x * (2**53 + 1)), "float64 does not hold"),
    "multiplied by numbers between": (Lambda(lambda x: x * torch.tensor([2**53 + 1])), "float64 does not hold"),
    "added so often": (Lambda(lambda x: torch.sub(x, x, alpha=2**53 + 1)), "float64 does not hold"),
    "multiplied by a complex number": (Lambda(lambda x: (1j * x).real), "mul at '0'.*complex"),
    "set of outputs": (Lambda(lambda x: {x}), "look into the set .*dictionaries"),
    "generator of outputs": (Lambda(lambda x: (each for each in [x])), "look into the generator"),
    "namespace of outputs": (Lambda(lambda x: SimpleNamespace(outputs=x)), "look into the SimpleNamespace"),
    "hidden output": (Lambda(lambda x: (x, [SimpleNamespace(outputs=x)])), "look into the SimpleNamespace"),
    "nothing": (Lambda(lambda x: None), r"no tensor in what the model returns \(NoneType\)"),
    "multiplied by infinity": (Lambda(lambda x: x * float("inf")), "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str):
    module, message = REFUSED[name]

    with pytest.raises(sn.UserError, match=f"(?s){message}"):
        sn.certify(nn.Sequential(module), (4,), ascent_steps=0)


def test_change_in_place_is_followed_where_the_memory_of_another_tensor_was():
    def rectified(inputs: Tensor) -> Tensor:
        result = 0 * inputs
        for _ in range(10):
            copied = (2 * inputs).unflatten(1, (2, 2)).transpose(1, 2).reshape(len(inputs), 4)
            others = [copied * 1 for _ in range(20)]  # one of them has the place of what was copied
            for other in others:
                other.relu_()
            result = result + copied
        return result

    assert sn.certify(Lambda(rectified), (4,), ascent_steps=0).upper_bound == pytest.approx(20)


def test_batch_norm_and_alpha_dropout_are_refused_in_training():
    for module, message in ((nn.BatchNorm1d(4), "eval"), (nn.AlphaDropout(), "eval")):
        assert sn.certify(nn.Sequential(module), (4,), ascent_steps=0).upper_bound == pytest.approx(1, rel=1e-4)
        with pytest.raises(sn.UserError, match=message):
            sn.certify(nn.Sequential(module), (4,), mode="train")


def test_attention_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, inputs):
            return self.layer(inputs, inputs, inputs)[0]

    with pytest.raises(sn.UserError, match="MultiheadAttention at 'layer'"):
        sn.certify(Attention(), (3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(value: float):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = value

    with pytest.raises(sn.UserError, match=r"'1'.*not finite"):
        sn.certify(model, (3,))


@pytest.mark.parametrize("name", ["0.bias", "1.running_mean", "1.bias", "2.bias", "2.weight"])
def test_bias_or_statistic_that_is_not_finite_is_refused_by_name(name: str):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 2, 1))
    state = model.state_dict()
    state[name].view(-1)[0] = float("nan")

    with pytest.raises(sn.UserError, match=f"(?s)'{name[0]}'.*not finite"):
        sn.certify(model, (2, 3, 3))


@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
def test_layer_whose_step_is_out_of_range_is_refused(kind: type[nn.Module]):
    layer = kind(4)
    with torch.no_grad():
        layer.weight.div_(layer.weight.abs().max()).mul_(1e18)
    assert sn.certify(layer, (4,), ascent_steps=0).upper_bound == 1

    with torch.no_grad():
        layer.weight.mul_(100)

    assert not bool(layer(torch.randn(2, 4)).isfinite().all())
    with pytest.raises(sn.UserError, match=f"{kind.__name__}.*beyond the range of torch.float32"):
        sn.certify(layer, (4,))


def test_layer_with_a_rule_that_is_given_what_may_hide_a_tensor_is_refused():
    class Sum(nn.Module):
        def forward(self, inputs, other):
            return inputs + other.tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sum = Sum()

        def forward(self, inputs):
            return self.sum(inputs, SimpleNamespace(tensor=inputs))

    assert sn.certify(Model(), (4,), ascent_steps=0).upper_bound == pytest.approx(2)
    sn.register_rule(Sum, lambda call: 1.0)

    with pytest.raises(sn.UserError, match="look into the SimpleNamespace that Sum at 'sum' is given; give"):
        sn.certify(Model(), (4,), ascent_steps=0)


def test_scripted_and_hidden_operations_cannot_pass_for_constants():
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))

    with pytest.raises(sn.UserError, match="scripted module '0'"):
        sn.certify(nn.Sequential(scripted), (4,))
    with pytest.raises(sn.UserError):
        sn.certify(Lambda(lambda x: scripted(x) + 1), (4,))


def relu(inputs: Tensor) -> Tensor:
    if has_torch_function_unary(inputs):
        return handle_torch_function(relu, (inputs,), inputs)
    return 3 * F.relu(inputs)


def test_operation_of_another_library_is_not_taken_for_torchs_of_the_same_name():
    tripled = torch.library.custom_op(
        "spectralnorm_test::relu", lambda inputs: 3 * inputs, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    tripled.register_fake(torch.empty_like)

    for function, name in (
        (relu, r"test_refusals\.relu"),
        (torch.ops.spectralnorm_test.relu, r"spectralnorm_test\.relu"),
    ):
        with pytest.raises(sn.UserError, match=f"no rule for .*{name}"):
            sn.certify(Lambda(function), (4,), ascent_steps=0)
        sn.register_rule(function, lambda call: 3.0)
        assert sn.certify(Lambda(function), (4,), ascent_steps=0).upper_bound == 3
    assert sn.certify(Lambda(torch.ops.aten.relu), (4,), ascent_steps=0).upper_bound == 1


@pytest.mark.parametrize("bound", [sn.certify, mlp_bound], ids=["certify", "mlp_bound"])
def test_wrong_arguments_are_told(bound):
    model = nn.Linear(3, 3)
    for given, shape, message in (
        ("model", (3,), "takes a torch.nn.Module, got str"),
        (model, 3, "input_shape must be"),
        (model, "3", "input_shape must be"),
        (model, (3.0,), "input_shape must be"),
        (model, (4,), "could not run the model"),
        (nn.LazyLinear(3), (3,), "'weight' gets its shape from the first input; run the model once"),
        (nn.Linear(3, 3, device="meta"), (3,), "'weight' is on the meta device; load"),
        (nn.Linear(3, 3).to(torch.float8_e4m3fn), (3,), "'weight' is torch.float8_e4m3fn; convert"),
    ):
        with pytest.raises(sn.UserError, match=message):
            bound(given, shape)
    with torch.device("meta"), pytest.raises(sn.UserError, match=r"outside of torch\.device"):
        bound(model, (3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "test"}, "mode must be"),
        ({"input_sizes": "some"}, "input_sizes must be"),
        *(({"num_classes": value}, "num_classes must be a whole number from 1 up") for value in (0, "2", 1.5, True)),
        *(({"ascent_steps": value}, "ascent_steps must be a whole number from 0 up") for value in (-1, "a", None, 1.5)),
    ],
    ids=str,
)
def test_wrong_options_are_told(options: dict, message: str):
    with pytest.raises(sn.UserError, match=message):
        sn.certify(nn.Linear(3, 3), (3,), **options)


@pytest.mark.parametrize("steps", [-1, "a", None])
def test_wrong_steps_of_mlp_bound_are_told(steps):
    with pytest.raises(sn.UserError, match="steps must be a whole number from 0 up"):
        mlp_bound(nn.Linear(3, 3), (3,), steps=steps)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_model_that_keeps_a_history_is_told_to_be_run_without():
    model = nn.utils.weight_norm(nn.Linear(3, 3))
    with pytest.raises(sn.UserError, match=r"could not copy the model .*torch.no_grad"):
        sn.certify(model, (3,))

    with torch.no_grad():
        model(torch.zeros(1, 3))

    assert sn.certify(model, (3,)).upper_bound > 0


def test_weights_of_torchs_older_spectral_norm_are_those_of_eval_mode_in_training_too():
    model = nn.utils.spectral_norm(nn.Linear(3, 3))

    bounds = [sn.certify(model, (3,), mode=mode, ascent_steps=0).upper_bound for mode in ("eval", "train")]

    assert bounds[0] == bounds[1]


class _Clipped(nn.Module):
    def forward(self, inputs):
        return self.limit(inputs)

    def limit(self, inputs):
        return inputs.clamp(-1, 1)


sn.register_rule(_Clipped, lambda call: 1.0)


class _ByAnotherName(_Clipped):
    def __init__(self):
        super().__init__()


class _Steeper(_Clipped):
    def forward(self, inputs):
        return 10 * super().forward(inputs)


class _SteeperMethod(_Clipped):
    def limit(self, inputs):
        return 10 * super().limit(inputs)


class _Mixin:
    def forward(self, inputs):
        return 10 * inputs


class _Mixed(_Mixin, _Clipped):
    pass


def _replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda inputs: 10 * inputs
    return module


OF_OTHERS = {
    "subclass that changes nothing": (_ByAnotherName(), 1),
    "subclass with another forward": (_Steeper(), 10),
    "subclass with another method": (_SteeperMethod(), 10),
    "forward of a mixin": (_Mixed(), 10),
    "forward of the instance": (_replaced(_Clipped()), 10),
    "forward of an instance with a rule of this package": (_replaced(SLLLinear(4)), 10),
    "forward of a plain layer": (_replaced(nn.Linear(4, 4)), 10),
    "parametrized": (sn.spectral_norm(SLLLinear(4)), 1),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_rule_of_a_class_is_not_that_of_what_computes_something_else(name: str):
    module, constant = OF_OTHERS[name]

    certificate = sn.certify(nn.Sequential(module), (4,))

    assert certificate.upper_bound == pytest.approx(constant, rel=1e-12)
    assert 0 < certificate.lower_bound <= certificate.upper_bound


def test_registered_rule_is_used_and_checked():
    class Doubling(nn.Module):
        def forward(self, inputs):
            return torch.special.bessel_j0(inputs) + inputs

    class Broken(Doubling):
        pass

    sn.register_rule(Doubling, lambda call: 2.0)
    sn.register_rule(Broken, lambda call: -1.0)
    sn.register_rule(torch.special.bessel_j1, lambda call: 0.5)

    assert sn.certify(nn.Sequential(nn.Flatten(), Doubling()), (4,)).upper_bound == 2
    assert sn.certify(Lambda(torch.special.bessel_j1), (4,)).upper_bound == 0.5
    with pytest.raises(sn.UserError, match="must give a number from 0 up"):
        sn.certify(Broken(), (4,))
    with pytest.raises(sn.UserError, match="takes a torch function"):
        sn.register_rule(3, lambda call: 1.0)


def _hooked(layer: nn.Module) -> nn.Module:
    layer.activation.register_forward_hook(lambda module, inputs, outputs: 10 * outputs)
    return layer


def _hooked_before(layer: nn.Module) -> nn.Module:
    layer.activation.register_forward_pre_hook(lambda module, inputs: 10 * inputs[0])
    return layer


def _replaced_within(layer: nn.Module) -> nn.Module:
    layer.activation.forward = lambda inputs: 10 * inputs.relu()
    return layer


@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
@pytest.mark.parametrize("change", [_hooked, _hooked_before, _replaced_within])
def test_layer_within_which_something_was_replaced_is_looked_into(kind: type[nn.Module], change):
    layer = change(kind(1))
    nn.init.ones_(layer.weight)
    model = nn.Sequential(layer)
    quotient = (model(torch.ones(1, 1)) - model(torch.zeros(1, 1))).abs().item()

    assert quotient > 18
    assert sn.certify(model, (1,), ascent_steps=0).upper_bound >= quotient


class _Quotient(nn.Module):
    """A convolution divided by what has no rule."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, inputs):
        outputs = self.conv(inputs)
        return outputs / (1 + outputs.flatten(1).norm(dim=1))[:, None, None, None]


SIZED = {
    "given": {"strict": True, "input_size": (4, 4)},
    "learned": {"norm": "operator"},
}


@pytest.mark.parametrize("size", SIZED)
def test_rule_of_a_layer_holds_where_a_convolution_within_is_normalized_for_one_size(size: str):
    sn.register_rule(_Quotient, lambda call: 2.0)
    model = sn.add_spectral_norm(nn.Sequential(_Quotient()), **SIZED[size])
    model(torch.ones(1, 1, 4, 4))

    assert sn.certify(model, (1, 4, 4), ascent_steps=0).upper_bound == 2


def test_rule_of_a_layer_does_not_hold_where_a_convolution_within_has_yet_to_learn_its_size():
    class Halved(_Quotient):
        def forward(self, inputs):
            return self.conv(inputs) / 2

    sn.register_rule(Halved, lambda call: 7.0)
    model = sn.add_spectral_norm(nn.Sequential(Halved()), norm="operator")

    assert sn.certify(model, (1, 4, 4), ascent_steps=0).upper_bound < 1
    model(torch.ones(1, 1, 4, 4))
    assert sn.certify(model, (1, 4, 4), ascent_steps=0).upper_bound == 7


def test_layer_within_which_a_hook_for_all_modules_runs_is_looked_into():
    layer = SLLLinear(1)
    nn.init.ones_(layer.weight)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, outputs: 10 * outputs if isinstance(module, nn.ReLU) else outputs
    )
    try:
        assert sn.certify(nn.Sequential(layer), (1,), ascent_steps=0).upper_bound > 18
    finally:
        hook.remove()


class _Scaled(nn.Module):
    """Times a number, with a rule that reads it."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.weight = nn.Parameter(torch.ones(()))
        self.kept = None

    def forward(self, inputs):
        return inputs * self.scale * self.weight


sn.register_rule(_Scaled, lambda call: call.module.scale * call.module.weight.item())


class _Of(nn.Module):
    """A function of itself and the input, with a layer that has a rule."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = _Scaled()

    def forward(self, inputs):
        return self.function(self.layer, inputs)


def _before_its_use(layer: nn.Module, inputs: Tensor) -> Tensor:
    layer.scale = 5.0
    outputs = layer(inputs)
    layer.scale = 1.0
    return outputs


def _in_data_before_its_use(layer: nn.Module, inputs: Tensor) -> Tensor:
    layer.weight.data *= 5
    outputs = layer(inputs)
    layer.weight.data /= 5
    return outputs


def test_layer_with_a_rule_is_bounded_as_it_is_when_it_is_called():
    for function in (_before_its_use, _in_data_before_its_use):
        assert sn.certify(_Of(function), (3,), ascent_steps=0).upper_bound == 5


def _number_after_its_use(layer: nn.Module, inputs: Tensor) -> Tensor:
    outputs = layer(inputs)
    layer.scale *= 2
    return outputs


def _weight_after_its_use(layer: nn.Module, inputs: Tensor) -> Tensor:
    outputs = layer(inputs)
    layer.weight.data *= 2
    return outputs


def _forward_after_its_use(layer: nn.Module, inputs: Tensor) -> Tensor:
    outputs = layer(inputs)
    layer.forward = lambda inputs: 10 * inputs
    return outputs


def _keeps_a_value(layer: nn.Module, inputs: Tensor) -> Tensor:
    layer.kept = [inputs]
    return layer(inputs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_number_after_its_use, "_Scaled at 'layer'.*something else"),
        (_weight_after_its_use, "_Scaled at 'layer'.*something else"),
        (_forward_after_its_use, "_Scaled at 'layer'.*something else"),
        (_keeps_a_value, "layer 'layer': it keeps a tensor.*as an argument"),
    ],
)
def test_layer_with_a_rule_that_is_another_in_the_next_call_is_refused(function, message: str):
    with pytest.raises(sn.UserError, match=message):
        sn.certify(_Of(function), (3,), ascent_steps=0)
