"""Writes through ``.data``, as averages, target networks and updates by hand are often written."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spectralnorm as sn
from spectralnorm import spectral_norm
from spectralnorm.parametrizations import kept, same_numbers, unseen_writes


def by_parameters(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    def update() -> None:
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.data.copy_(0.5 * slow.data + 0.5 * fast.data)

    return update


def by_parameters_that_are_held(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))

    def update() -> None:
        for slow, fast in pairs:
            slow.data.lerp_(fast.data, 0.5)

    return update


def by_state_dicts_that_are_held(average: nn.Module, model: nn.Module) -> Callable[[], None]:
    slow, fast = average.state_dict(), model.state_dict()

    def update() -> None:
        for name, tensor in slow.items():
            tensor.data.copy_(0.5 * tensor.data + 0.5 * fast[name].data)

    return update


WAYS = {way.__name__: way for way in (by_parameters, by_parameters_that_are_held, by_state_dicts_that_are_held)}
OPTIONS = {
    "default": {},
    "cap": {"mode": "cap", "coefficient": 0.7},
    "strict": {"strict": True},
    "bidirectional": {"norm": "bidirectional"},
    "operator": {"norm": "operator", "input_size": (8, 8)},
    "learnable": {"mode": "learnable", "coefficient": 2.0},
}


def a_network(**options: object) -> nn.Sequential:
    linear = {name: value for name, value in options.items() if name != "input_size"}
    first, last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 5)
    sn.add_spectral_norm(nn.Sequential(first), **options)
    sn.add_spectral_norm(nn.Sequential(last), **linear)
    return nn.Sequential(first, nn.LeakyReLU(0.1), nn.Flatten(), last)


def expected(model: nn.Module, images: Tensor) -> Tensor:
    """What a network computes that knows nothing but the model's weights, without a use of the model."""
    fresh = pickle.loads(pickle.dumps(model))
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()(images)


