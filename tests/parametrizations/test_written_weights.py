"""What is written into ``layer.weight``, as ``nn.init`` does it, is the raw weight for whoever looks for that next."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import spectralnorm as sn
from spectralnorm import spectral_norm

KEY = "parametrizations.weight.original"
WANTED = torch.arange(24.0).reshape(4, 6) - 7
OPTIONS = {
    "step": {},
    "strict": {"strict": True},
    "learnable": {"mode": "learnable"},
    "forward": {"update": "forward"},
    "manual": {"update": "manual"},
}


@pytest.fixture(params=OPTIONS)
def layer(request, device) -> nn.Module:
    torch.manual_seed(0)
    return spectral_norm(nn.Linear(6, 4), **OPTIONS[request.param]).to(device)


def raw(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


def write(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.copy_(WANTED)


def is_written(layer: nn.Module) -> bool:
    return torch.equal(raw(layer).detach().float().cpu(), WANTED)


def loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def after(function) -> nn.Module:
    """The same layer, after a function of it."""

    def changed(layer: nn.Module) -> nn.Module:
        function(layer)
        return layer

    return changed


LOOKS = {
    "use": after(lambda layer: layer(torch.ones(1, 6, device=raw(layer).device))),
    "move": after(lambda layer: layer.to("cpu")),
    "cast": after(lambda layer: layer.double()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "file": loaded,
    "invalidate": after(sn.invalidate),
    "keep_values": after(sn.keep_values),
    "eps": after(lambda layer: sn.add_spectral_norm(layer, eps=1e-10)),
    "coefficient": after(lambda layer: sn.add_spectral_norm(layer, coefficient=2.0)),
    "monitor": after(sn.monitor),
    "update_": after(sn.update_),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_was_written_is_there_after(look, layer):
    write(layer)
    assert is_written(LOOKS[look](layer))


def test_what_was_written_is_among_the_parameters_and_in_the_state(layer):
    model = nn.Sequential(nn.Flatten(), layer)
    write(layer)
    assert torch.equal(model.state_dict()[f"1.{KEY}"].cpu(), WANTED)
    with torch.no_grad():
        layer.weight.copy_(WANTED + 0.5)
    vector = parameters_to_vector(model.parameters())
    assert set((WANTED + 0.5).flatten().tolist()) <= set(vector.tolist())


def test_what_was_written_is_in_the_copy_of_a_layer_that_shares_the_weight(layer):
    plain = nn.Linear(6, 4).to(raw(layer).device)
    plain.weight = raw(layer)
    write(layer)
    copied = copy.deepcopy(nn.Sequential(plain, layer))
    assert torch.equal(copied[0].weight.detach().cpu(), WANTED)
    assert copied[0].weight is raw(copied[1])


def test_what_was_written_is_what_an_optimizer_steps_from(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    write(layer)
    optimizer.step()
    layer.weight  # noqa: B018 - a use
    assert torch.equal(raw(layer).detach().cpu(), WANTED - 1)


def test_a_write_after_the_weight_was_changed_and_used_is_not_dropped(layer):
    for _ in range(2):
        layer.load_state_dict({**layer.state_dict(), KEY: torch.randn(4, 6)})
        layer(torch.ones(1, 6, device=raw(layer).device))
        write(layer)
        layer.weight  # noqa: B018 - a use
        assert is_written(layer)


def test_norm_after_a_write_and_an_update_by_hand_is_that_of_what_was_written():
    layer = spectral_norm(nn.Linear(6, 4, bias=False), update="manual")
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 7)))  # one iteration is exact
    sn.update_(layer)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1)


class TestChangedSince:
    """The weight is changed after the write, before anybody has looked: that is what counts."""

    def test_by_a_state_dict(self, layer):
        wanted = torch.randn_like(raw(layer))
        nn.init.orthogonal_(layer.weight)
        layer.load_state_dict({**layer.state_dict(), KEY: wanted})
        layer.weight  # noqa: B018 - a use
        assert torch.equal(raw(layer), wanted)

    def test_by_a_model_that_initializes_itself(self, layer):
        torch.manual_seed(1)
        other = copy.deepcopy(layer)
        nn.init.orthogonal_(other.weight)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other.eval().weight, layer.eval().weight)

    def test_by_an_assignment(self, layer):
        wanted = torch.randn_like(raw(layer))
        nn.init.zeros_(layer.weight)
        layer.weight = wanted
        layer.weight  # noqa: B018 - a use
        assert torch.equal(raw(layer), wanted)

    def test_by_a_write_into_the_parameter(self, layer):
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            raw(layer).fill_(2)
        layer.weight  # noqa: B018 - a use
        assert torch.equal(raw(layer), torch.full_like(raw(layer), 2))

    def test_by_another_parameter(self, layer):
        nn.init.zeros_(layer.weight)
        layer.parametrizations.weight.original = nn.Parameter(torch.ones_like(raw(layer)))
        layer.weight  # noqa: B018 - a use
        assert torch.equal(raw(layer), torch.ones_like(raw(layer)))


def test_initialization_that_is_applied_may_write_through_data(layer):
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(WANTED)

    nn.Sequential(layer).apply(initialize)
    layer.weight  # noqa: B018 - a use
    assert is_written(layer)


def test_initialization_that_is_applied_may_write_through_data_twice(layer):
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(WANTED / 2)
            module.weight.data.mul_(2)

    nn.Sequential(layer).apply(initialize)
    layer.weight  # noqa: B018 - a use
    assert is_written(layer)


def by_a_loop(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(WANTED)


INITIALIZATIONS = {
    "loop": by_a_loop,
    "name": lambda model: model[1].weight.data.copy_(WANTED),
    "no_grad": torch.no_grad()(lambda model: model[1].weight.data.copy_(WANTED)),
    "after a forward": lambda model: (model(torch.ones(1, 6)), model[1].weight.data.copy_(WANTED)),
}


@pytest.mark.parametrize("options", [{}, {"strict": True}], ids=["step", "strict"])
@pytest.mark.parametrize("initialize", INITIALIZATIONS.values(), ids=INITIALIZATIONS)
class TestInitializationThroughDataBeforeTheFirstStep:
    """On the CPU, where models are initialized, by whatever code: it reaches the weight as with torch's hook."""

    @pytest.fixture
    def model(self, options) -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(6, 4), **options))

    def test_reaches_the_weight(self, initialize, model):
        initialize(model)
        assert float(torch.linalg.matrix_norm(model[1].weight.detach(), 2)) == pytest.approx(1, abs=0.01)
        assert is_written(model[1])

    def test_may_come_twice(self, initialize, model):
        by_a_loop(model)
        model.requires_grad_(True)
        model[1].weight.data.zero_()
        initialize(model)
        model[1].weight  # noqa: B018 - a use
        assert is_written(model[1])

    def test_is_what_an_optimizer_steps_from(self, initialize, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        initialize(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert torch.equal(raw(model[1]).detach(), WANTED - 1)

    def test_is_in_the_state_and_moves_along(self, initialize, model):
        initialize(model)
        assert torch.equal(model.state_dict()[f"1.{KEY}"], WANTED)
        initialize(model)
        assert is_written(model.double()[1])


def test_what_is_applied_and_only_reads_changes_nothing(layer):
    before, value = raw(layer).detach().clone(), layer.eval().weight.detach().clone()
    nn.Sequential(layer).apply(lambda module: module.weight if isinstance(module, nn.Linear) else None)
    assert torch.equal(layer.weight, value)
    assert torch.equal(raw(layer), before)
