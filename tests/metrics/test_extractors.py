"""The extractors that come with the package, against networks written out by hand."""

import hashlib
from importlib import resources

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from spectralnorm.errors import UserError
from spectralnorm.gan.data import load_images
from spectralnorm.metrics import EXTRACTORS, FeatureExtractor, load_extractor


@pytest.fixture(params=EXTRACTORS, scope="module")
def any_extractor(request: pytest.FixtureRequest, device: torch.device) -> FeatureExtractor:
    return load_extractor(request.param, device=device)


@pytest.fixture(scope="module")
def squeezenet(device: torch.device) -> FeatureExtractor:
    return load_extractor("squeezenet", device=device)


@pytest.fixture(scope="module")
def classifier(device: torch.device) -> FeatureExtractor:
    return load_extractor("classifier", device=device)


def asset(folder: str, file: str) -> bytes:
    return (resources.files("spectralnorm") / "assets" / folder / file).read_bytes()


def squeezenet_by_hand(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """SqueezeNet 1.1's published layers, one after the other; images float64 (n, 3, 128, 128), RGB, 0 to 255."""

    def convolve(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double(), **options).clamp(min=0)

    red, green, blue = images.unbind(1)
    x = convolve(torch.stack([blue - 103.939, green - 116.779, red - 123.68], dim=1), "conv1", stride=2)
    for layer in range(2, 10):
        if layer in (2, 4, 6):
            x = F.max_pool2d(x, 3, 2)
        squeezed = convolve(x, f"fire{layer}.squeeze1x1")
        narrow = convolve(squeezed, f"fire{layer}.expand1x1")
        wide = convolve(squeezed, f"fire{layer}.expand3x3", padding=1)
        x = torch.cat([narrow, wide], dim=1)
    return x.mean(dim=(2, 3))


def test_squeezenet_computes_the_published_layers(squeezenet: FeatureExtractor) -> None:
    images = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8)
    weights = load(asset("squeezenet", "squeezenet1_1_features.safetensors"))
    expected = squeezenet_by_hand(images.double(), weights)
    torch.testing.assert_close(squeezenet(images).features.double(), expected, rtol=1e-4, atol=1e-3)


def test_squeezenet_resizes_bilinearly_with_antialiasing_and_without_rounding(squeezenet: FeatureExtractor) -> None:
    images = torch.randint(0, 256, (2, 3, 200, 48), dtype=torch.uint8)
    resized = F.interpolate(images.double(), (128, 128), mode="bilinear", antialias=True)
    weights = load(asset("squeezenet", "squeezenet1_1_features.safetensors"))
    expected = squeezenet_by_hand(resized, weights)
    torch.testing.assert_close(squeezenet(images).features.double(), expected, rtol=1e-4, atol=1e-3)


def test_squeezenet_tells_garments_apart(squeezenet: FeatureExtractor) -> None:
    data = load_images(None, image_size=32, channels=1)
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:400]
    assert data.labels is not None
    labels = data.labels[chosen]
    features = squeezenet(data.images[chosen]).features
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(1)] == labels).double().mean() > 0.6


def test_the_classifier_names_at_least_91_percent_of_the_test_images(classifier: FeatureExtractor) -> None:
    data = load_images(None, image_size=32, channels=1)
    logits = classifier(data.held_out).logits
    assert logits is not None
    assert data.held_out_labels is not None
    assert len(logits) == 10_000
    assert (logits.argmax(1) == data.held_out_labels).double().mean() >= 0.91


def test_the_classifiers_weights_are_small() -> None:
    assert len(asset("classifier", "classifier.safetensors")) <= 500_000


def test_the_classifiers_logits_are_its_last_layer_on_its_features(
    classifier: FeatureExtractor, images: Tensor
) -> None:
    features, logits = classifier(images)
    weights = load(asset("classifier", "classifier.safetensors"))
    expected = F.linear(features, weights["head.weight"].float(), weights["head.bias"].float())
    torch.testing.assert_close(logits, expected)