@pytest.fixture
def images(device) -> Tensor:
    return torch.randn(2, 3, 8, 8, device=device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_average_is_normalized_as_it_is(way, options, images, device):
    model = a_network(**options).to(device)
    model(images)
    average = copy.deepcopy(model).eval()
    update, before = way(average, model), average(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(images).sum().backward()
        optimizer.step()
        update()
        found = average(images)
        assert not torch.allclose(found, before, rtol=1e-2)
        torch.testing.assert_close(found, expected(average, images), rtol=1e-3, atol=1e-4)
        before = found


def added(parameter: nn.Parameter, step: Tensor) -> None:
    parameter.data.add_(step)


def added_by_operator(parameter: nn.Parameter, step: Tensor) -> None:
    parameter.data += step


def copied(parameter: nn.Parameter, step: Tensor) -> None:
    parameter.data.copy_(parameter.data + step)


def update_by_hand(model: nn.Module, images: Tensor, *, rate: float = 0.3, write=added) -> None:
    model(images).square().mean().backward()
    for parameter in model.parameters():
        write(parameter, -rate * parameter.grad)
        parameter.grad = None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("write", [added, added_by_operator, copied])
def test_a_model_that_is_updated_by_hand_is_normalized_as_it_is(write, options, images, device):
    model = a_network(**options).to(device)
    before = model(images)
    for _ in range(50):  # so many uses that nobody takes a write for an initialization any more
        model(images)
    for _ in range(3):
        update_by_hand(model, images, rate=10.0, write=write)
        found = model(images)
        assert not torch.allclose(found, before, rtol=1e-2)
        torch.testing.assert_close(found, expected(model, images), rtol=1e-3, atol=1e-4)
        before = found


def test_a_model_that_is_updated_by_hand_is_followed_where_comparing_takes_long(images, device, monkeypatch):
    monkeypatch.setattr(unseen_writes, "host_has", lambda _: False)
    model = a_network().to(device)
    for _ in range(20):
        update_by_hand(model, images)
        torch.testing.assert_close(model(images), expected(model, images), rtol=1e-3, atol=1e-4)


def test_the_gradient_is_that_of_the_weight_that_was_written(images, device):
    model = a_network().to(device)
    for _ in range(3):
        update_by_hand(model, images)
    fresh = pickle.loads(pickle.dumps(model))
    for each in (model, fresh):
        each(images).square().mean().backward()
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_search_along_the_gradient_is_seen():
    """Not on a GPU, which would have to be waited for."""
    model, images = a_network(), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(model(images).square().mean(), parameters)
        with torch.no_grad():
            for _ in range(3):
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.data.sub_(grad)
                torch.testing.assert_close(model(images), expected(model, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_features", [28 * 28, 256, 6])
def test_an_update_of_some_columns_is_seen(num_features, device):
    """Features that are zero in all inputs, as at the margin of images, leave their columns as they were."""
    layer = spectral_norm(nn.Linear(num_features, 256).to(device), mode="cap", coefficient=100.0)
    inputs = torch.ones(4, num_features, device=device)
    inputs[:, : num_features // 2] = 0
    layer(inputs).sum().backward()
    raw = layer.parametrizations.weight.original
    raw.data.sub_(raw.grad, alpha=1e-3)
    assert torch.equal(layer.weight, raw)


def initialized(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)


def clipped(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def loaded(model: nn.Module) -> None:
    own = model.state_dict()
    for name, tensor in own.items():
        own[name].data.copy_(torch.randn_like(tensor))


@pytest.mark.parametrize("is_used", [True, False], ids=["used", "new"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("write", [initialized, clipped, loaded])
def test_what_is_written_where_parameters_were_asked_for_is_seen(write, options, is_used, images, device):
    model = a_network(**options).to(device).eval()
    if is_used:
        model(images)
    write(model)
    torch.testing.assert_close(model(images), expected(model, images), rtol=1e-3, atol=1e-4)


class Extrapolating(torch.optim.SGD):
    """The extragradient method, as it is often written (Gidel et al. 2019, algorithm 2)."""

    saved: list[Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def extrapolation(self) -> None:
        self.saved = [parameter.data.clone() for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.3)

    def step(self, closure=None):
        for parameter, saved in zip(self.parameters(), self.saved, strict=True):
            parameter.data.copy_(saved)
        return super().step(closure)


def test_extrapolated_weights_are_normalized_as_they_are(images, device):
    model = a_network().to(device)
    optimizer = Extrapolating(model.parameters(), lr=0.3)
    for _ in range(4):
        for update in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            update()
            torch.testing.assert_close(model(images), expected(model, images), rtol=1e-2, atol=1e-3)


@pytest.fixture(params=["quickly", "slowly"])
def is_compared(request, monkeypatch) -> str:
    """As on a CPU, and as on a GPU, which has to be waited for."""
    if request.param == "slowly":
        monkeypatch.setattr(unseen_writes, "host_has", lambda _: False)
    return request.param


@pytest.mark.usefixtures("engine_or_kernels", "is_compared")
@pytest.mark.parametrize("calls_eval", [True, False])
def test_averaged_weights_that_are_swapped_in_are_normalized_as_they_are(calls_eval, images, device):
    model = a_network().to(device)
    parameters = list(model.parameters())
    averages = [parameter.data.clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.data, 0.1)
        trained = model(images)
        backup = [parameter.data.clone() for parameter in parameters]
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.data.copy_(average)
        model.train(not calls_eval)
        with torch.no_grad():
            found, wanted = model(images), expected(model, images)
        assert not torch.allclose(found, trained, rtol=1e-2)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
        for parameter, saved in zip(parameters, backup, strict=True):
            parameter.data.copy_(saved)
        model.train()
        torch.testing.assert_close(model(images), expected(model, images), rtol=1e-2, atol=1e-3)


def test_weights_that_are_swapped_in_for_evaluation_are_normalized_as_they_are(images, device):
    model = a_network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(images).square().sum().backward()
    optimizer.step()
    with torch.no_grad():  # all uses, so that the mode alone tells
        for mode in (False, True, False):
            before = model(images)
            for parameter in model.parameters():
                parameter.data.add_(0.3)
            found = model.train(mode)(images)
            assert not torch.allclose(found, before, rtol=1e-2)
            torch.testing.assert_close(found, expected(model, images), rtol=1e-3, atol=1e-4)


def test_what_is_written_into_a_value_does_not_last(device):
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.sum().backward()
    optimizer.step()
    layer.weight.data.clamp_(-0.01, 0.01)
    layer.eval()
    with torch.no_grad():
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-4)


LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "channels last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "large": lambda: nn.Linear(300, 200),
    "not dense": lambda: _with(nn.Linear(12, 8), torch.randn(8, 24)[:, ::2]),
    "zero": lambda: _with(nn.Linear(12, 8), torch.zeros(8, 12)),
    "not finite": lambda: _with(nn.Linear(12, 8), torch.full((8, 12), torch.nan)),
    "infinite": lambda: _with(nn.Linear(12, 8), torch.full((8, 12), torch.inf)),
    "tiny": lambda: _with(nn.Linear(12, 8), 1e-36 * torch.randn(8, 12)),
    "complex": lambda: _with(nn.Linear(12, 8), torch.randn(8, 12, dtype=torch.complex64)),
    "float64": lambda: nn.Linear(12, 8).double(),
    "bfloat16": lambda: nn.Linear(12, 8).bfloat16(),
    "float16": lambda: nn.Linear(12, 8).half(),
}


def _with(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.fixture
def comparisons(monkeypatch) -> list[bool]:
    """What comes of each comparison of a value with its weight."""
    made: list[bool] = []

    def noted(*arguments) -> bool:
        made.append(same_numbers.is_quotient(*arguments))
        return made[-1]

    monkeypatch.setattr(kept, "is_quotient", noted)
    return made


def steps(number: int) -> None:
    """Steps of an optimizer of something else."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(1)
    for _ in range(number):
        optimizer.step()


@pytest.mark.usefixtures("engine_or_kernels")
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_small_change_of_a_weight_of_any_size_is_seen(dtype, size, device):
    layer = nn.Linear(14, 12, bias=False).to(device)
    with torch.no_grad():
        layer.weight.mul_(size)
    layer = spectral_norm(layer.to(dtype))
    for _ in range(40):
        layer.weight  # noqa: B018 - a use
    raw = layer.parametrizations.weight.original
    raw.data.add_(1e-4 * size * torch.randn(12, 14, generator=torch.Generator().manual_seed(0)).to(raw))
    steps(1)
    value = raw.detach().double() / torch.linalg.matrix_norm(raw.detach().double(), 2)
    tolerance = 1e-4 + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight.detach().double(), value, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_no_write_is_found_where_there_was_none(make, options, comparisons, device):
    layer = make().to(device)
    is_convolution = isinstance(layer, nn.modules.conv._ConvNd)
    options = {name: value for name, value in options.items() if name != "input_size" or is_convolution}
    if layer.weight.is_complex() and ("strict" in options or options.get("norm") == "bidirectional"):
        pytest.skip("not offered for complex weights")
    sn.add_spectral_norm(nn.Sequential(layer), **options)
    for _ in range(2):
        steps(1)
        address = layer.weight.data_ptr()
        steps(1)
        assert layer.weight.data_ptr() == address or "learnable" in options.values()
    assert len(comparisons) >= 2
    assert all(comparisons)
    weight = layer.parametrizations.weight.original
    if weight.isfinite().all() and weight.any():
        weight.data.mul_(1.2)
        steps(1)
        layer.weight  # noqa: B018 - a use
        assert not all(comparisons)


def test_another_view_of_the_same_memory_is_seen(device):
    layer = spectral_norm(nn.Linear(30, 30).to(device))
    layer.weight.sum().backward()
    raw = layer.parametrizations.weight.original
    raw.data = raw.data.T
    expected = raw.detach() / torch.linalg.matrix_norm(raw.detach(), 2)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-5)


def test_a_part_of_the_weight_in_its_place_is_refused(device):
    layer = spectral_norm(nn.Linear(30, 30).to(device))
    layer.weight.sum().backward()
    raw = layer.parametrizations.weight.original
    raw.data = raw.data[:20]
    with pytest.raises(sn.UserError, match="should have 900 entries, but 600 are here"):
        layer.weight  # noqa: B018


def test_what_optimizers_move_is_compared_as_well(comparisons, device):
    model = a_network(mode="cap", coefficient=0.3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        comparisons.clear()
        for _ in range(2):
            model(torch.ones(1, 3, 8, 8, device=device)).square().sum().backward()
        assert comparisons == ([True, True] if device.type == "cpu" else [])
        optimizer.step()


def test_a_step_with_one_backward_pass_compares_nothing(comparisons, device):
    model, images = a_network().to(device), torch.ones(1, 3, 8, 8, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        (model(images) - model(2 * images)).square().sum().backward()
        optimizer.step()
    assert not comparisons


def test_an_update_of_ones_own_counts_as_a_step_beside_an_average(device):
    model = spectral_norm(nn.Linear(40, 30).to(device))
    model.weight.sum().backward()
    average = copy.deepcopy(model)
    with torch.no_grad(), sn.optimizer_step(model):
        model.parametrizations.weight.original.sub_(0.1)
    average.parametrizations.weight.original.data.mul_(3).add_(0.1)
    assert torch.linalg.matrix_norm(average.weight, 2).item() == pytest.approx(1, rel=1e-4)


def test_an_average_whose_norm_was_renewed_by_hand_is_still_compared(device):
    average = spectral_norm(nn.Linear(40, 30).to(device))
    sn.update_(average)
    average.parametrizations.weight.original.data.add_(0.1)
    steps(1)
    assert torch.linalg.matrix_norm(average.weight, 2).item() == pytest.approx(1, rel=1e-4)


def test_what_is_recorded_depends_on_no_comparison(comparisons, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    images = torch.ones(2, 40, device=device)
    steps(1)
    graph = make_fx(layer)(images)
    assert not comparisons
    torch.testing.assert_close(graph(images), layer(images))


def test_a_network_that_nobody_trains_is_not_compared(comparisons, device):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    with torch.no_grad():
        layer.weight  # noqa: B018
        comparisons.clear()
        for _ in range(3):
            layer.weight  # noqa: B018
    assert not comparisons


def test_a_gpu_is_waited_for_less_and_less_often(comparisons, device, monkeypatch):
    monkeypatch.setattr(unseen_writes, "host_has", lambda _: False)
    layer = spectral_norm(nn.Linear(40, 30).to(device))
    numbers = []
    for step in range(1, 800):
        steps(1)
        comparisons.clear()
        layer.weight  # noqa: B018
        numbers += [step] * len(comparisons)
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 22, 38, 70, 134, 262, 518, 774]
    layer.parametrizations.weight.original.data.mul_(3).add_(0.1)
    steps(256)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-4)


def trained_with_two_backwards(model, optimizer, images, write=lambda: None) -> None:
    optimizer.zero_grad()
    for _ in range(2):
        model(images).square().sum().backward()
        write()
    optimizer.step()


@pytest.mark.usefixtures("engine_or_kernels")
def test_a_gpu_is_seldom_waited_for_while_an_optimizer_trains(comparisons, images, device, monkeypatch):
    monkeypatch.setattr(unseen_writes, "host_has", lambda _: False)
    model = a_network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    numbers = []
    for _ in range(800):
        comparisons.clear()
        trained_with_two_backwards(model, optimizer, images)
        numbers.append(len(comparisons))
    of_iterations = [iteration for iteration, number in enumerate(numbers) if number]
    assert sum(numbers) <= 2 * (9 + 3)  # of two weights, at first and again
    assert of_iterations[7] < 20
    assert not any(20 < iteration < 650 for iteration in of_iterations)
    assert of_iterations[-1] > 650


@pytest.mark.usefixtures("engine_or_kernels")
@pytest.mark.parametrize("begins", ["early", "late"])
def test_weights_in_training_that_are_written_by_hand_are_seen_where_comparing_takes_long(
    begins, images, device, monkeypatch
):
    monkeypatch.setattr(unseen_writes, "host_has", lambda _: False)
    monkeypatch.setattr(unseen_writes, "_LONGEST_WAIT", 16)
    model = a_network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    raw = model[0].parametrizations.weight.original

    def write() -> None:
        raw.data.mul_(1.5).add_(0.01)

    for _ in range(80 if begins == "late" else 2):
        trained_with_two_backwards(model, optimizer, images)
    for _ in range(80 if begins == "late" else 5):  # of which the first ones may stay unseen
        trained_with_two_backwards(model, optimizer, images, write)
        raw.data.div_(2)
    for _ in range(3):
        model(images).square().sum().backward()
        write()
        torch.testing.assert_close(model(images), expected(model, images), rtol=1e-3, atol=1e-4)


def test_a_function_that_is_applied_and_changes_nothing_hides_no_later_write(device):
    layer = spectral_norm(nn.Linear(40, 30).to(device)).eval()
    raw = layer.parametrizations.weight.original

    def clamp(_: nn.Module) -> None:
        with torch.no_grad():
            raw.clamp_(-100, 100)

    layer.apply(clamp)
    layer.weight.sum().backward()
    before = layer.weight.detach().clone()
    raw.data.add_(0.1)
    layer.train()
    assert not torch.allclose(layer.weight, before, rtol=1e-2)


def test_a_function_that_is_applied_and_changes_nothing_hides_no_later_initialization():
    layer = spectral_norm(nn.Linear(40, 30))
    raw = layer.parametrizations.weight.original

    def clamp(_: nn.Module) -> None:
        with torch.no_grad():
            raw.clamp_(-100, 100)

    layer.apply(clamp)
    layer.weight.data.normal_()
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-4)
    assert raw.std().item() == pytest.approx(1, rel=0.1)


def test_what_is_updated_by_hand_and_by_an_optimizer_is_compared_at_every_use():
    layer = spectral_norm(nn.Linear(40, 30))
    raw = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD([raw], lr=0.1)
    layer.weight.sum().backward()
    raw.data.add_(0.1)
    layer.weight.square().sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    raw.data.sub_(0.1)  # there is no occasion
    assert not torch.allclose(layer.weight, before, rtol=1e-2)


def all_written(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)


def all_written_unseen(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data.normal_()


def moved_a_little(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1e-5)


def set_to_another_norm(layer: nn.Module) -> None:
    layer.parametrizations.weight[0].coefficient = 1.0
    layer.parametrizations.weight[0].coefficient = 2.0


@pytest.mark.parametrize("prepare", [all_written, all_written_unseen, moved_a_little, set_to_another_norm])
def test_an_initialization_of_one_layer_after_that_of_all_is_seen(prepare):
    layer = spectral_norm(nn.Linear(40, 30), coefficient=2.0)
    prepare(layer)
    layer.weight.data.normal_(0, 0.5)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(2, rel=1e-4)
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(0.5, rel=0.1)
