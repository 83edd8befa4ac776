"""Extractors from a file: DINOv2 against one written out by hand, TorchScript files, Inception's name and refusals."""

import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.references.dinov2 import dinov2
from torch import Tensor, nn
from torch.nn import functional as F

from spectralnorm.errors import UserError
from spectralnorm.metrics import FeatureExtractor, extractor_files, load_extractor
from spectralnorm.metrics.dinov2 import dinov2_from_weights

WIDTH, DEPTH = 128, 2


def random_weights(*, grid: int = 5, registers: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names, of a small network."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, WIDTH),
        "pos_embed": (1, 1 + grid * grid, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    for block in range(DEPTH):
        p = f"blocks.{block}."
        for name, size in (("attn.qkv", (3 * WIDTH, WIDTH)), ("attn.proj", (WIDTH, WIDTH))):
            shapes |= {p + name + ".weight": size, p + name + ".bias": size[:1]}
        for name, size in (("mlp.fc1", (4 * WIDTH, WIDTH)), ("mlp.fc2", (WIDTH, 4 * WIDTH))):
            shapes |= {p + name + ".weight": size, p + name + ".bias": size[:1]}
        shapes |= {p + f"{name}.{part}": (WIDTH,) for name in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {p + "ls1.gamma": (WIDTH,), p + "ls2.gamma": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.5 if len(shape) == 1 else 0.1) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


class Means(nn.Module):
    """Means of the channels and, if asked, logits."""

    def __init__(self, *, logits: bool) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.float().mean(dim=(2, 3))
        return features, features[:, :2]


class OnlyMeans(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def script(path: Path, module: nn.Module, example: Tensor) -> Path:
    torch.jit.trace(module, example).save(str(path))
    return path


NOISE = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [70, 42], ids=["at its own grid", "at another grid"])
def test_dinov2_computes_the_published_network(size: int) -> None:
    weights = random_weights()
    image = 255 * torch.rand(3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, logits = dinov2_from_weights(weights, what="a file").double()(image[None].double())
    assert logits is None
    torch.testing.assert_close(found[0], dinov2(weights, image, depth=DEPTH), rtol=1e-5, atol=1e-5)


def test_registers_are_tokens_without_a_position() -> None:
    weights = random_weights(registers=4)
    network = dinov2_from_weights(weights, what="a file")
    assert network.register_tokens is not None
    images = 255 * torch.rand(1, 3, 70, 70)
    with torch.no_grad():
        before = network(images)[0]
        network.register_tokens += 1
        assert not torch.allclose(network(images)[0], before)
        # Registers that nothing attends to leave the network without them.
        network.register_tokens = None
        plain = dinov2_from_weights({k: v for k, v in weights.items() if k != "register_tokens"}, what="a file")
        torch.testing.assert_close(network(images)[0], plain(images)[0])


def test_a_file_of_dinov2_weights_is_an_extractor_with_bicubic_resize(tmp_path: Path, device: torch.device) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(random_weights(), file)
    extractor = load_extractor("dinov2", device=device, weights=file)
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.num_features) == ("DINOv2", WIDTH)
    assert extractor.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert extractor.resize_description(40, 40) == "bicubic, antialiased, 40 -> 224"
    resized = F.interpolate(NOISE.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        expected = dinov2_from_weights(random_weights(), what="a file").eval()(resized)[0]
    torch.testing.assert_close(extractor(NOISE).features, expected, rtol=1e-3, atol=1e-3)


def test_a_torchscript_dinov2_is_fed_normalized_images(tmp_path: Path) -> None:
    file = script(tmp_path / "network.pt", OnlyMeans(), torch.zeros(2, 3, 224, 224))
    features = load_extractor("dinov2", weights=file)(torch.full((2, 3, 30, 30), 255, dtype=torch.uint8)).features
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(features, expected.expand(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("cls_token"), "published names \\('cls_token' is missing\\)"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 16, 16)}), "patches of 14 pixels"),
        (lambda w: w.update({"blocks.0.mlp.w12.weight": torch.zeros(1)}), "is not DINOv2 S, B or L"),
        (lambda w: w.pop("blocks.1.ls1.gamma"), "does not fit DINOv2 of 2 blocks and width 128"),
    ],
)
def test_other_weights_than_dinov2s_are_refused(tmp_path: Path, change, message: str) -> None:
    weights = random_weights()
    change(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        load_extractor("dinov2", weights=tmp_path / "weights.safetensors")


def test_a_torchscript_file_of_ones_own_sees_levels_in_rgb(tmp_path: Path, device: torch.device) -> None:
    file = script(tmp_path / "mine.pt", Means(logits=True), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    extractor = load_extractor(str(file), device=device)
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.num_features) == ("mine", 3)
    features, logits = extractor(NOISE[:, :1])
    torch.testing.assert_close(features, NOISE[:, :1].float().mean(dim=(2, 3)).expand(-1, 3))
    assert logits is not None
    assert logits.shape == (3, 2)
    assert extractor.resize_description(40, 40, channels=1) == "by the network, 40; gray repeated to RGB"
    assert extractor.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_network_that_gives_no_features_is_refused(tmp_path: Path) -> None:
    file = script(tmp_path / "mine.pt", nn.Identity(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"must give features \(n, d\)"):
        load_extractor(str(file))
    file = script(tmp_path / "floats.pt", nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="it must resize and normalize them itself"):
        load_extractor(str(file))


def test_files_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="is no readable TorchScript file"):
        load_extractor(str(tmp_path / "text.pt"))
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        load_extractor(str(tmp_path / "nowhere.pt"))
    with pytest.raises(UserError, match="needs a file of weights, which is never downloaded; give it as weights"):
        load_extractor("dinov2")
    with pytest.raises(UserError, match="comes with its weights; leave out the file"):
        load_extractor("squeezenet", weights=tmp_path / "text.pt")


class FakeInception(nn.Module):
    """Has the face of torch-fidelity's class."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.scale = nn.Parameter(torch.load(feature_extractor_weights_path, weights_only=True)["scale"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.float().mean(dim=(2, 3)) * self.scale
        return means, means.repeat(1, 2)


@pytest.fixture
def inception_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_inception_is_torch_fidelitys_network(inception_file: Path) -> None:
    extractor = load_extractor("inception", weights=inception_file)
    features, logits = extractor(NOISE)
    torch.testing.assert_close(features, 2 * NOISE.float().mean(dim=(2, 3)))
    assert logits is not None
    assert logits.shape == (3, 6)
    assert extractor.name == "Inception"


def test_only_the_published_weights_make_a_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_extractor("inception", weights=inception_file).is_published_inception  # pyright: ignore
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(extractor_files, "PUBLISHED_INCEPTION", digest[:8])
    assert load_extractor("inception", weights=inception_file).is_published_inception  # pyright: ignore


def test_inception_without_torch_fidelity_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'spectralnorm\[inception\]'"):
        load_extractor("inception", weights=tmp_path / "weights.pth")


@pytest.mark.usefixtures("inception_file")
def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"scale": Path("anything but a tensor")}, tmp_path / "unsafe.pth")
    with pytest.raises(UserError, match="does not hold the weights of torch-fidelity's Inception"):
        load_extractor("inception", weights=tmp_path / "unsafe.pth")
