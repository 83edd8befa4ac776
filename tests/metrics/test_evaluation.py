"""All metrics together: their values, floors, provenance, and what is kept between evaluations."""

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics import (
    CriticOptions,
    FeatureExtractor,
    Features,
    evaluate,
    frechet_distance,
    load_extractor,
    measures,
    wasserstein_lower_bound,
)
from spectralnorm.records import Metric

WITH_BOUND = ("fd", "kid", "wasserstein")


class MeanExtractor:
    """Sees the mean of each quarter of an image, and counts how many images it has looked at."""

    name = "Mean"
    weights_sha256 = "0" * 64
    num_features = 4

    def __init__(self, *, logits: bool = True) -> None:
        self.images_seen = 0
        self.is_published_inception = False
        self._logits = logits

    def resize_description(self, height: int, width: int, *, channels: int = 3) -> str:
        return f"none, {height} x {width} x {channels}"

    def __call__(self, images: Tensor) -> Features:
        self.images_seen += len(images)
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).mean(1).flatten(1)
        return Features(quarters, quarters / 10 if self._logits else None)


def noise(num: int, *, low: int = 0, high: int = 256, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num, channels, 8, 8), dtype=torch.uint8, generator=generator)


def by_name(metrics: tuple[Metric, ...]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


def measure(fake: Tensor, real: Tensor, extractor: FeatureExtractor | None = None, **options) -> dict[str, Metric]:
    return by_name(evaluate(fake, real, extractors=[extractor or MeanExtractor()], **options))


def test_an_extractor_with_logits_gives_distances_and_classes() -> None:
    assert list(measure(noise(20), noise(40))) == [
        "FD-Mean",
        "KID-Mean",
        "Class coverage",
        "Class entropy",
        "Confident share",
    ]


def test_an_extractor_without_logits_gives_distances_only() -> None:
    assert list(measure(noise(20), noise(40), MeanExtractor(logits=False))) == ["FD-Mean", "KID-Mean"]


@pytest.mark.usefixtures("quick_critic")
def test_the_wasserstein_bound_comes_when_asked_with_its_floor_and_what_it_rests_on() -> None:
    metrics = measure(noise(60, high=150), noise(150, seed=1), MeanExtractor(logits=False), metrics=WITH_BOUND)
    assert list(metrics) == ["FD-Mean", "KID-Mean", "W1 lower bound-Mean"]
    bound = metrics["W1 lower bound-Mean"]
    assert bound.floor is not None
    # The means of four quarters differ by 53 each, a distance of 106 that a linear critic sees.
    assert 20 < bound.value < bound.details["estimate"] * 1.1 < 130
    assert bound.floor < 5
    assert bound.details["critic's constant"] == pytest.approx(1, abs=1e-6)
    assert (bound.details["real images for the bound"], bound.details["generated images for the bound"]) == (45, 30)
    assert bound.provenance == metrics["FD-Mean"].provenance


@pytest.fixture
def quick_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(wasserstein_lower_bound, options=CriticOptions(width=4, num_hidden=1, num_steps=3))
    monkeypatch.setattr(measures, "wasserstein_lower_bound", quick)


@pytest.mark.usefixtures("quick_critic")
def test_all_that_is_possible_comes_with_logits_and_training_images() -> None:
    metrics = measure(noise(60, seed=2), noise(150, seed=1), metrics=("all",), training=noise(80, seed=3))
    assert list(metrics) == [
        *(
            "FD-Mean",
            "KID-Mean",
            "W1 lower bound-Mean",
            "Class coverage",
            "Class entropy",
            "Confident share",
            "IS-Mean",
        ),
        *("Precision-Mean", "Recall-Mean", "Density-Mean", "Coverage-Mean"),
        *("Diversity-Mean", "Diversity within classes-Mean", "Copied share-Mean"),
    ]
    assert all(metric.floor is not None for metric in metrics.values())


@pytest.mark.usefixtures("quick_critic")
def test_all_leaves_out_what_is_not_possible_and_a_name_does_not() -> None:
    extractor = MeanExtractor(logits=False)
    names = list(measure(noise(20), noise(60, seed=1), extractor, metrics=("all",)))
    assert "IS-Mean" not in names
    assert "Copied share-Mean" not in names
    assert "Recall-Mean" in names
    with pytest.raises(UserError, match="The metric 'is' needs an extractor that classifies"):
        measure(noise(20), noise(40), extractor, metrics=("fd", "is"))
    with pytest.raises(UserError, match="The metric 'copying' needs the images that were trained on"):
        measure(noise(20), noise(40), metrics=("copying",))
    with pytest.raises(UserError, match="Unknown metric 'fdd'; choose of fd, kid"):
        measure(noise(20), noise(40), metrics=("fdd",))


@pytest.mark.usefixtures("quick_critic")
@pytest.mark.parametrize(
    ("num_fake", "num_real", "left_out"),
    [
        (2, 2, {"W1 lower bound-Mean", "Precision-Mean", "Density-Mean"}),
        (8, 13, {"W1 lower bound-Mean"}),
        (20, 39, {"W1 lower bound-Mean"}),
        (2, 40, {"W1 lower bound-Mean", "Precision-Mean"}),
        (20, 40, set()),
    ],
)
def test_all_leaves_out_what_few_images_do_not_allow(num_fake: int, num_real: int, left_out: set[str]) -> None:
    some = {"FD-Mean", "KID-Mean", "Diversity-Mean", "W1 lower bound-Mean", "Precision-Mean", "Density-Mean"}
    found = measure(noise(num_fake), noise(num_real, seed=1), metrics=("all",))
    assert some - found.keys() == left_out
    if "W1 lower bound-Mean" in left_out:
        with pytest.raises(UserError, match="'wasserstein' needs at least 20 generated and 20 real images beside"):
            measure(noise(num_fake), noise(num_real, seed=1), metrics=("wasserstein",))


@pytest.mark.usefixtures("quick_critic")
def test_all_leaves_out_what_copies_of_one_image_do_not_allow() -> None:
    copies = noise(1).expand(40, -1, -1, -1)
    found = measure(noise(20, seed=1), copies, metrics=("all",))
    assert "FD-Mean" in found
    assert "Diversity-Mean" not in found
    with pytest.raises(UserError, match="The metric 'diversity' needs real images that differ"):
        measure(noise(20, seed=1), copies, metrics=("diversity",))


@pytest.mark.parametrize(("num_fake", "num_real"), [(2, 40), (20, 4), (20, 2)])
def test_two_images_of_a_side_give_the_kernel_distance_no_interval(num_fake: int, num_real: int) -> None:
    found = measure(noise(num_fake), noise(num_real, seed=1), metrics=("kid",), with_intervals=True)["KID-Mean"]
    assert found.interval is None
    assert "standard error" not in found.details


def test_every_floor_is_what_the_stand_ins_score() -> None:
    real, extractor = noise(100, seed=1), MeanExtractor()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    names = ("fd", "kid", "classes", "is", "pr", "dc", "diversity", "copying")
    found = measure(real[order[:30]], real, extractor, metrics=names, training=noise(50, seed=4))
    for metric in found.values():
        assert metric.floor == pytest.approx(metric.value, rel=1e-9), metric.name


def test_copied_training_images_are_found() -> None:
    training, real = noise(80, seed=3), noise(100, seed=1)
    honest = measure(noise(50, seed=2), real, metrics=("copying",), training=training)["Copied share-Mean"]
    copies = measure(training[:50], real, metrics=("copying",), training=training)["Copied share-Mean"]
    assert honest.value < 0.2
    assert copies.value == 1
    assert copies.details["median distance over that of held-out ones"] == pytest.approx(0, abs=1e-6)


def test_what_was_trained_on_is_looked_at_once_and_only_for_copies() -> None:
    extractor, training = MeanExtractor(), noise(80, seed=3)
    measure(noise(20), noise(40, seed=1), extractor, training=training)
    assert extractor.images_seen == 60
    for seen in (160, 180):
        measure(noise(20), noise(40, seed=1), extractor, metrics=("copying",), training=training)
        assert extractor.images_seen == seen


def test_neighbours_of_the_real_images_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = measures.smallest_distances
    monkeypatch.setattr(measures, "smallest_distances", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = measure(noise(20), noise(60, seed=1), metrics=("pr", "dc"))
    assert len(calls) == 1
    assert measure(noise(20), noise(60, seed=1), metrics=("pr", "dc")) == first
    assert len(calls) == 1


def test_intervals_hold_the_value_and_come_when_asked() -> None:
    without = measure(noise(60), noise(150, seed=1))
    metrics = measure(noise(60), noise(150, seed=1), with_intervals=True)
    for name in ("FD-Mean", "KID-Mean"):
        assert without[name].interval is None
        assert metrics[name].value == without[name].value
        interval = metrics[name].interval
        assert interval is not None
        assert interval[0] < metrics[name].value < interval[1]


def test_progress_is_told_from_none_to_all() -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    measure(noise(20), noise(40), progress=lambda what, done, total: told.setdefault(what, []).append((done, total)))
    assert list(told) == ["Mean: real images", "Mean: generated images", "Mean: fd", "Mean: kid", "Mean: classes"]
    for steps in told.values():
        assert (steps[0][0], steps[-1][0]) == (0, steps[-1][1])


def test_only_the_published_inceptions_distance_is_called_fid() -> None:
    extractor = MeanExtractor()
    extractor.is_published_inception = True
    names = list(measure(noise(20), noise(60, seed=1), extractor, metrics=("fd", "kid", "is", "pr")))
    assert names == ["FID", "KID", "IS", "Precision-Mean", "Recall-Mean"]


def test_the_packages_extractors_name_their_metrics(device: torch.device) -> None:
    extractors = [load_extractor(name, device=device) for name in ("classifier", "squeezenet")]
    names = list(by_name(evaluate(noise(6), noise(8, seed=1), extractors=extractors)))
    assert names == [
        *("FD-Classifier", "KID-Classifier", "Class coverage", "Class entropy", "Confident share"),
        *("FD-SqueezeNet", "KID-SqueezeNet"),
    ]


def test_every_number_tells_where_it_comes_from() -> None:
    for metric in measure(noise(30), noise(100, seed=1), split="test images").values():
        assert metric.provenance.extractor == "Mean"
        assert metric.provenance.weights_sha256 == "0" * 64
        assert (metric.provenance.num_real, metric.provenance.num_fake) == (70, 30)
        assert metric.provenance.split == "test images"
        assert metric.provenance.resize == "none, 8 x 8 x 1"


@pytest.mark.parametrize(("num_fake", "num_real", "reference"), [(30, 100, 70), (80, 100, 50), (5, 3, 3), (5, 4, 2)])
def test_as_many_real_images_as_generated_ones_stand_aside_but_at_most_half(
    num_fake: int, num_real: int, reference: int
) -> None:
    assert measure(noise(num_fake), noise(num_real, seed=1))["FD-Mean"].provenance.num_real == reference


def test_the_floor_is_the_distance_of_the_stand_ins_to_the_same_reference() -> None:
    real, extractor = noise(100, seed=1), MeanExtractor()
    # The stand-ins themselves, as the generated images: then value and floor must be one number.
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for metric in measure(real[order[:30]], real, extractor).values():
        assert metric.floor == pytest.approx(metric.value, rel=1e-9)
    expected = frechet_distance(extractor(real[order[30:]]).features, extractor(real[order[:30]]).features)
    assert measure(noise(30), real)["FD-Mean"].floor == pytest.approx(expected)


def test_images_as_good_as_real_ones_score_about_the_floor() -> None:
    frechet = measure(noise(500, seed=2), noise(1000, seed=1))["FD-Mean"]
    assert frechet.floor is not None
    assert frechet.value < 3 * frechet.floor


def test_worse_images_score_far_above_the_floor() -> None:
    metrics = measure(noise(500, high=200, seed=2), noise(1000, seed=1))
    for name in ("FD-Mean", "KID-Mean"):
        floor = metrics[name].floor
        assert floor is not None
        assert metrics[name].value > 20 * abs(floor)


def test_too_few_real_images_to_be_parted_leave_out_the_floors() -> None:
    metrics = measure(noise(20), noise(3, seed=1))
    assert all(metric.floor is None for metric in metrics.values())
    assert all(math.isfinite(metric.value) for metric in metrics.values())


def test_higher_is_better_for_classes_and_lower_for_distances() -> None:
    better = {name: metric.better for name, metric in measure(noise(20), noise(40)).items()}
    assert better.pop("FD-Mean") == better.pop("KID-Mean") == "lower"
    assert set(better.values()) == {"higher"}


def test_class_coverage_holds_the_share_of_each_class_by_name() -> None:
    fake = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    fake[:3, :, :4, 4:] = 255
    fake[3:, :, 4:, :4] = 255
    coverage = measure(fake, noise(20), class_names=("coat", "boot", "bag", "shirt"))["Class coverage"]
    assert coverage.value == 2
    assert coverage.details == {"coat": 0.0, "boot": 0.75, "bag": 0.25, "shirt": 0.0}


def test_names_for_another_number_of_classes_are_refused() -> None:
    with pytest.raises(UserError, match="Mean knows 4 classes, but 2 names were given"):
        measure(noise(20), noise(40), class_names=("a", "b"))


def test_the_same_call_gives_the_same_numbers() -> None:
    assert measure(noise(20), noise(40, seed=1)) == measure(noise(20), noise(40, seed=1))


def test_the_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    measure(noise(20), noise(40, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_real_images_are_looked_at_once() -> None:
    extractor, real = MeanExtractor(), noise(40, seed=1)
    first = measure(noise(20), real, extractor)
    assert extractor.images_seen == 60
    assert measure(noise(20), real.clone(), extractor) == first
    assert extractor.images_seen == 80


def test_other_real_images_and_other_weights_are_looked_at_anew() -> None:
    extractor, real = MeanExtractor(), noise(40, seed=1)
    measure(noise(20), real, extractor)
    changed = real.clone()
    changed[39, 0, 7, 7] ^= 1
    measure(noise(20), changed, extractor)
    assert extractor.images_seen == 120
    extractor.weights_sha256 = "1" * 64
    measure(noise(20), real, extractor)
    assert extractor.images_seen == 180


def test_a_damaged_cache_changes_no_number(cache: Path) -> None:
    real = noise(40, seed=1)
    first = measure(noise(20), real)
    entries = list((cache / "features").iterdir())
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:20])
    assert measure(noise(20), real) == first


def test_a_cache_that_cannot_be_written_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(noise(20), noise(40, seed=1))
    occupied = tmp_path / "a file"
    occupied.write_text("in the way")
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(occupied))
    assert measure(noise(20), noise(40, seed=1)) == first


@pytest.mark.parametrize(
    ("num_fake", "num_real", "message"),
    [(1, 40, "at least two generated images, got 1"), (20, 1, "at least two real images, got 1")],
)
def test_too_few_images_are_refused(num_fake: int, num_real: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(noise(num_fake), noise(num_real))


def test_images_of_another_size_than_the_real_ones_are_refused() -> None:
    with pytest.raises(UserError, match=r"the same channels, height and width, got \(3, 8, 8\) and \(1, 8, 8\)"):
        measure(noise(20, channels=3), noise(40))
