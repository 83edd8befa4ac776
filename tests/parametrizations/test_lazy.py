"""Normalizing layers whose weight has no shape yet."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spectralnorm import UserError, add_spectral_norm, monitor, remove_spectral_norm, spectral_norm, summary
from spectralnorm.parametrizations import is_normalized, normalization_of

LAYERS = {
    "linear": (lambda: nn.LazyLinear(3), (2, 5)),
    "linear without bias": (lambda: nn.LazyLinear(3, bias=False), (2, 5)),
    "conv": (lambda: nn.LazyConv2d(4, 3, groups=2), (2, 6, 5, 5)),
    "transposed conv": (lambda: nn.LazyConvTranspose1d(4, 3, groups=2), (2, 6, 5)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def norm_of(layer: nn.Module) -> float:
    return torch.linalg.matrix_norm(normalization_of(layer).weight_matrix(layer.weight), 2).max().item()


@every_layer
@pytest.mark.parametrize("add", [spectral_norm, add_spectral_norm])
def test_first_forward_uses_the_normalized_weight(make, shape, add, device):
    layer = add(make().to(device))
    inputs = torch.randn(shape, device=device)
    first = layer(inputs)
    assert norm_of(layer) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(layer(inputs), first, rtol=0, atol=0)
    first.sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    assert not layer._forward_pre_hooks


@every_layer
def test_function_is_that_of_the_layer_normalized_after_it_got_its_shape(make, shape):
    inputs = torch.randn(shape)
    torch.manual_seed(1)
    early = spectral_norm(make(), coefficient=2.0)
    outputs = early(inputs)
    torch.manual_seed(1)
    late = make()
    late(inputs)
    torch.testing.assert_close(spectral_norm(late, coefficient=2.0)(inputs), outputs)
    assert type(early) is type(late)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_made_before_the_first_forward_is_normalized_on_its_own(copied):
    layer = spectral_norm(nn.LazyLinear(3))
    other = copied(layer)
    other(torch.randn(2, 5))
    assert norm_of(other) == pytest.approx(1, rel=1e-4)
    assert is_lazy(layer.weight)
    layer(torch.randn(2, 7))
    assert layer.weight.shape == (3, 7)


def lazy_model() -> nn.Sequential:
    return add_spectral_norm(nn.Sequential(nn.LazyConv1d(4, 3), nn.Flatten(), nn.LazyLinear(2)))


class TestStateDict:
    inputs = torch.linspace(-1, 1, 30).view(2, 3, 5)

    def test_of_a_lazy_model_loads_into_a_lazy_model(self):
        model, other = lazy_model(), lazy_model()
        other.load_state_dict(model.state_dict())
        other(self.inputs)
        assert norm_of(other[2]) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("form", ["ours", "plain", "hook"])
    @pytest.mark.parametrize("update", ["step", "forward"])
    def test_of_a_model_with_shapes_gives_the_lazy_one_shapes_and_function(self, form, update):
        source = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(12, 2))
        expected = add_spectral_norm(copy.deepcopy(source), update=update)
        if form == "hook":
            source = nn.Sequential(*(nn.utils.spectral_norm(each) if each._parameters else each for each in source))
        state = expected.state_dict() if form == "ours" else source.state_dict()
        model = add_spectral_norm(lazy_model(), update=update)
        model.load_state_dict(state)
        rtol = 1e-4 if update == "step" or form == "ours" else 1e-2  # as torch, after a few iterations
        torch.testing.assert_close(model.eval()(self.inputs), expected.eval()(self.inputs), rtol=rtol, atol=1e-5)
        assert model.state_dict().keys() == expected.state_dict().keys()
        if form == "ours":
            assert torch.equal(normalization_of(model[0])._u, normalization_of(expected[0])._u)

    def test_of_a_lazy_model_is_refused_by_one_with_shapes(self):
        model = lazy_model()
        model(self.inputs)
        with pytest.raises(RuntimeError, match="uninitialized parameter"):
            model.load_state_dict(lazy_model().state_dict())


class TestImagesOfTheFirstForward:
    def test_of_another_size_are_refused(self):
        layer = spectral_norm(nn.LazyConv2d(4, 3), strict=True, input_size=(6, 6))
        for _ in range(2):
            with pytest.raises(UserError, match=r"for inputs of size \(6, 6\), got \(5, 6\)"):
                layer(torch.ones(1, 2, 5, 6))
        layer(input=torch.ones(1, 2, 6, 6))

    def test_tell_the_size_that_the_norm_is_meant_for(self):
        layer = spectral_norm(nn.LazyConv2d(4, 3, padding=1), norm="operator")
        images = torch.ones(1, 2, 5, 6)
        first = layer(images)
        assert normalization_of(layer).learned_size == (5, 6)
        assert torch.equal(layer(images), first)


class Outer(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """A layer of one's own, whose weight could get any shape."""

    is_final = False

    def __init_subclass__(cls) -> None:
        if cls.is_final:
            raise TypeError("no class may come from this one")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()

    def initialize_parameters(self, inputs: torch.Tensor) -> None:
        if is_lazy(self.weight):
            self.weight.materialize((3, inputs.shape[-1]))
            nn.init.ones_(self.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight)


