"""Normalized models leave PyTorch's eager mode: by torch.export, ONNX, torch.fx and TorchScript.

What comes out computes what the eager model does. In ONNX files and scripts that is to float32 rounding (1e-5), since
another runtime adds up in another order.
"""

import copy
import io
import pickle
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations as torch_parametrizations

from spectralnorm import UserError, add_spectral_norm, remove_spectral_norm, spectral_norm, update_
from spectralnorm.parametrizations import is_normalized

pytestmark = pytest.mark.usefixtures("nothing_compiled")

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def images_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(600, 5),
    )


class SequenceModel(nn.Module):
    """One-dimensional layers, a table, and a weight that is read rather than used by its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.mix = nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 7)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.up(self.conv(self.table(indices).transpose(1, 2))).mean(-1)
        return nn.functional.linear(self.mix(hidden), self.head.weight, self.head.bias)


class VolumeModel(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, groups=2))


MODELS = {
    "images": (images_model, IMAGES),
    "sequences": (SequenceModel, torch.arange(12).view(2, 6) % 7),
    "volumes": (VolumeModel, torch.linspace(-1, 1, 54).view(1, 2, 3, 3, 3)),
}
each_model = pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)
OPTIONS = {
    "cap": {"mode": "cap", "coefficient": 0.7},
    "learnable": {"mode": "learnable", "coefficient": 2.0},
    "bidirectional": {"norm": "bidirectional"},
    "forward": {"update": "forward"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def normalized(make, inputs: Tensor, **options) -> nn.Module:
    """A model that was trained for two steps."""
    model = add_spectral_norm(make(), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    model(inputs)  # the buffers hold the vectors of the weight as it is now
    return model


class TestOnnx:
    @staticmethod
    def run(model: nn.Module, inputs: Tensor, path: Path, **options) -> Tensor:
        torch.onnx.export(model, (inputs,), path, **options)
        session = onnxruntime.InferenceSession(path)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        return torch.from_numpy(outputs)

    @each_model
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tracing_exporter(self, make, inputs, tmp_path):
        model = normalized(make, inputs).eval()
        outputs = self.run(model, inputs, tmp_path / "model.onnx", dynamo=False)
        torch.testing.assert_close(outputs, model(inputs), rtol=1e-5, atol=1e-5)

    @each_option
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tracing_exporter_with_options(self, options, tmp_path):
        model = normalized(images_model, IMAGES, **options).eval()
        outputs = self.run(model, IMAGES, tmp_path / "model.onnx", dynamo=False)
        torch.testing.assert_close(outputs, model(IMAGES), rtol=1e-5, atol=1e-5)

    @each_model
    def test_exporter_of_captured_programs(self, make, inputs, tmp_path):
        model = normalized(make, inputs).eval()
        outputs = self.run(model, inputs, tmp_path / "model.onnx", dynamo=True, verbose=False)
        torch.testing.assert_close(outputs, model(inputs), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["learnable", "bidirectional"])
    def test_exporter_of_captured_programs_with_options(self, name, tmp_path):
        model = normalized(images_model, IMAGES, **OPTIONS[name]).eval()
        outputs = self.run(model, IMAGES, tmp_path / "model.onnx", dynamo=True, verbose=False)
        torch.testing.assert_close(outputs, model(IMAGES), rtol=1e-5, atol=1e-5)

    def test_exporter_of_captured_programs_folds_the_norm_away(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        model = normalized(images_model, IMAGES).eval()
        # To optimize is the default from torch 2.7 on.
        self.run(model, IMAGES, tmp_path / "model.onnx", dynamo=True, optimize=True, verbose=False)
        kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
        assert kinds == {"Conv", "ConvTranspose", "Relu", "Reshape", "Gemm"}

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_exporting_leaves_the_model_as_it_was(self, tmp_path):
        model = normalized(images_model, IMAGES)
        before, expected = copy.deepcopy(model.state_dict()), model(IMAGES)
        for dynamo in (False, True):
            torch.onnx.export(model.eval(), (IMAGES,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
            model.train()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert torch.equal(model(IMAGES), expected)


@each_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fake_tensors_go_through_as_shapes(make, inputs, training):
    # As whoever asks for shapes or memory runs a model; torch.export with strict=True does up to torch 2.7.
    model, mode = normalized(make, inputs).train(training), FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    with mode:
        outputs = fake(mode.from_tensor(inputs))
    assert isinstance(outputs, FakeTensor)
    assert outputs.shape == model(inputs).shape


class TestExportedProgram:
    @pytest.fixture(autouse=True)
    def _nothing_is_compiled(self):
        # Up to torch 2.7 exports are from bytecode unless told otherwise, and count as compilations of the same code.
        torch._dynamo.reset()

    @each_model
    @pytest.mark.parametrize("strict", [False, True], ids=["traced", "from bytecode"])
    def test_of_eval_mode_computes_the_same(self, make, inputs, strict):
        model = normalized(make, inputs).eval()
        program = torch.export.export(model, (inputs,), strict=strict)
        torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-5, atol=1e-5)

    @each_option
    def test_with_options_computes_the_same(self, options):
        model = normalized(images_model, IMAGES, **options).eval()
        program = torch.export.export(model, (IMAGES,))
        torch.testing.assert_close(program.module()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_is_up_to_date_after_an_update(self, training):
        model = normalized(images_model, IMAGES).train(training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        update_(model)
        program = torch.export.export(model.eval(), (IMAGES,))
        torch.testing.assert_close(program.module()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)

    def test_takes_other_batch_sizes(self):
        model = normalized(images_model, IMAGES).eval()
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.randn(5, 3, 8, 8)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-5)

    def test_survives_its_file(self):
        model, file = normalized(images_model, IMAGES).eval(), io.BytesIO()
        torch.export.save(torch.export.export(model, (IMAGES,)), file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)

    def test_of_training_mode_advances_and_learns_as_torchs_algorithm(self):
        model, theirs = normalized(images_model, IMAGES), images_model()
        for layer in theirs:
            if hasattr(layer, "weight") and getattr(layer, "groups", 1) == 1:
                torch_parametrizations.spectral_norm(layer)
            elif hasattr(layer, "weight"):
                spectral_norm(layer, update="forward")
        theirs.load_state_dict(model.state_dict())
        program = torch.export.export(model, (IMAGES,)).module()
        for each in (program, theirs):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                each(IMAGES).square().sum().backward()
                optimizer.step()
        found = program.state_dict()
        for name, expected in theirs.state_dict().items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


class TestFx:
    @each_model
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_traced_graph_computes_the_same(self, make, inputs, training):
        model = normalized(make, inputs).train(training)
        traced = torch.fx.symbolic_trace(model)
        for each in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            torch.testing.assert_close(each(inputs), model(inputs), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [*OPTIONS.values(), {"strict": True}], ids=[*OPTIONS, "strict"])
    def test_with_options_computes_the_same(self, options):
        model = normalized(images_model, IMAGES, **options).eval()
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)

    def test_layers_stay_whole_as_without_normalization(self):
        def steps(model: nn.Module) -> list[tuple[str, str]]:
            return [(node.op, str(node.target)) for node in torch.fx.symbolic_trace(model).graph.nodes]

        assert steps(add_spectral_norm(images_model())) == steps(images_model())

    def test_traced_graph_trains_the_models_parameters(self):
        model = normalized(images_model, IMAGES)
        traced = torch.fx.symbolic_trace(model)
        model.zero_grad()
        traced(IMAGES).square().sum().backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            assert torch.equal(grad, parameter.grad)


def by_vmap(model: nn.Module) -> Tensor:
    state, skeleton = stack_module_state([model, copy.deepcopy(model)]), copy.deepcopy(model)
    return vmap(lambda parameters, buffers: functional_call(skeleton, (parameters, buffers), IMAGES))(*state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestRefusals:
    @staticmethod
    def model(**options) -> nn.Module:
        return nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3), **options)).eval()

    @pytest.mark.parametrize(
        "use",
        [
            lambda model: torch.export.export(model, (IMAGES,), strict=False),
            lambda model: torch.jit.trace(model, (IMAGES,)),
            lambda model: torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False),
            by_vmap,
        ],
        ids=["export", "trace", "tracing ONNX exporter", "vmap"],
    )
    def test_operator_norm_is_refused_in_one_sentence(self, use):
        model = self.model(norm="operator")
        with pytest.raises(UserError, match=r'^norm="operator" of a convolution needs ordinary execution.*[^.]+\.$'):
            use(model)
        model(IMAGES)
        assert model[0].parametrizations.weight[0].learned_size == (8, 8)

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="torch refuses it before, in its own words"
    )
    def test_strict_export_of_an_operator_norm_is_refused_in_one_sentence(self):
        with pytest.raises(UserError, match=r'^norm="operator" of a convolution needs ordinary execution.*[^.]+\.$'):
            torch.export.export(self.model(norm="operator"), (IMAGES,), strict=True)

    def test_trace_of_a_strict_norm_is_refused_in_one_sentence(self):
        with pytest.raises(UserError, match=r"^strict=True cannot be traced by torch\.jit\.trace.*[^.]+\.$"):
            torch.jit.trace(self.model(strict=True), (IMAGES,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestTorchScript:
    @pytest.mark.filterwarnings("ignore:torch.jit.script compiles normalized layers:UserWarning")
    @each_model
    def test_script_holds_the_baked_model(self, make, inputs):
        model = normalized(make, inputs).eval()
        expected = model(inputs)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(inputs), expected, rtol=1e-5, atol=1e-5)
        names = {name for name, _ in scripted.named_parameters()}
        assert names == {name for name, _ in make().named_parameters()}

    @pytest.mark.filterwarnings("ignore:torch.jit.script compiles normalized layers:UserWarning")
    @pytest.mark.parametrize(
        "options",
        [{"strict": True, "input_size": (8, 8)}, {"norm": "operator"}, {"norm": "operator", "input_size": (8, 8)}],
        ids=["strict, sized", "operator", "operator, sized"],
    )
    def test_script_of_a_convolution_that_looks_at_its_images(self, options):
        layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1), **options).eval()
        expected = layer(IMAGES)
        torch.testing.assert_close(torch.jit.script(nn.Sequential(layer))(IMAGES), expected, rtol=1e-5, atol=1e-5)

    def test_user_is_told_that_scripting_bakes_the_model_it_is_given(self):
        with pytest.warns(UserWarning, match=r"script remove_spectral_norm\(copy\.deepcopy\(model\)\)"):
            torch.jit.script(nn.Sequential(spectral_norm(nn.Linear(2, 2))))

    def test_script_of_a_baked_copy_leaves_the_model_alone_and_survives_its_file(self):
        model, file = normalized(images_model, IMAGES).eval(), io.BytesIO()
        torch.jit.save(torch.jit.script(remove_spectral_norm(copy.deepcopy(model))), file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
        assert all(is_normalized(layer) for layer in model if hasattr(layer, "weight"))

    @each_model
    def test_trace_of_eval_mode_computes_the_same(self, make, inputs):
        model = normalized(make, inputs).eval()
        traced = torch.jit.trace(model, (inputs,))
        torch.testing.assert_close(traced(inputs), model(inputs), rtol=1e-5, atol=1e-5)

    def test_trace_holds_the_formula_and_not_its_value(self):
        layer, inputs = spectral_norm(nn.Linear(4, 3, bias=False)).eval(), torch.eye(4)
        traced = torch.jit.trace(layer, (inputs,))
        expected = traced(inputs)
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(3)  # shared with the trace; u and v stay the right ones
        torch.testing.assert_close(traced(inputs), expected)
