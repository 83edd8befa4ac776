"""The rules of ``update="step"``: what counts as a change, what a use may do, and what is written when."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import spectralnorm as sn
from spectralnorm import spectral_norm
from spectralnorm.parametrizations import arithmetic, plans

# The package has a function of the module's name.
spectral_norm_module = sys.modules["spectralnorm.parametrizations.spectral_norm"]

pytestmark = pytest.mark.usefixtures("engine_or_kernels")


@pytest.fixture
def layer(device) -> nn.Module:
    """Large enough that one power iteration from a random start is far off."""
    return spectral_norm(nn.Linear(160, 150).to(device))


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def norm_of(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double(), 2).item()


def vectors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return tuple(buffer.clone() for _, buffer in layer.named_buffers())


def assert_same_vectors(layer: nn.Module, before: tuple[Tensor, Tensor]) -> None:
    for buffer, old in zip(vectors(layer), before, strict=True):
        assert torch.equal(buffer, old)


def use(layer: nn.Module) -> Tensor:
    return layer(torch.ones(1, layer.in_features, device=raw(layer).device)).sum()


def another_matrix(layer: nn.Module) -> Tensor:
    return 3 * torch.randn_like(raw(layer))


def optimizer_step(layer: nn.Module, size: float = 0.01) -> None:
    raw(layer).grad = torch.randn_like(raw(layer))
    torch.optim.SGD([raw(layer)], lr=size).step()


class TestUnchangedWeight:
    def test_every_use_sees_the_same_bits_and_advances_nothing(self, layer):
        optimizer_step(layer)
        use(layer).backward()
        before, weight = vectors(layer), layer.weight.clone()
        for _ in range(3):
            use(layer).backward()
            assert torch.equal(layer.weight, weight)
        with torch.no_grad():
            assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.eval().weight, weight)
        assert torch.equal(layer.train().weight, weight)
        assert_same_vectors(layer, before)

    def test_optimizer_without_its_gradient_is_no_change(self, layer):
        weight = layer.weight.detach()
        raw(layer).grad = None
        torch.optim.Adam(layer.parameters()).step()
        assert layer.weight.data_ptr() == weight.data_ptr()

    def test_freezing_and_unfreezing_keeps_the_value_and_the_gradients_right(self, layer):
        weight = layer.weight.detach()
        layer.requires_grad_(False)
        inputs = torch.ones(1, 160, device=weight.device, requires_grad=True)
        layer(inputs).sum().backward()
        assert inputs.grad is not None
        assert raw(layer).grad is None
        layer.requires_grad_(True)
        use(layer).backward()
        assert raw(layer).grad is not None
        assert torch.equal(layer.weight, weight)

    def test_use_under_no_grad_does_not_take_the_gradient_from_the_next(self, layer):
        with torch.no_grad():
            layer.weight  # noqa: B018
        use(layer).backward()
        assert raw(layer).grad is not None

    def test_value_first_used_in_inference_mode_can_be_trained_with(self, layer):
        optimizer_step(layer)
        with torch.inference_mode():
            use(layer)
        use(layer).backward()
        assert raw(layer).grad is not None

    @pytest.mark.parametrize("options", [{}, {"strict": True}, {"update": "forward"}], ids=str)
    def test_writing_into_its_norms_and_vectors_changes_nothing(self, options, device):
        layer = spectral_norm(nn.Linear(16, 15).to(device), **options)
        normalization, seen = layer.parametrizations.weight[0], []
        buffers = vectors(layer.eval())
        for _ in range(2):
            raw(layer).grad = None
            weight = layer.weight
            norms = normalization.sigma(raw(layer)), normalization.sigma_upper(raw(layer))
            both = normalization.vectors(raw(layer))
            weight.pow(3).sum().backward()
            seen.append([each.detach().clone() for each in (weight, raw(layer).grad, *norms, *both)])
            for each in (*norms, *both):
                each.mul_(3)
        assert all(map(torch.equal, *seen))
        assert_same_vectors(layer, buffers)


class TestBuffers:
    def test_written_once_per_change_in_training_with_grad(self, layer):
        optimizer_step(layer, 1.0)
        before = vectors(layer)
        use(layer)
        after = vectors(layer)
        assert not torch.equal(after[0], before[0])
        use(layer)
        assert_same_vectors(layer, after)

    @pytest.mark.parametrize("change", [optimizer_step, lambda layer: raw(layer).data.mul_(2)])
    def test_not_written_in_eval_mode(self, layer, change):
        before = vectors(layer)
        layer.eval()
        change(layer)
        sn.invalidate(layer)
        use(layer).backward()
        assert_same_vectors(layer, before)

    def test_not_written_under_no_grad_or_in_inference_mode(self, layer):
        before = vectors(layer)
        for context in (torch.no_grad(), torch.inference_mode()):
            optimizer_step(layer, 1.0)
            with context:
                use(layer)
        assert_same_vectors(layer, before)

    def test_value_fixed_under_no_grad_reaches_the_buffers_at_the_next_training_use(self, layer):
        optimizer_step(layer, 1.0)
        with torch.no_grad():
            weight = layer.weight.clone()
        use(layer)
        assert torch.equal(layer.weight, weight)
        u, v = vectors(layer)
        torch.testing.assert_close(u @ weight @ v, torch.ones((), device=u.device))


def by_vector_to_parameters(layer: nn.Module) -> None:
    vector_to_parameters(2 * parameters_to_vector(layer.parameters()) + 1, layer.parameters())


@torch.no_grad()
def by_copy(layer: nn.Module) -> None:
    raw(layer).copy_(another_matrix(layer))


def by_new_data(layer: nn.Module) -> None:
    raw(layer).data = another_matrix(layer)


def by_new_parameter(layer: nn.Module) -> None:
    layer.parametrizations.weight.original = nn.Parameter(another_matrix(layer))


def by_load(layer: nn.Module) -> None:
    layer.load_state_dict({**layer.state_dict(), "parametrizations.weight.original": another_matrix(layer)})


def by_assigning_load(layer: nn.Module) -> None:
    state = {**layer.state_dict(), "parametrizations.weight.original": nn.Parameter(another_matrix(layer))}
    layer.load_state_dict(state, assign=True)


def by_init(layer: nn.Module) -> None:
    nn.init.uniform_(raw(layer), -1, 5)


def by_init_of_what_is_read(layer: nn.Module) -> None:
    nn.init.uniform_(layer.weight, -1, 5)


@torch.no_grad()
def by_copy_into_what_is_read(layer: nn.Module) -> None:
    layer.weight.copy_(another_matrix(layer))


def by_reset_parameters(layer: nn.Module) -> None:
    layer.reset_parameters()


def by_assignment(layer: nn.Module) -> None:
    layer.weight = another_matrix(layer)


def by_cast(layer: nn.Module) -> None:
    layer.half().float()


def by_data_and_invalidate(layer: nn.Module) -> None:
    raw(layer).data.copy_(another_matrix(layer))
    sn.invalidate(layer)


OTHER_CHANGES = [
    by_vector_to_parameters,
    by_copy,
    by_new_data,
    by_new_parameter,
    by_load,
    by_assigning_load,
    by_init,
    by_init_of_what_is_read,
    by_copy_into_what_is_read,
    by_reset_parameters,
    by_assignment,
    by_cast,
    by_data_and_invalidate,
]


class TestOtherChanges:
    @pytest.mark.parametrize("change", OTHER_CHANGES)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_value_is_refined_in_any_mode(self, layer, change, training):
        use(layer.train(training))
        old_raw, old_weight = raw(layer).detach().clone(), layer.weight.detach().clone()
        change(layer)
        with torch.set_grad_enabled(training):
            weight = layer.weight
        assert norm_of(weight) == pytest.approx(1, rel=1e-4)
        assert not torch.equal(weight, old_weight)
        assert not torch.equal(raw(layer), old_raw)
        torch.testing.assert_close(weight, raw(layer) / norm_of(raw(layer)), rtol=1e-4, atol=1e-6)

    def test_what_is_written_into_the_read_weight_is_the_new_raw_weight(self, layer):
        wanted = another_matrix(layer)
        with torch.no_grad():
            layer.weight.copy_(wanted)
        layer.weight  # noqa: B018
        assert torch.equal(raw(layer), wanted)

    def test_initialization_that_is_applied_may_write_through_data(self, layer):
        wanted = another_matrix(layer)

        def into_weight(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.weight.data.copy_(wanted)

        def into_parameters(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                raw(module).data.copy_(wanted.mT.reshape(wanted.shape))

        nn.Sequential(layer).apply(into_weight)
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
        assert torch.equal(raw(layer), wanted)
        nn.Sequential(layer).apply(into_parameters)
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)

    def test_what_is_applied_and_writes_nothing_changes_nothing(self, layer):
        with torch.no_grad():
            raw(layer)[0, 0] = math.nan
        before = layer.weight
        assert layer.apply(lambda module: None) is layer
        assert layer.weight.data_ptr() == before.data_ptr()

    def test_write_between_a_use_and_an_optimizer_step_is_not_taken_for_the_step(self, layer):
        use(layer)
        by_copy(layer)
        optimizer_step(layer)
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)

    def test_several_steps_without_a_use_are_refined(self, layer):
        for _ in range(3):
            optimizer_step(layer, 1.0)
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)

    def test_refinement_depends_on_the_weight_alone(self, layer, device):
        for _ in range(3):
            optimizer_step(layer)
            use(layer)
        other = spectral_norm(nn.Linear(160, 150).to(device))
        with torch.no_grad():
            raw(other).copy_(raw(layer))
        sn.invalidate(layer)
        assert torch.equal(other.weight, layer.weight)


def make_adam(parameters, **options):
    return torch.optim.Adam(parameters, lr=0.005, **options)


def step_with_closure(layer: nn.Module, size: float) -> None:
    """A step that uses the weight several times, between writes of its own."""
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=size, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = use(layer).square()
        loss.backward()
        return loss

    optimizer.step(closure)


class TestOptimizerSteps:
    @pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
    def test_every_kind_of_step_is_noticed(self, layer, options):
        optimizer = make_adam(layer.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            use(layer).square().backward()
            before = layer.weight.detach().clone()
            optimizer.step()
            assert not torch.equal(layer.weight, before)
            assert norm_of(layer.weight) == pytest.approx(1, abs=0.05)

    def test_step_with_a_closure_is_noticed(self, layer):
        before = layer.weight.detach().clone()
        step_with_closure(layer, size=0.1)
        assert not torch.equal(layer.weight, before)

    def test_write_after_a_step_with_uses_in_it_is_not_taken_for_the_step(self, layer):
        """A closure uses the weight between two writes of its step; its value of then is not of one step ago."""
        step_with_closure(layer, size=0.01)
        with torch.no_grad():
            raw(layer).copy_(another_matrix(layer))
        assert norm_of(layer.weight) == pytest.approx(1, abs=1e-4)

    def test_step_that_calls_the_step_of_its_base_is_one_step(self, layer):
        class Logged(torch.optim.SGD):
            def step(self, closure=None):
                return super().step(closure)

        torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from here on torch's hooks are called for the base's step too
        optimizer = Logged(layer.parameters(), lr=0.01)
        ages = []
        for _ in range(3):
            use(layer).backward()
            optimizer.step()
            layer.weight  # noqa: B018 - a use
            ages.append(layer.parametrizations.weight[0]._kept.age)
        assert ages == [1, 2, 3]

    def test_step_after_one_that_raised_is_a_step(self, layer):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

        def closure() -> Tensor:
            raise ArithmeticError

        use(layer).backward()
        with pytest.raises(ArithmeticError):
            optimizer.step(closure)
        optimizer.step()
        layer.weight  # noqa: B018 - a use
        assert layer.parametrizations.weight[0]._kept.age == 1

    def test_norm_stays_near_one_while_adam_moves_the_weight_by_its_own_norm(self, device):
        layer, teacher = spectral_norm(nn.Linear(128, 128).to(device)), nn.Linear(128, 128).to(device)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, betas=(0.0, 0.9))
        norms = []
        for _ in range(100):
            inputs = torch.randn(64, 128, device=device)
            optimizer.zero_grad()
            (layer(inputs) - teacher(inputs).detach()).square().mean().backward()
            norms.append(norm_of(layer.weight))
            optimizer.step()
        assert max(norms) < 1.1

    def test_orthogonal_direction_that_overtakes_in_a_step_is_seen_at_once(self, device):
        layer = spectral_norm(nn.Linear(2, 2, bias=False).to(device))
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

        def move_to(*diagonal: float) -> float:
            target = torch.diag(torch.tensor(diagonal, device=device))
            raw(layer).grad = raw(layer).detach() - target
            optimizer.step()
            use(layer)
            return norm_of(layer.weight)

        for _ in range(30):
            move_to(1.0, 0.5)
        assert move_to(1.0, 10.0) == pytest.approx(1, rel=1e-5)

    def test_the_host_waits_for_no_value(self, layer, device, monkeypatch, without_waiting):
        if device.type == "cpu":
            monkeypatch.setattr(plans, "are_usable", lambda weight: False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):  # at the first of which the kernels' plans are made
            use(layer).backward()
            optimizer.step()
        if device.type == "cpu":
            # Reading a number waits for nothing here and is allowed. What follows is done as on a GPU.
            monkeypatch.setattr("spectralnorm.parametrizations.kept.host_has", lambda device: False)

            def fail(*_: object) -> None:
                raise AssertionError("a value went to the host")

            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
                monkeypatch.setattr(Tensor, name, fail)
        with without_waiting():
            use(layer).backward()


class TestRecovery:
    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_weight_without_a_norm_recovers_when_it_has_one_again(self, layer, value, training):
        layer.train(training)
        good = raw(layer).detach().clone()
        for values in (torch.full_like(good, value), good):
            with torch.no_grad():
                raw(layer).copy_(values)
            use(layer).backward()
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)
        assert all(buffer.isfinite().all() for buffer in layer.buffers())

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_recovery_by_an_optimizer_step_is_refined_too(self, layer, value):
        good, optimizer = raw(layer).detach().clone(), torch.optim.SGD([raw(layer)], lr=1.0)
        for target in (torch.full_like(good, value), good):
            raw(layer).grad = raw(layer).detach().nan_to_num() - target
            with torch.no_grad():
                raw(layer).nan_to_num_()
            layer.weight  # noqa: B018
            if raw(layer).is_cuda:  # that there was no norm is known when the GPU has found it, and not before
                torch.cuda.synchronize()
            optimizer.step()
            use(layer).backward()
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)

    def test_zero_weight_stays_zero_and_learns(self):
        layer = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(layer.weight)
        spectral_norm(layer)
        assert torch.equal(layer.weight, torch.zeros(2, 3))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            use(layer).backward()
            optimizer.step()
        assert norm_of(layer.weight) == pytest.approx(1, rel=1e-4)


class TestWhereNothingIsKept:
    def test_functional_call_uses_the_tensors_that_are_given(self, layer):
        given = {"parametrizations.weight.original": another_matrix(layer)}
        layer.eval()
        before = layer.weight.clone()
        functional_call(layer, given, torch.ones(1, 160, device=before.device))
        assert torch.equal(layer.weight, before)

    def test_functional_call_in_training_writes_the_buffers_as_torch_does(self, layer):
        before = vectors(layer)
        functional_call(
            layer,
            {"parametrizations.weight.original": another_matrix(layer)},
            torch.ones(1, 160, device=before[0].device),
        )
        assert not torch.equal(vectors(layer)[0], before[0])

    @pytest.mark.parametrize("options", [{}, {"strict": True}, {"mode": "learnable"}], ids=["plain", "strict", "scale"])
    def test_layer_made_in_inference_mode_is_normalized_there(self, device, options):
        trained = spectral_norm(nn.Linear(16, 12).to(device), **options)
        with torch.inference_mode():
            layer = spectral_norm(nn.Linear(16, 12).to(device), **options).eval()
            layer.load_state_dict(trained.state_dict())
            assert norm_of(layer.weight) == pytest.approx(1, rel=2e-3)

    def test_tensors_without_numbers_go_through(self, device):
        with FakeTensorMode():
            layer = spectral_norm(nn.Linear(16, 12, device=device))
            optimizer = torch.optim.SGD(layer.parameters(), 0.1)
            use(layer).backward()
            optimizer.step()
            assert use(layer.eval()).shape == ()

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_stacked_models_under_vmap_give_what_each_gives(self, training):
        models = [spectral_norm(nn.Linear(4, 3)).train(training) for _ in range(3)]
        parameters, buffers = stack_module_state(models)
        skeleton, inputs = copy.deepcopy(models[0]), torch.randn(5, 4)
        outputs = vmap(lambda p, b: functional_call(skeleton, (p, b), inputs))(parameters, buffers)
        for model, output in zip(models, outputs, strict=True):
            torch.testing.assert_close(output, model(inputs), rtol=1e-4, atol=1e-5)

    def test_per_sample_gradients(self, layer):
        layer.eval()
        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        samples = torch.randn(3, 160, device=raw(layer).device)

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(layer, parameters, sample).square().sum()

        together = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
        for index, sample in enumerate(samples):
            layer.zero_grad()
            layer(sample).square().sum().backward()
            expected = raw(layer).grad
            torch.testing.assert_close(
                together["parametrizations.weight.original"][index], expected, rtol=1e-3, atol=1e-4
            )

    def test_vmap_over_inputs_with_the_kept_parameters_in_place(self, layer):
        inputs = torch.randn(3, 160, device=raw(layer).device)
        torch.testing.assert_close(vmap(layer)(inputs), layer(inputs), rtol=1e-4, atol=1e-5)

    def test_what_a_captured_graph_has_changed_is_not_taken_for_what_was_kept(self, layer, monkeypatch):
        before = layer.weight.detach().clone()
        for module in (arithmetic, spectral_norm_module):
            monkeypatch.setattr(module, "is_capturing", lambda weight: True)
        layer.parametrizations.weight[0](raw(layer)).sum().backward()
        for module in (arithmetic, spectral_norm_module):
            monkeypatch.setattr(module, "is_capturing", lambda weight: False)
        for is_training in (False, True):
            layer.train(is_training)
            raw(layer).data.neg_()  # as a replay does it: no version moves, no optimizer is heard
            torch.testing.assert_close(layer.weight, -before, rtol=1e-4, atol=1e-5)
            before.neg_()

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_capturing_what_trains_nothing_changes_nothing(self, training, layer, monkeypatch):
        layer.train(training).requires_grad_(not training)
        for module in (arithmetic, spectral_norm_module):
            monkeypatch.setattr(module, "is_capturing", lambda weight: True)
        layer.parametrizations.weight[0](raw(layer))
        for module in (arithmetic, spectral_norm_module):
            monkeypatch.setattr(module, "is_capturing", lambda weight: False)
        first, second = layer.weight, layer.weight  # both held: memory that is free is given out again
        assert first.data_ptr() == second.data_ptr()

    @pytest.mark.gpu
    def test_a_captured_step_trains_at_every_replay(self):
        torch.manual_seed(0)
        model = sn.add_spectral_norm(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        inputs, targets = torch.randn(32, 12, device="cuda"), torch.randn(32, 4, device="cuda")

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        graph.replay()
        first = loss.item()
        for _ in range(30):
            graph.replay()
        assert loss.item() < first
        model.eval()
        for linear in (model[0], model[2]):
            weight = raw(linear)
            torch.testing.assert_close(linear.weight, weight / norm_of(weight), rtol=1e-2, atol=1e-3)

    def test_grouped_weight_in_training_without_keeping_is_right(self):
        layer = spectral_norm(nn.Conv1d(8, 8, 3, groups=2))
        value = 3 * torch.randn_like(raw(layer))
        normalization = layer.parametrizations.weight[0]
        weight = normalization(value)
        assert max(norm_of(block.flatten(1)) for block in weight.chunk(2)) == pytest.approx(1, rel=1e-2)


def test_compiled_model_is_one_graph_and_agrees_with_eager():
    linear, convolution = nn.Linear(6, 8), nn.Conv1d(8, 4, 1, groups=2)
    plain = nn.Sequential(linear, nn.ReLU(), nn.Unflatten(1, (8, 1)), convolution, nn.Flatten())
    eager = copy.deepcopy(plain)
    for part in (eager[0], eager[3]):
        spectral_norm(part)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(5, 6)
    for each in (compiled, eager):
        each(inputs).square().sum().backward()
    for mine, its in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        compiled(inputs).square().sum().backward()
    for _ in range(30):  # a use in training is one power iteration there, which large steps may leave behind
        compiled(inputs)
    model.eval()
    with torch.no_grad():
        for part, trained in ((linear, model[0]), (convolution, model[3])):
            blocks = raw(trained).flatten(1).chunk(getattr(trained, "groups", 1))
            part.weight.copy_(raw(trained) / max(map(norm_of, blocks)))
            part.bias.copy_(trained.bias)
        for each in (compiled, model):
            torch.testing.assert_close(each(inputs), plain(inputs), rtol=1e-3, atol=1e-4)
