"""Run records: what is written is what is read, also after a kill and by other versions."""

import json
import math
from pathlib import Path

import pytest

from spectralnorm.records import (
    Ending,
    Evaluation,
    Metric,
    Picture,
    Provenance,
    Record,
    RecordFile,
    Scalars,
    Session,
    Spectra,
    latest_evaluation,
    read_records,
    replace_text,
)

PROVENANCE = Provenance(
    extractor="classifier", weights_sha256="ab" * 32, num_real=10, num_fake=20, split="held-out", resize="none"
)
RECORDS: list[Record] = [
    Session(step=0, started_at="2025-03-01T12:00:00+01:00", command="train", versions={"torch": "2.13"}, hardware={}),
    Scalars(step=10, images_seen=640, training_seconds=1.5, values={"loss/generator": 0.25, "sigma/läyer": 2.0}),
    Picture(step=10, role="samples", file="samples/a.png", rows=2, columns=3, tile_height=32, tile_width=32),
    Spectra(step=20, layers={"head": (1.0, 0.5)}),
    Evaluation(
        step=20,
        images_seen=1280,
        training_seconds=3.0,
        final=True,
        metrics=(
            Metric(name="FD", value=3.5, spread=0.1, interval=(3.0, 4.0), details={"boot": 0.2}, provenance=PROVENANCE),
        ),
    ),
    Ending(step=20, reason="steps", images_seen=1280, training_seconds=3.0, total_seconds=4.0, peak_memory_bytes=2**30),
]


def write(path: Path, records: list[Record]) -> None:
    file = RecordFile(path)
    for record in records:
        file.append(record)
    file.close()


def scalars(step: int, **values: float) -> Scalars:
    return Scalars(step=step, images_seen=64 * step, training_seconds=float(step), values=values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_every_kind_of_record_is_read_as_it_was_written(path: Path) -> None:
    write(path, RECORDS)
    assert list(read_records(path)) == RECORDS


def test_each_line_is_an_object_of_strict_json_that_names_its_kind(path: Path) -> None:
    write(path, [scalars(1, loss=math.nan)])
    fields = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert fields == {
        "kind": "scalars", "step": 1, "images_seen": 64, "training_seconds": 1.0, "values": {"loss": None},
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_read_back_as_nan(path: Path, value: float) -> None:
    metric = Metric(name="FD", value=value, details={"boot": value}, provenance=PROVENANCE)
    write(path, [
        scalars(1, loss=value),
        Spectra(step=1, layers={"head": (1.0, value)}),
        Evaluation(step=1, images_seen=1, training_seconds=1, final=False, metrics=(metric,)),
    ])  # fmt: skip
    read_scalars, read_spectra, read_evaluation = read_records(path)
    assert isinstance(read_scalars, Scalars)
    assert isinstance(read_spectra, Spectra)
    assert isinstance(read_evaluation, Evaluation)
    assert math.isnan(read_scalars.values["loss"])
    assert math.isnan(read_spectra.layers["head"][1])
    assert math.isnan(read_evaluation.metrics[0].value)
    assert math.isnan(read_evaluation.metrics[0].details["boot"])


def test_a_record_can_be_read_by_another_process_before_the_file_is_closed(path: Path) -> None:
    file = RecordFile(path)
    file.append(scalars(1))
    assert list(read_records(path)) == [scalars(1)]
    file.close()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_last_line_cut_anywhere_by_a_kill_is_skipped(path: Path, cut: int) -> None:
    write(path, [scalars(1), scalars(2, **{"sigma/läyer": 1.0})])
    content = path.read_bytes()
    place = content.index("ä".encode()) + 1 if cut == 1 else len(content) - cut
    path.write_bytes(content[:place])
    assert list(read_records(path)) == [scalars(1)]


def test_a_run_goes_on_after_a_cut_line_without_losing_the_next_record(path: Path) -> None:
    write(path, [scalars(1)])
    with path.open("a") as stream:
        stream.write('{"kind": "scalars", "st')
    write(path, [scalars(2)])
    assert list(read_records(path)) == [scalars(1), scalars(2)]


def test_records_of_later_steps_are_dropped_when_a_run_resumes_from_an_older_checkpoint(path: Path) -> None:
    write(path, [scalars(1), scalars(2), scalars(3)])
    file = RecordFile(path, keep_until_step=2)
    file.append(scalars(3, loss=1.0))
    file.close()
    assert list(read_records(path)) == [scalars(1), scalars(2), scalars(3, loss=1.0)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "7",
        "[]",
        '"text"',
        '{"kind": "scalars"}',
        '{"kind": ["a"]}',
        '{"kind": "of 2031", "step": 1}',
        '{"kind": "scalars", "step": 1, "images_seen": 1, "training_seconds": 1, "values": 3}',
    ],
)
def test_a_line_that_is_no_record_of_this_version_is_skipped(path: Path, line: str) -> None:
    write(path, [scalars(1)])
    with path.open("a") as stream:
        stream.write(line + "\n")
    assert list(read_records(path)) == [scalars(1)]


def test_fields_of_newer_versions_are_left_out_at_every_depth(path: Path) -> None:
    write(path, RECORDS)
    fields = [json.loads(line) | {"new": 1} for line in path.read_text().splitlines()]
    fields[4]["metrics"][0]["new"] = 2
    fields[4]["metrics"][0]["provenance"]["new"] = 3
    path.write_text("".join(json.dumps(item) + "\n" for item in fields))
    assert list(read_records(path)) == RECORDS


def test_replacing_text_leaves_the_old_file_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")
    assert path.read_text() == "old"


def test_nothing_remains_of_text_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "text", "\ud800")
    assert list(tmp_path.iterdir()) == []


def _evaluation(step: int, *, final: bool = True, **values: float) -> Evaluation:
    metrics = [Metric(name=name, value=value, provenance=PROVENANCE) for name, value in values.items()]
    return Evaluation(step=step, images_seen=0, training_seconds=0.0, final=final, metrics=metrics)


def test_what_was_measured_later_joins_the_final_evaluation_of_the_same_step():
    evaluations = [_evaluation(5, FD=9.0), _evaluation(9, final=False, Old=1.0), _evaluation(9, FD=1.0, KID=2.0)]
    found = latest_evaluation([*evaluations, _evaluation(9, Copied=3.0, KID=4.0)])
    assert found is not None
    assert {metric.name: metric.value for metric in found.metrics} == {"FD": 1.0, "KID": 4.0, "Copied": 3.0}
    assert latest_evaluation([]) is None