UNFIT = {
    "too few axes": (lambda: nn.LazyConv2d(4, 3), {"strict": True, "input_size": (8,)}, "2 axes"),
    "too small": (lambda: nn.LazyConv2d(4, 3), {"norm": "operator", "input_size": (2, 8)}, "large enough"),
    "no convolution": (lambda: nn.LazyLinear(4), {"strict": True, "input_size": (8,)}, "is for convolutions"),
    "without need": (lambda: nn.LazyConv1d(4, 3), {"input_size": (8,)}, "is for convolutions"),
    "update": (lambda: nn.LazyConvTranspose1d(4, 3), {"norm": "operator", "update": "manual"}, "alone"),
    "complex": (lambda: nn.LazyConv1d(4, 3, dtype=torch.complex64), {"strict": True}, "complex convolutions"),
}


class TestUnfitOptions:
    @pytest.mark.parametrize(("make", "options", "message"), UNFIT.values(), ids=UNFIT)
    def test_are_refused_at_once(self, make, options, message):
        layer = make()
        with pytest.raises(UserError, match=message):
            spectral_norm(layer, **options)
        assert not is_normalized(layer)

    def test_dimension_that_the_weight_will_not_have_is_refused_at_once(self):
        with pytest.raises(IndexError, match="dim must lie in"):
            spectral_norm(nn.LazyLinear(4), dim=2)

    def test_are_refused_for_options_that_were_given_before(self):
        model = add_spectral_norm(lazy_model(), strict=True)
        with pytest.raises(UserError, match="strict=True is not offered"):
            add_spectral_norm(model, mode="learnable")
        with pytest.raises(UserError, match="must have one integer for each of 1 axes"):
            add_spectral_norm(model, input_size=(8, 8))

    def test_that_only_the_first_forward_tells_are_refused_at_every_forward(self):
        layer = spectral_norm(Outer(), dim=2)
        for _ in range(3):
            with pytest.raises(IndexError, match="dim must lie in"):
                layer(torch.ones(2, 5))

    def test_layer_that_cannot_be_normalized_fails_at_every_forward(self, monkeypatch):
        layer = spectral_norm(Outer())
        monkeypatch.setattr(Outer, "is_final", True)
        for _ in range(3):
            with pytest.raises(TypeError, match="no class may come"):
                layer(torch.ones(2, 5))


class TestWaiting:
    def test_counts_as_normalized_and_cannot_be_added_twice(self):
        layer = spectral_norm(nn.LazyLinear(3))
        assert is_normalized(layer)
        with pytest.raises(UserError, match="normalized already"):
            spectral_norm(layer)

    def test_options_are_checked_at_once(self):
        with pytest.raises(UserError, match="coefficient must be a positive number, got -1"):
            spectral_norm(nn.LazyLinear(3), coefficient=-1)

    def test_is_told_by_summary_and_left_out_by_monitor(self):
        model = add_spectral_norm(lazy_model(), coefficient=0.5, mode="cap")
        assert [row.note for row in summary(model).rows] == ["cap to 0.5 once it has a shape"] * 2
        assert monitor(model) == {}

    def test_is_told_by_summary_of_a_weight_that_was_loaded(self):
        layer = spectral_norm(nn.LazyLinear(3))
        layer.load_state_dict(nn.Linear(5, 3).state_dict())
        assert summary(layer).rows[0].note == "normalize to 1 from its first forward on"

    def test_options_can_be_changed(self):
        model = add_spectral_norm(lazy_model(), coefficient={"2": 3.0})
        model(TestStateDict.inputs)
        assert [norm_of(model[0]), norm_of(model[2])] == pytest.approx([1, 3], rel=1e-4)

    def test_is_removed(self):
        model = remove_spectral_norm(lazy_model())
        model(TestStateDict.inputs)
        assert [type(layer) for layer in model] == [nn.Conv1d, nn.Flatten, nn.Linear]
        assert not any(layer._load_state_dict_pre_hooks for layer in model)

    def test_failed_first_forward_leaves_it_waiting(self):
        layer = spectral_norm(nn.LazyConv2d(3, 3))
        with pytest.raises(RuntimeError):
            layer(torch.ones(2))
        layer(torch.ones(1, 2, 4, 4))
        assert norm_of(layer) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("include", ["*", "1"])
    def test_options_can_be_changed_when_only_a_partner_has_run(self, include):
        model = nn.Sequential(nn.LazyLinear(3, bias=False), nn.LazyLinear(3, bias=False))
        model[1].weight = model[0].weight
        add_spectral_norm(model)
        model[0](torch.randn(2, 3))
        add_spectral_norm(model, include=include, coefficient=2.0)
        with pytest.raises(UserError, match="norm cannot be changed"):
            add_spectral_norm(model, include=include, norm="bidirectional")
        model(torch.randn(2, 3))
        assert [norm_of(layer) for layer in model] == pytest.approx([2, 2], rel=1e-4)

    def test_tied_weights_share_one_normalization(self):
        model = nn.Sequential(nn.LazyLinear(3, bias=False), nn.LazyLinear(3, bias=False))
        model[1].weight = model[0].weight
        add_spectral_norm(model)
        model(torch.randn(2, 3))
        assert normalization_of(model[0]) is normalization_of(model[1])
        assert len(list(model.parameters())) == 1
