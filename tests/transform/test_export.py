"""State dicts written for models without this package: they load strictly there, and the function is the same."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import spectralnorm as sn
from spectralnorm import UserError, add_spectral_norm, export_state_dict

TARGETS = {
    "plain": lambda layer: layer,
    "torch": torch_parametrizations.spectral_norm,
    "torch-hook": nn.utils.spectral_norm,
}
FORMATS = pytest.mark.parametrize("format", TARGETS)


class Tower(nn.Module):
    """Nested, with layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.features = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1),
            nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2)),
        )
        self.more = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, groups=2), "head": nn.Linear(4, 3)})

    def forward(self, indices: Tensor) -> Tensor:
        inputs = self.table(indices).movedim(-1, 1)
        return self.more["head"](self.more["up"](self.features(inputs)).mean((-1, -2)))


LAYERS = (nn.Embedding, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
INDICES = torch.arange(2 * 6 * 6).view(2, 6, 6) % 5


def normalized(make=Tower, steps: int = 2, **options) -> nn.Module:
    """A model that has been trained a little, so that its vectors are not those of its construction."""
    model = add_spectral_norm(make(), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(INDICES).square().sum().backward()
        optimizer.step()
    return model


def target(format: str, make=Tower) -> nn.Module:
    model = make()
    for layer in list(model.modules()):
        if isinstance(layer, LAYERS):
            TARGETS[format](layer)
    return model.eval()


@FORMATS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_format_loads_strictly_and_computes_the_same(format, training):
    model = normalized().train(training)
    other = target(format)
    other.load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(other(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)


@FORMATS
def test_each_format_is_what_its_layers_write_themselves(format):
    written, expected = export_state_dict(normalized(), format), target(format).state_dict()
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for path, metadata in expected._metadata.items():
        assert written._metadata.get(path) == metadata


@FORMATS
def test_each_format_comes_back_strictly(format):
    model, again = normalized(), normalized(steps=0)
    again.load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(again.eval()(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)


@FORMATS
@pytest.mark.parametrize("update", ["step", "forward", "manual"])
def test_writing_changes_nothing_in_the_model(format, update):
    model = normalized(update=update)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_state_dict(model, format)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert all(module.training for module in model.modules())


@FORMATS
@pytest.mark.parametrize("update", ["forward", "manual"])
def test_other_update_rules_write_what_they_compute(format, update):
    model = normalized(update=update)
    other = target(format)
    other.load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(other(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)


@FORMATS
def test_weight_changed_since_its_last_use_is_written_as_it_is_now(format):
    model = normalized()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other = target(format)
    other.load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(other(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@FORMATS
def test_other_types(format, dtype):
    model = add_spectral_norm(nn.Sequential(nn.Linear(20, 30)).to(dtype)).eval()
    other = nn.Sequential(TARGETS[format](nn.Linear(20, 30).to(dtype))).eval()
    other.load_state_dict(export_state_dict(model, format))
    inputs = torch.eye(20, dtype=dtype)
    # Torch's layers compute the norm itself in the half type, to a few units in its last place.
    tolerance = 1e-12 if dtype is torch.float64 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(other(inputs), model(inputs), rtol=tolerance, atol=tolerance)


@FORMATS
def test_vector(format):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.weight

    model, other = sn.spectral_norm(Scale()), TARGETS[format](Scale()).eval()
    other.load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(other(torch.ones(5)), model(torch.ones(5)))


def test_complex_weights_reach_torchs_parametrization():
    model, other = (nn.Linear(4, 3, dtype=torch.complex64) for _ in range(2))
    sn.spectral_norm(model)
    torch_parametrizations.spectral_norm(other).eval()
    other.load_state_dict(export_state_dict(model, "torch"))
    inputs = torch.eye(4, dtype=torch.complex64)
    torch.testing.assert_close(other(inputs), model.eval()(inputs))


class TestTiedWeights:
    @staticmethod
    def make() -> nn.Module:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
                self.head.weight = self.table.weight

            def forward(self, indices: Tensor) -> Tensor:
                return self.head(self.table(indices))

        return Tied()

    @FORMATS
    def test_load_strictly_and_compute_the_same(self, format):
        model = normalized(self.make)
        other = target(format, self.make)
        other.load_state_dict(export_state_dict(model, format))
        torch.testing.assert_close(other(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)

    def test_stay_one_tensor_when_baked(self):
        state = export_state_dict(normalized(self.make), "plain")
        assert state["table.weight"] is state["head.weight"]

    @FORMATS
    def test_come_back_strictly(self, format):
        model, again = normalized(self.make), normalized(self.make, steps=0)
        again.load_state_dict(export_state_dict(model, format))
        torch.testing.assert_close(again.eval()(INDICES), model.eval()(INDICES), rtol=1e-4, atol=1e-5)
        assert again.table.parametrizations.weight.original is again.head.parametrizations.weight.original


@FORMATS
def test_layer_that_stands_twice_in_the_model_is_written_twice(format):
    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, other = add_spectral_norm(make()), make()
    TARGETS[format](other[0])
    other.eval().load_state_dict(export_state_dict(model, format))
    torch.testing.assert_close(other(torch.eye(4)), model(torch.eye(4)), rtol=1e-4, atol=1e-5)


class TestSettingsThatTorchDoesNotHave:
    INEXPRESSIBLE = pytest.mark.parametrize(
        ("options", "raw_norm"),
        [({"coefficient": 0.5}, 3.0), ({"mode": "cap", "coefficient": 4.0}, 3.0), ({}, 0.0)],
        ids=["coefficient", "cap that leaves the weight alone", "zero weight"],
    )

    @staticmethod
    def make(options: dict, raw_norm: float) -> nn.Sequential:
        layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            layer.weight.copy_(raw_norm * torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.1])))
        return add_spectral_norm(nn.Sequential(nn.ReLU(), layer), **options)

    @INEXPRESSIBLE
    @pytest.mark.parametrize("format", ["torch", "torch-hook"])
    def test_are_refused_with_the_layers_name_and_the_way_out(self, options, raw_norm, format):
        model = self.make(options, raw_norm)
        with pytest.raises(UserError, match=r"1\.weight .* write 'plain'"):
            export_state_dict(model, format)
        assert next(iter(model.state_dict())).startswith("1.parametrizations")

    @INEXPRESSIBLE
    def test_are_baked_into_plain_weights(self, options, raw_norm):
        model = self.make(options, raw_norm)
        plain = nn.Sequential(nn.ReLU(), nn.Linear(4, 4, bias=False))
        plain.load_state_dict(export_state_dict(model, "plain"))
        assert torch.equal(plain[1].weight, model[1].weight)

    @FORMATS
    def test_cap_at_one_that_divides_is_the_same_as_torch(self, format):
        model = self.make({"mode": "cap"}, 3.0)
        other = nn.Sequential(nn.ReLU(), TARGETS[format](nn.Linear(4, 4, bias=False))).eval()
        other.load_state_dict(export_state_dict(model, format))
        torch.testing.assert_close(other(torch.eye(4)), model(torch.eye(4)))


class Double(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


class TestOtherParametrizations:
    @staticmethod
    def make(normalize) -> nn.Linear:
        layer = normalize(nn.Linear(4, 3))
        parametrize.register_parametrization(layer, "weight", Double())
        parametrize.register_parametrization(layer, "bias", Double())
        return layer.eval()

    def test_on_top_stay_in_torchs_format(self):
        model, other = self.make(sn.spectral_norm), self.make(torch_parametrizations.spectral_norm)
        other.load_state_dict(export_state_dict(model, "torch"))
        torch.testing.assert_close(other(torch.eye(4)), model(torch.eye(4)))

    def test_of_the_same_weight_are_baked_with_it_and_others_stay(self):
        model, other = self.make(sn.spectral_norm), nn.Linear(4, 3)
        parametrize.register_parametrization(other, "bias", Double())
        other.load_state_dict(export_state_dict(model, "plain"))
        torch.testing.assert_close(other(torch.eye(4)), model(torch.eye(4)))

    def test_below_are_applied_first(self):
        model, other = nn.Linear(4, 3), nn.Linear(4, 3)
        for layer, normalize in ((model, sn.spectral_norm), (other, torch_parametrizations.spectral_norm)):
            torch_parametrizations.weight_norm(layer)
            normalize(layer)
            layer.eval()
        other.load_state_dict(export_state_dict(model, "torch"))
        torch.testing.assert_close(other(torch.eye(4)), model(torch.eye(4)), rtol=1e-4, atol=1e-5)

    def test_are_refused_in_the_hooks_format(self):
        with pytest.raises(UserError, match="SpectralNorm, Double"):
            export_state_dict(self.make(sn.spectral_norm), "torch-hook")


class TestRefusals:
    def test_unknown_format(self):
        with pytest.raises(UserError, match=r"'plain'.*'onnx'"):
            export_state_dict(nn.Linear(2, 2), "onnx")

    def test_weight_without_values(self):
        with torch.device("meta"):
            model = add_spectral_norm(nn.Sequential(nn.Linear(4, 3)))
        with pytest.raises(UserError, match=r"0\.weight has no values"):
            export_state_dict(model, "plain")

    @pytest.mark.parametrize("format", TARGETS)
    def test_lazy_weight_that_was_loaded_and_waits_for_its_first_forward(self, format):
        model = add_spectral_norm(nn.Sequential(nn.LazyLinear(3)))
        model.load_state_dict(nn.Sequential(nn.Linear(4, 3)).state_dict())
        with pytest.raises(UserError, match="0 is normalized from its first forward on; run one"):
            export_state_dict(model, format)
        model(torch.ones(1, 4))
        assert export_state_dict(model, format)

    @pytest.mark.parametrize("by", ["torch", "torch-hook"])
    def test_weight_that_torch_normalizes_is_not_written_in_another_format(self, by):
        model = nn.Sequential(TARGETS[by](nn.Linear(4, 3)))
        for format in TARGETS:
            if format == by:
                assert list(export_state_dict(model, format)) == list(model.state_dict())
            else:
                with pytest.raises(UserError, match="0 is normalized by torch"):
                    export_state_dict(model, format)


def test_exported_weights_share_no_memory_with_what_is_kept():
    layer = sn.spectral_norm(nn.Linear(4, 3))
    before = layer.weight.detach().clone()
    export_state_dict(layer, "plain")["weight"].zero_()
    for vector in ("weight_u", "weight_v"):
        export_state_dict(layer, "torch-hook")[vector].zero_()
    assert torch.equal(layer.weight, before)


@FORMATS
def test_safetensors_round_trip(format, tmp_path):
    model = normalized().eval()
    save_file(export_state_dict(model, format), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    for again in (target(format), normalized(steps=0).eval()):
        again.load_state_dict(state)  # the file holds no metadata: the hook must do without
        torch.testing.assert_close(again(INDICES), model(INDICES), rtol=1e-4, atol=1e-5)