def test_the_classifier_averages_rgb_to_gray(classifier: FeatureExtractor, images: Tensor) -> None:
    torch.testing.assert_close(classifier(images.expand(-1, 3, -1, -1)), classifier(images))


def test_gray_counts_as_rgb_with_three_equal_channels(squeezenet: FeatureExtractor, images: Tensor) -> None:
    torch.testing.assert_close(squeezenet(images.expand(-1, 3, -1, -1)), squeezenet(images))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 3, 64, 64), (3, 1, 20, 40)])
def test_any_size_gives_finite_float32_features_on_the_cpu(
    any_extractor: FeatureExtractor, shape: tuple[int, ...]
) -> None:
    features, _ = any_extractor(torch.randint(0, 256, shape, dtype=torch.uint8))
    assert features.shape == (3, any_extractor.num_features)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    assert features.isfinite().all()


def test_every_extractor_keeps_the_protocol(any_extractor: FeatureExtractor) -> None:
    assert isinstance(any_extractor, FeatureExtractor)


def test_features_of_an_image_do_not_depend_on_the_others(any_extractor: FeatureExtractor) -> None:
    images = torch.randint(0, 256, (70, 1, 32, 32), dtype=torch.uint8)
    together = any_extractor(images).features
    torch.testing.assert_close(together[66:], any_extractor(images[66:]).features, rtol=1e-4, atol=1e-4)


def test_features_stay_float32_in_a_run_that_computes_with_less(
    any_extractor: FeatureExtractor, images: Tensor, device: torch.device
) -> None:
    expected = any_extractor(images).features
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(any_extractor(images).features, expected)


def test_the_global_random_numbers_are_left_alone(any_extractor: FeatureExtractor, images: Tensor) -> None:
    before = torch.get_rng_state()
    any_extractor(images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "file"),
    [("classifier", "classifier.safetensors"), ("squeezenet", "squeezenet1_1_features.safetensors")],
)
def test_the_hash_is_of_the_shipped_file(name: str, file: str) -> None:
    assert load_extractor(name).weights_sha256 == hashlib.sha256(asset(name, file)).hexdigest()


@pytest.mark.parametrize("name", EXTRACTORS)
def test_licences_lie_beside_the_weights(name: str) -> None:
    text = " ".join(asset(name, "LICENSE").decode().split())
    assert "Permission is hereby granted, free of charge" in text
    assert "WITHOUT WARRANTY OF ANY KIND" in text


@pytest.mark.parametrize(
    ("name", "height", "width", "channels", "expected"),
    [
        ("squeezenet", 32, 32, 1, "bilinear, antialiased, 32 -> 128; gray repeated to RGB"),
        ("squeezenet", 64, 48, 3, "bilinear, antialiased, 64 x 48 -> 128"),
        ("squeezenet", 128, 128, 3, "none, 128"),
        ("classifier", 32, 32, 1, "none, 32"),
        ("classifier", 64, 64, 3, "bilinear, antialiased, 64 -> 32; RGB averaged to gray"),
    ],
)
def test_the_way_images_are_made_to_fit_is_told(
    name: str, height: int, width: int, channels: int, expected: str
) -> None:
    assert load_extractor(name).resize_description(height, width, channels=channels) == expected


def test_an_unknown_extractor_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="Unknown feature extractor 'hing'; choose one of classifier, squeezenet"):
        load_extractor("hing")


@pytest.mark.parametrize(
    "wrong",
    [
        torch.rand(2, 1, 32, 32),
        torch.zeros(2, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 4, 32, 32, dtype=torch.uint8),
        torch.zeros(0, 1, 32, 32, dtype=torch.uint8),
    ],
    ids=["float", "three dimensions", "four channels", "empty"],
)
def test_other_than_uint8_images_are_refused(any_extractor: FeatureExtractor, wrong: Tensor) -> None:
    with pytest.raises(UserError, match="Images must be uint8"):
        any_extractor(wrong)
