"""Kernels in place of torch's operations: in C on the CPU; Triton's on the GPU, or in its interpreter."""

import copy
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectralnorm as sn
from spectralnorm.linalg import tracking
from spectralnorm.parametrizations import by_kernels, engine
from spectralnorm.parametrizations.by_kernels import ByKernels
from spectralnorm.transform import load_tracking_state, tracking_state

pytest.importorskip("triton")
from spectralnorm.linalg import cpu, cuda, kernel_trial
from spectralnorm.linalg.cpu import compiled
from spectralnorm.linalg.cuda import launch as launching
from spectralnorm.linalg.cuda import quotients, storing
from spectralnorm.linalg.cuda import tracking as kernels_of_tracking


class Mixed(nn.Module):
    """Layers of most kinds, with sizes that share no alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.same = nn.Linear(12, 10)
        self.narrow = nn.Linear(10, 3)
        self.convolution = nn.Conv2d(3, 9, 3, padding=1)
        self.grouped = nn.Conv2d(9, 6, 3, groups=3, padding=1)
        self.transposed = nn.ConvTranspose2d(6, 10, 3, padding=1)
        self.grouped_transposed = nn.ConvTranspose2d(10, 12, 3, groups=2)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :3, None, None] * torch.linspace(-1, 1, 16, device=x.device).view(1, 1, 4, 4)
        image = self.transposed(self.grouped(self.convolution(image).tanh()).tanh()).tanh()
        image = self.last(self.grouped_transposed(image).tanh()).mean((1, 2, 3))
        return self.narrow(self.linear(x) + self.same(x).tanh()).sum(1) + image


COMPILED, TRITON = "compiled", "triton"


@pytest.fixture(params=[COMPILED, TRITON])
def with_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    kind = request.param
    if kind == COMPILED and (device.type != "cpu" or not cpu.is_trusted()):
        pytest.skip("the compiled kernels need a CPU and a C compiler")
    if kind == TRITON and device.type == "cpu":
        kernels = by_kernels._kernels_for(torch.device("cuda"))
        monkeypatch.setattr(by_kernels, "are_usable", lambda weight: True)
        monkeypatch.setattr(by_kernels, "_kernels_for", lambda device: kernels)
        monkeypatch.setitem(by_kernels._DTYPES, "cpu", by_kernels._DTYPES["cuda"])
        monkeypatch.setattr(by_kernels, "_plans", OrderedDict())
    return kind


def forget_kernels() -> None:
    for remembered in (compiled.is_trusted, compiled.kernels, compiled._place):
        remembered.cache_clear()


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    forget_kernels()
    yield
    forget_kernels()


def without_kernels(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(by_kernels, "are_usable", lambda weight: False)
    if kind == COMPILED:
        return
    # On the CPU all rows of a frame are put in order; the kernels, as torch on a GPU, settle the first.
    monkeypatch.setattr(tracking, "_ritz_rotation", tracking._ritz_reflection)


def normalizations(model: nn.Module) -> dict[str, sn.SpectralNorm]:
    return {name: each for name, each in model.named_modules() if isinstance(each, sn.SpectralNorm)}


def are_kept_by_kernels(model: nn.Module) -> list[bool]:
    found = normalizations(model).values()
    return [each._kept is not None and isinstance(each._kept.followed, ByKernels) for each in found]


def trained(model: nn.Module, steps: int, device: torch.device, lr: float = 0.02) -> list[dict[str, Tensor]]:
    """What a model hands out, its gradients and buffers after each step of training on the same numbers."""
    torch.manual_seed(1)
    inputs = torch.randn(steps, 2, 7, 12, dtype=torch.float32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    seen = []
    for real, fake in inputs:
        optimizer.zero_grad()
        (model(real).sigmoid().sum() + model(fake).square().mean()).backward()
        of_step = {
            f"grad {name}": each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }
        of_step |= {f"buffer {name}": each.clone() for name, each in model.named_buffers()}
        of_step |= {f"value {name}": layer.weight.detach().clone() for name, layer in _layers(model).items()}
        seen.append({name: each.float() for name, each in of_step.items()})
        optimizer.step()
    return seen


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in model.named_modules() if isinstance(getattr(each, "weight", None), Tensor)}


def assert_equal_runs(
    mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float, of_vectors: float
) -> None:
    assert mine
    for step, (of_mine, of_theirs) in enumerate(zip(mine, theirs, strict=True)):
        assert of_mine.keys() == of_theirs.keys()
        for name, each in of_mine.items():
            if name.startswith("buffer"):  # singular vectors are those up to a sign
                each = each * (1 if float((each * of_theirs[name]).sum()) > 0 else -1)
            scale = float(of_theirs[name].abs().max())
            difference = float((each - of_theirs[name]).abs().max())
            allowed = of_vectors if name.startswith("buffer") else tolerance
            assert difference <= allowed * max(scale, 1e-3), f"{name} at step {step}: {difference} of {scale}"


@pytest.mark.usefixtures("whole_float32")
@pytest.mark.parametrize("mode", ["normalize", "cap"])
def test_training_gives_the_numbers_of_the_plain_engine(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = Mixed().to(device)
    model.convolution.to(memory_format=torch.channels_last)
    coefficient = {"linear": 0.5, "last": 3.0} if mode == "normalize" else 0.7
    sn.add_spectral_norm(model, mode=mode, coefficient=coefficient)
    plain = copy.deepcopy(model)
    steps = 3 if mode == "normalize" else 2
    mine = trained(model, steps, device)
    assert all(are_kept_by_kernels(model))
    without_kernels(monkeypatch, with_kernels)
    theirs = trained(plain, steps, device)
    assert not any(are_kept_by_kernels(plain))
    # The plain engine's small algebra is in single precision, the compiled one's in double: a vector is known to the
    # rounding divided by the gap to the next value. Triton's does as the engine.
    assert_equal_runs(mine, theirs, 2e-4, of_vectors=2e-3 if with_kernels == COMPILED else 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)
def test_half_types_are_followed_in_float32(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 1))).to(device, dtype)
    plain = copy.deepcopy(model)
    x = torch.randn(7, 12, device=device, dtype=dtype)
    found = []
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).sum().backward()
            optimizer.step()
        found.append([each[0].weight, each[2].weight, normalizations(each)["0.parametrizations.weight.0"]._u])
        assert all(are_kept_by_kernels(each)) is (each is model)
        without_kernels(monkeypatch, with_kernels)
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["normalize", "cap"])
@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
def test_strict_weights_are_renewed_among_others_as_by_the_plain_engine(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = Mixed().to(device)
    sn.add_spectral_norm(model, include=["linear", "narrow", "convolution", "last"], strict=True, mode=mode)
    sn.add_spectral_norm(model, include=["transposed", "grouped"], strict=True, input_size=(4, 4), coefficient=2.0)
    sn.add_spectral_norm(model, include=["same", "grouped_transposed"], mode=mode, coefficient=0.7)
    plain = copy.deepcopy(model)
    mine = trained(model, 4, device)
    assert all(are_kept_by_kernels(model))
    uppers = [each.sigma_upper(_raw_weight(model, name)) for name, each in _strict(model)]
    without_kernels(monkeypatch, with_kernels)
    theirs = trained(plain, 4, device)
    assert not any(are_kept_by_kernels(plain))
    assert_equal_runs(mine, theirs, 5e-4, of_vectors=2e-3)
    assert len(uppers) == 6
    for mine_upper, (name, its) in zip(uppers, _strict(plain), strict=True):
        assert float(mine_upper) == pytest.approx(float(its.sigma_upper(_raw_weight(plain, name))), rel=1e-3)
    # Second derivatives are those of the bound.
    x = torch.randn(3, 12, device=device)
    for each in (model, plain):
        each.zero_grad()
        (slope,) = torch.autograd.grad(each(x.requires_grad_()).sum(), x, create_graph=True)
        slope.square().sum().backward()
    for (name, mine_parameter), its in zip(model.named_parameters(), plain.parameters(), strict=True):
        if its.grad is not None:
            scale = float(its.grad.abs().max()) + 1e-6
            assert float((mine_parameter.grad - its.grad).abs().max()) <= 2e-3 * scale, name


def _strict(model: nn.Module) -> list[tuple[str, sn.SpectralNorm]]:
    return [(name, each) for name, each in normalizations(model).items() if each.strict]


def _raw_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name.split(".")[0]).parametrizations.weight.original


@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
@pytest.mark.usefixtures("with_kernels")
def test_the_graph_of_a_strict_value_keeps_what_it_was_divided_by(device: torch.device) -> None:
    layer = sn.spectral_norm(nn.Linear(9, 7, bias=False), strict=True).to(device)
    raw = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD([raw], lr=1.0)
    x, direction = torch.randn(4, 9, device=device), torch.randn(7, 9, device=device)
    layer(x).sum().backward()
    optimizer.step()
    value = layer.weight
    expected, _ = torch.autograd.grad(value, raw, direction, retain_graph=True)[0], raw.grad.fill_(0.3)
    optimizer.step()
    layer(x).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, value)
    assert torch.equal(torch.autograd.grad(value, raw, direction)[0], expected)


@pytest.mark.parametrize("with_kernels", [COMPILED], indirect=True)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.usefixtures("with_kernels")
def test_a_strict_weight_without_a_norm_leaves_the_others_alone_and_recovers(bad: float, device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(3)), strict=True).to(device)
    x = torch.randn(4, 9, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sum(layer(x).sum() for layer in model).backward()
    weights = [layer.parametrizations.weight.original for layer in model]
    for weight in weights:
        weight.grad.zero_()
    weights[1].grad = weights[1].detach().clone() if bad == 0 else torch.full_like(weights[1], bad)
    optimizer.step()
    for layer in (model[0], model[2]):
        assert 0.999 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) <= 1
        assert layer(x).isfinite().all()
    if bad == 0:
        assert not model[1].weight.any()
    with torch.no_grad():
        weights[1].normal_()
    optimizer.zero_grad()
    sum(layer(x).sum() for layer in model).backward()
    optimizer.step()
    for layer in model:
        assert 0.999 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) <= 1


def test_what_the_kernels_cannot_read_goes_the_plain_way_beside_them(device: torch.device, with_kernels: str) -> None:
    model = Mixed().to(device)
    sn.add_spectral_norm(model, include=["linear", "narrow"])
    sn.add_spectral_norm(model, include=["same"], norm="bidirectional")
    sn.add_spectral_norm(model, include=["convolution"], strict=True)
    sn.add_spectral_norm(model, include=["last"], norm="operator", input_size=(6, 6))
    trained(model, 3, device)
    found = dict(zip(normalizations(model), are_kept_by_kernels(model), strict=True))
    # Triton's kernels leave strict weights to the engine.
    strict = {"convolution"} if with_kernels == COMPILED else set()
    assert {name.split(".")[0] for name, is_by_kernels in found.items() if is_by_kernels} == {
        "linear",
        "narrow",
    } | strict
    assert {name.split(".")[0] for name, is_by in found.items() if not is_by} == {
        "same",
        "convolution",
        "last",
    } - strict
    for name in ("linear", "narrow", "same"):
        norm = torch.linalg.matrix_norm(getattr(model, name).weight, 2)
        assert abs(float(norm.detach()) - 1) < 0.1


@pytest.mark.usefixtures("with_kernels")
def test_a_zero_and_a_nan_weight_leave_the_others_and_their_buffers_alone(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(3))).to(device)
    x = torch.randn(4, 9, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(grads: list[Tensor]) -> None:
        for layer, grad in zip(model, grads, strict=True):
            layer.parametrizations.weight.original.grad = grad
        optimizer.step()

    weights = [layer.parametrizations.weight.original for layer in model]
    sum(layer(x).sum() for layer in model).backward()
    before = [layer.parametrizations.weight[0]._u.clone() for layer in model]
    step([weights[0].detach().clone(), torch.full_like(weights[1], torch.nan), torch.zeros_like(weights[2])])
    sum(layer(x).sum() for layer in model).backward()
    after = [layer.parametrizations.weight[0]._u for layer in model]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(model[0].weight, torch.zeros_like(weights[0]))
    assert abs(float(torch.linalg.matrix_norm(model[2].weight.detach(), 2)) - 1) < 1e-3
    assert weights[0].grad.isfinite().all()
    # They recover.
    with torch.no_grad():
        weights[0].normal_()
        weights[1].normal_()
    for layer in model:
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 1e-3


def test_a_backward_through_some_of_the_layers_gives_their_gradients_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, with_kernels: str
) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10, bias=False) for _ in range(4))).to(device)
    plain, x = copy.deepcopy(model), torch.randn(4, 9, device=device)
    gradients = []
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        sum(layer(x).square().sum() for layer in each).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in each:
            layer(x)
        (each[1](x).square().sum() + each[3](x).square().sum()).backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
        without_kernels(monkeypatch, with_kernels)
    assert gradients[0][0] is gradients[0][2] is None
    for place in (1, 3):
        torch.testing.assert_close(gradients[0][place], gradients[1][place], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("with_kernels")
def test_weights_are_found_at_once_again_after_others_came_and_went(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    sn.add_spectral_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(5):
        model(torch.ones(1, 4, device=device)).sum().backward()
        if step == 2:
            copy.deepcopy(model)
        optimizer.step()
        kept = model[0].parametrizations["weight"][0]._kept
        if isinstance(kept.followed, ByKernels):
            found.append(kept.followed.stepped_together(kept.moment.clock.last_step) is not None)
    assert found == [True, False, True, True]


@pytest.mark.usefixtures("with_kernels")
def test_buffers_are_written_after_a_backward_in_eval_mode(device: torch.device) -> None:
    model = nn.ModuleList([nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(9, 10)])
    sn.add_spectral_norm(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.eval()
        sum(layer.weight.square().sum() for layer in model).backward()
        model.train()
        for layer in model:
            normalization, weight = layer.parametrizations.weight[0], layer.weight.detach()
            u, v = normalization._u, normalization._v
            torch.testing.assert_close(u @ normalization.view.whole_matrix(weight) @ v, torch.ones((), device=device))
        optimizer.step()


@pytest.mark.usefixtures("with_kernels")
def test_second_derivatives_and_separate_backwards_work(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 1))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        real = torch.randn(4, 9, device=device, requires_grad=True)
        score = model(real).sum()
        (slope,) = torch.autograd.grad(score, real, create_graph=True)
        slope.square().sum().backward(retain_graph=True)
        first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert sum(float(each.abs().sum()) for each in first) > 0
        score.backward()
        model(torch.randn(4, 9, device=device)).sum().backward()
        optimizer.step()
    assert all(are_kept_by_kernels(model))


@pytest.mark.usefixtures("with_kernels")
def test_values_are_written_over_only_when_nobody_holds_them(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(2))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 9, device=device)

    def step() -> None:
        optimizer.zero_grad()
        sum(layer(x).sum() for layer in model).backward()
        optimizer.step()

    step()
    step()
    held = model[0].weight.detach()
    copied, address = held.clone(), model[1].weight.data_ptr()
    step()
    step()
    assert torch.equal(held, copied)
    assert model[0].weight.data_ptr() != held.data_ptr()
    assert model[1].weight.data_ptr() == address


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)
@pytest.mark.parametrize("number", [2, 5])
def test_launches_of_a_step_do_not_depend_on_the_number_of_layers(
    number: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Linear(9 + index % 3, 10, bias=False) for index in range(number)]
    model = sn.add_spectral_norm(nn.ModuleList([*layers, nn.Conv2d(4, 6, 3, groups=2, bias=False)])).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 4, 3, 3, device=device)
    launches: list[str] = []

    def counted(kernel, *arguments, **options):
        launches.append(kernel.fn.__name__)
        return launch(kernel, *arguments, **options)

    launch = launching.launch
    for module in (quotients, storing, kernels_of_tracking):
        monkeypatch.setattr(module, "launch", counted)
    for _ in range(3):
        launches.clear()
        optimizer.zero_grad()
        sum(layer.weight.square().sum() for layer in model[:-1]).add(model[-1](images).sum()).backward()
        optimizer.step()
    assert len(launches) == len(set(launches)) == 7  # with those of the backward


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("with_kernels", [TRITON], indirect=True)
class TestUnderAutocast:
    """To float16, to which the interpreter rounds as a GPU does."""

    def test_training_is_that_of_the_plain_engine(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).to(device)
        runs, num_steps = [], 4
        for is_plain in (False, True):
            if is_plain:
                without_kernels(monkeypatch, TRITON)
            model = sn.add_spectral_norm(copy.deepcopy(plain))
            forward = model.forward
            model.forward = lambda x, forward=forward: _under_autocast(forward, x).float().sum(1)
            runs.append(trained(model, num_steps, device))
        # Torch rounds the sum of two gradients and the kernels do not: at each step an entry of float16 may come out a
        # unit further. Vectors stay in float32.
        unit = torch.finfo(torch.float16).eps
        assert_equal_runs(*runs, tolerance=num_steps * unit, of_vectors=unit)

    def test_values_are_rounded_once_and_from_then_on_with_the_division(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rounded_apart = []
        copied = torch._foreach_copy_
        monkeypatch.setattr(torch, "_foreach_copy_", lambda to, _: rounded_apart.append(to[0].dtype) or copied(to, _))
        x = torch.randn(3, 12, device=device)
        model(x).sum().backward()
        optimizer.step()
        for _ in range(3):
            optimizer.zero_grad()
            outputs = [_under_autocast(lambda each: each.weight, layer) for layer in (*model, *model)]
            for output, layer in zip(outputs, (*model, *model), strict=True):
                assert output.dtype == torch.float16
                assert torch.equal(output, layer.weight.half())
                assert layer.parametrizations.weight[0]._kept.rounded.outputs is not None  # rounded with the others
            sum(_under_autocast(model, x).float().square().sum() for _ in range(3)).backward()
            assert all(layer.parametrizations.weight.original.grad.dtype == torch.float32 for layer in model)
            optimizer.step()
        assert rounded_apart.count(torch.float16) == 1
        held = _under_autocast(lambda each: each.weight, model[0])
        before = held.clone()
        optimizer.step()
        assert not torch.equal(_under_autocast(lambda each: each.weight, model[0]), before)
        assert torch.equal(held, before)

    def test_a_write_into_a_rounded_value_becomes_the_weight(self, device: torch.device) -> None:
        model = sn.add_spectral_norm(nn.Sequential(nn.Linear(6, 5))).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(3, 6, device=device)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                _under_autocast(lambda each: each.weight, model[0]).copy_(torch.full((5, 6), 2.0))
            torch.testing.assert_close(model[0].weight, torch.full((5, 6), 1 / 30**0.5, device=device))


def _under_autocast(function, argument):
    device = next(argument.parameters()).device if isinstance(argument, nn.Module) else argument.device
    with torch.autocast(device.type, torch.float16):
        return function(argument)


@pytest.mark.usefixtures("with_kernels")
def test_an_interrupted_renewal_is_made_up_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sn.add_spectral_norm(nn.ModuleList(nn.Linear(9, 10) for _ in range(2))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sum(layer.weight.square().sum() for layer in model).backward()
        optimizer.step()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_kernels, "Division", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = model[0].weight
    for layer in model:
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 1e-3


@pytest.mark.usefixtures("with_kernels")
def test_another_coefficient_and_other_layers_are_followed_from_what_is_known(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 12, device=device)
    for coefficient in (1.0, 2.0, 2.0, 0.5):
        sn.add_spectral_norm(model, coefficient=coefficient)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        for layer in model:
            norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
            assert abs(float(norm.detach()) / coefficient - 1) < 1e-2
        assert all(are_kept_by_kernels(model))
    # One layer's weight is written by hand: it is found anew, and the others go on.
    with torch.no_grad():
        model[0].parametrizations.weight.original.normal_()
    assert abs(float(torch.linalg.matrix_norm(model[0].weight, 2)) / 0.5 - 1) < 1e-3
    copied = copy.deepcopy(model)
    assert torch.equal(copied[1].weight, model[1].weight)


@pytest.mark.usefixtures("with_kernels")
def test_a_restored_model_and_a_copy_go_on_to_the_last_bit(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    trained(model, 3, device)
    weights, tracked = copy.deepcopy(model.state_dict()), tracking_state(model)
    restored = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    restored.load_state_dict(weights)
    load_tracking_state(restored, {name: part.clone() for name, part in tracked.items()})
    copied = copy.deepcopy(model)
    first, *others = (trained(each, 2, device) for each in (model, restored, copied))
    for other in others:
        for of_first, of_other in zip(first, other, strict=True):
            for name, each in of_first.items():
                assert torch.equal(each, of_other[name]), name


@pytest.mark.usefixtures("with_kernels")
def test_a_copy_keeps_its_gradient_when_the_original_goes_on(device: torch.device) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 1))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(4, 9, device=device)

    def gradients(of: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(of(x).square().sum(), list(of.parameters())))

    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    before = gradients(model)
    copied = copy.deepcopy(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model(x)
    for mine, its in zip(gradients(copied), before, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_with_torch(dtype: torch.dtype, device: torch.device) -> None:
    plans = kernels_of_tracking.TrackingPlan, quotients.QuotientPlan
    assert kernel_trial.disagreement(*plans, device, dtype) is None


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("result", ["norm", "quotient", "gradient"])
@pytest.mark.usefixtures("with_kernels")
def test_kernels_that_compute_something_else_are_found_out(
    result: str, factor: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = by_kernels._kernels_for(device)
    track = kernel_trial.track_together

    class Wrong(plans.QuotientPlan):
        def divide(self, *arguments):
            found = super().divide(*arguments)
            return found._replace(values=[each * factor for each in found.values]) if result == "quotient" else found

        def gradients(self, *arguments):
            found = super().gradients(*arguments)
            return [each * factor for each in found] if result == "gradient" else found

    if result == "norm":
        # The reference in place of the kernels: what counts is that they differ.
        monkeypatch.setattr(
            kernel_trial,
            "track_together",
            lambda *a, **k: [each._replace(sigma=each.sigma * factor) for each in track(*a, **k)],
        )
    found = kernel_trial.disagreement(plans.TrackingPlan, Wrong, device)
    assert found == f"the {result} of a 24 x 136 matrix differs"


@pytest.mark.usefixtures("with_kernels")
def test_weights_with_nodes_of_their_own_get_the_same_gradients(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).to(device))
    alone = copy.deepcopy(model)
    together = trained(model, 3, device)
    nodes = []
    apply = engine.NormalizedWeights.apply
    monkeypatch.setattr(
        engine.NormalizedWeights, "apply", lambda quotients, *w: nodes.append(len(w)) or apply(quotients, *w)
    )
    monkeypatch.setattr(engine, "_sends_gradients", lambda: True)
    monkeypatch.setattr(engine, "_SMALL", 0)
    for mine, its in zip(together, trained(alone, 3, device), strict=True):
        for name, each in mine.items():
            assert torch.equal(each, its[name]), name
    assert set(nodes) == {1}


def test_kernels_that_fail_are_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> str:
        raise OSError("no compiler")

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_trial, "disagreement", refuse)
    pretended = torch.device("cuda", 7), torch.float32  # of which nothing is remembered
    cuda.is_trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"float32 on cuda:7 \(OSError: no compiler\).*SPECTRALNORM_TRITON=0"):
        assert not cuda.is_trusted(*pretended)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda.is_trusted(*pretended)
        cuda.is_trusted.cache_clear()
        monkeypatch.setenv("SPECTRALNORM_TRITON", "0")
        assert not cuda.is_trusted(*pretended)
    cuda.is_trusted.cache_clear()


def test_without_a_compiler_torch_does_the_work_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.is_trusted()
        model = sn.add_spectral_norm(nn.Linear(12, 10))
        trained_alone = trained(nn.Sequential(model, nn.Flatten(0)), 2, torch.device("cpu"))
    assert trained_alone
    assert not any(are_kept_by_kernels(model))


@pytest.mark.parametrize("script", ["exit 3", "echo 'no such target' >&2; exit 1", "touch $7"])
def test_a_compiler_that_fails_is_told_once(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done\n{script}\n'.replace("$7", "$out")
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.warns(RuntimeWarning, match=r"compiled kernels.*SPECTRALNORM_C=0"):
        assert not cpu.is_trusted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.is_trusted()
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "kernels").iterdir())


def test_the_library_is_compiled_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path))
    if not cpu.is_trusted():
        pytest.skip("there is no C compiler")
    (made,) = (tmp_path / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    forget_kernels()
    monkeypatch.setenv("CC", "/bin/false")  # nobody asks it
    assert cpu.is_trusted()
    assert made.stat().st_mtime_ns == before


def test_the_switch_turns_the_compiled_kernels_off(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setenv("SPECTRALNORM_C", "0")
    assert not cpu.is_trusted()


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    if not cpu.is_trusted():
        pytest.skip("there is no C compiler")
    forget_kernels()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert cpu.is_trusted()
    assert not list((tmp_path / "temporary").iterdir())  # it is loaded, and nothing is left behind


@pytest.mark.skipif(not cpu.is_trusted(), reason="there is no C compiler")
def test_other_defaults_of_torch_change_nothing(fresh_kernels: None) -> None:
    models = [nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 300), nn.Linear(300, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    device = torch.device("cpu")
    usual = trained(sn.add_spectral_norm(models[0]), 3, device)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as the default
            forget_kernels()
            assert cpu.is_trusted()
        model = sn.add_spectral_norm(models[1])
        unusual = trained(model, 3, device)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(are_kept_by_kernels(model))
    for mine, its in zip(unusual, usual, strict=True):
        for name, each in mine.items():
            assert torch.equal(each.float(), its[name]), name
