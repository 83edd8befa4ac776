import math
import random

from spectralnorm.report.series import Curves


def add_rows(curves: Curves, values: list[float], name: str = "loss") -> None:
    for step, value in enumerate(values):
        curves.add(step=step, images_seen=64 * step, seconds=0.5 * step, values={name: value})


def test_short_curves_keep_every_row() -> None:
    curves = Curves(limit=10)
    add_rows(curves, [3.0, 1.0, 2.0])
    assert curves.abscissae() == {"step": [0, 1, 2], "images": [0, 64, 128], "seconds": [0.0, 0.5, 1.0]}
    assert curves.ordinates("loss") == {"y": [3.0, 1.0, 2.0]}


def test_long_curves_stay_below_the_limit_and_keep_both_ends() -> None:
    curves = Curves(limit=600)
    add_rows(curves, [float(step) for step in range(100_003)])
    steps = curves.abscissae()["step"]
    assert 300 <= len(steps) <= 601
    assert steps == sorted(set(steps))
    assert steps[-1] == 100_002
    assert curves.digest("loss").first == 0.0
    assert curves.digest("loss").last == 100_002.0


def test_a_single_spike_survives_any_thinning() -> None:
    values = [math.sin(step / 500) for step in range(50_000)]
    values[31_337] = 1234.0
    values[42_001] = -77.0
    curves = Curves(limit=100)
    add_rows(curves, values)
    line = curves.ordinates("loss")
    assert max(value for value in line["high"] if value is not None) == 1234.0
    assert min(value for value in line["low"] if value is not None) == -77.0


def test_each_point_is_the_mean_of_the_rows_since_the_point_before() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(5_000)]
    curves = Curves(limit=64)
    add_rows(curves, values)
    steps, line = curves.abscissae()["step"], curves.ordinates("loss")
    first = 0
    for index, step in enumerate(steps):
        rows = values[first : int(step) + 1]
        expected = (sum(rows) / len(rows), min(rows), max(rows))
        for got, want in zip((line["y"][index], line["low"][index], line["high"][index]), expected, strict=True):
            assert got is not None
            assert math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-9)
        first = int(step) + 1
    assert first == 5_000


def test_values_that_are_not_finite_leave_a_gap_and_are_counted() -> None:
    curves = Curves(limit=10)
    add_rows(curves, [1.0, math.nan, math.inf, 4.0])
    assert curves.ordinates("loss")["y"] == [1.0, None, None, 4.0]
    digest = curves.digest("loss")
    assert (digest.first, digest.last, digest.low, digest.high) == (1.0, 4.0, 1.0, 4.0)
    assert (digest.count, digest.num_not_finite) == (2, 2)


def test_a_curve_that_is_absent_from_some_rows_has_gaps_there() -> None:
    curves = Curves(limit=10)
    curves.add(step=1, images_seen=1, seconds=1, values={"a": 1.0})
    curves.add(step=2, images_seen=2, seconds=2, values={"a": 2.0, "sigma/b": 5.0})
    assert curves.ordinates("sigma/b")["y"] == [None, 5.0]
    assert curves.names("sigma/") == ["sigma/b"]


def test_reading_in_between_does_not_disturb_what_is_added_later() -> None:
    curves = Curves(limit=8)
    add_rows(curves, [1.0] * 21)
    curves.abscissae()
    curves.add(step=21, images_seen=0, seconds=0, values={"loss": 9.0})
    assert curves.abscissae()["step"][-1] == 21
    assert curves.digest("loss").count == 22
