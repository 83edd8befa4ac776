"""Points in the plane: the mixtures, their pictures, their metrics, and a run on them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from spectralnorm.cli import main
from spectralnorm.errors import UserError
from spectralnorm.gan.data.points import MIXTURES, open_points
from spectralnorm.gan.point_metrics import measure_points
from spectralnorm.gan.recipes import make_config
from spectralnorm.gan.run import train
from spectralnorm.gan.sampling import load
from spectralnorm.gan.scatter import SIDE, scatter
from spectralnorm.metrics import CriticOptions, wasserstein_lower_bound


@pytest.mark.parametrize(("name", "num_modes"), [("toy-ring", 8), ("toy-grid", 25)])
def test_points_lie_around_their_modes(name: str, num_modes: int):
    images, mixture = open_points(name), MIXTURES[name]
    points = images.images.flatten(1)
    assert points.shape == (100_000, 2)
    assert len(mixture.centers) == len(images.class_names) == num_modes
    for mode in range(num_modes):
        cloud = points[images.labels == mode]
        # Five standard errors.
        share, error = len(cloud) / len(points), 5 * (1 / num_modes / len(points)) ** 0.5
        assert share == pytest.approx(1 / num_modes, abs=error)
        spread = mixture.standard_deviation
        assert torch.allclose(cloud.mean(0), mixture.centers[mode], atol=5 * spread / len(cloud) ** 0.5)
        assert cloud.std(0).tolist() == pytest.approx([spread] * 2, rel=0.05)
    assert torch.equal(open_points(name).images, images.images)
    assert images.fingerprint != open_points("toy-grid" if name == "toy-ring" else "toy-ring").fingerprint


def test_real_points_cover_every_mode_and_those_of_one_mode_cover_one():
    held_out = open_points("toy-ring").held_out
    covered, quality = measure_points(held_out[:2500], held_out, mixture="toy-ring")
    assert (covered.value, covered.floor) == (8, 8)
    assert quality.value > 0.98  # 1 - exp(-9 / 2) of a Gaussian in the plane lies within 3 standard deviations
    assert measure_points(held_out[:100], held_out, mixture="toy-ring", modes=False) == ()
    covered, quality = measure_points(torch.zeros(100, 2, 1, 1), held_out, mixture="toy-ring")
    assert (covered.value, quality.value) == (0, 0.0)
    one_mode = MIXTURES["toy-ring"].centers[3].view(1, 2, 1, 1).expand(50, -1, -1, -1)
    covered, quality = measure_points(one_mode, held_out, mixture="toy-ring")
    assert (covered.value, quality.value) == (1, 1.0)


def test_a_picture_has_the_second_coordinate_upwards_and_the_generated_points_in_colour():
    real = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    picture = scatter(torch.tensor([[-1.0, 1.0], [50.0, 0.0]]), real=real).float()
    assert picture.shape == (3, SIDE, SIDE)
    is_colour = (picture.amax(0) - picture.amin(0)) > 30
    rows, columns = is_colour.nonzero().unbind(1)
    assert rows.max() < SIDE / 3
    assert columns.max() < SIDE / 3
    is_gray = (picture.amax(0) < 250) & ~is_colour
    assert is_gray[: SIDE // 2, SIDE // 2 :].sum() == is_gray[SIDE // 2 :, : SIDE // 2].sum() == 9


def test_a_run_on_points_trains_draws_measures_and_samples(tmp_path: Path):
    config = make_config(
        "toy-ring", steps=110, log_every=50, num_evaluations=2, num_evaluation_samples=200, device="cpu"
    )
    result = train(config, out=tmp_path / "run")
    assert (result.step, result.reason) == (110, "steps")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    final = [record for record in records if record["kind"] == "evaluation" and record["final"]]
    assert [metric["name"] for metric in final[0]["metrics"]] == ["Modes covered", "High-quality share"]
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    points = load(tmp_path / "run").sample(7, seed=3)
    assert points.shape == (7, 2, 1, 1)
    assert points.dtype == torch.float32


def test_a_run_on_points_is_compared_with_a_mixture_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared = []
    monkeypatch.setattr(
        "spectralnorm.cli.measuring.measure", lambda generator, images, **options: compared.append(images.name) or ()
    )
    train(make_config("toy-ring", steps=1, device="cpu"), out=tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--data", "toy-grid"]) == 0
    assert compared == ["toy-grid"]


def test_a_strict_critic_bounds_the_distance_at_every_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Clusters at some distance are told apart after few steps.
    quick = partial(wasserstein_lower_bound, options=CriticOptions(num_steps=60))
    monkeypatch.setattr("spectralnorm.gan.point_metrics.wasserstein_lower_bound", quick)
    config = make_config(
        "toy-ring", steps=110, num_evaluations=2, num_evaluation_samples=200, device="cpu", critic="strict"
    )
    train(config, out=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["final"] for record in evaluations] == [False, True]
    for record in evaluations:
        bound = next(metric for metric in record["metrics"] if metric["name"] == "W1 lower bound-points")
        # Points of an untrained generator lie near the origin, the ring's at distance 1.
        assert 0.1 < bound["value"] <= bound["details"]["estimate"]


def test_an_unknown_critic_is_refused():
    with pytest.raises(UserError, match="Unknown critic 'loose'; choose one of none, strict"):
        make_config("toy-ring", critic="loose")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recipe": "fashion", "data": "toy-ring"},
            "'toy-ring' are points, not images; take --recipe toy-ring, which has the networks for them",
        ),
        ({"recipe": "toy-ring", "data": "photos"}, "The architecture 'points' is for the data toy-ring or toy-grid"),
        ({"recipe": "toy-grid", "augmentation": "flip"}, "without augmentation"),
    ],
)
def test_points_and_images_do_not_mix(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--metrics fd", "The metric 'fd' is one of images; of points choose default, wasserstein or all"),
        ("--metrics ppl", "The metric 'ppl' is one of images"),
        ("--extractor squeezenet", "Points are seen as they are, without SqueezeNet"),
        ("--data {run}", "compared with toy-ring or toy-grid; leave out --data"),
    ],
)
def test_what_cannot_be_measured_of_points_is_refused(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(make_config("toy-ring", steps=2, device="cpu", num_sample_grids=1, batch_size=8), out=tmp_path)
    assert main(["evaluate", str(tmp_path), "--num", "100", *words.format(run=tmp_path).split()]) == 2
    assert says in capsys.readouterr().err
