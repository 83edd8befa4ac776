import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectralnorm.errors import UserError
from spectralnorm.records import Ending, Evaluation, Scalars
from spectralnorm.report import build_report

VOID = {"meta", "link", "img", "input", "br", "hr"}
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Checks that tags balance and attributes come once; collects text, ids and what the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        found = dict(attrs)
        if tag == "img":
            assert found.get("alt"), "an image has no alternative text"
        self.ids += [found["id"]] if found.get("id") else []
        self.references += [value for name in ("src", "href") if (value := found.get(name))]
        if tag not in VOID and not (self.open and self.open[-1] == "svg" and tag in ("path", "circle")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self.open[-1] == "svg", f"<{tag}/> closes nothing outside of SVG"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "circle"):
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def figures(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session")
def finished_html(finished_run: Path) -> str:
    return build_report(finished_run).read_text(encoding="utf-8")


def test_the_page_is_valid_and_refers_to_nothing_outside_of_itself(finished_html: str) -> None:
    page = Page(finished_html)
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith("data:") or reference.removeprefix("#") in page.ids
    assert "url(" not in finished_html


def test_the_page_of_a_whole_run_misses_nothing(finished_html: str) -> None:
    text = Page(finished_html).text
    assert "What this run does not show" not in text
    assert "absent" not in re.findall(r'class="([^"]*)"', finished_html)
    for heading in ("Final samples", "Samples over training", "Is it copying?", "Metrics", "Setup", "Config"):
        assert heading in text
    assert "fashion-mnist, 2,400 steps in 2 min 30 s" in text
    assert "interrupted at step 1,500" in text
    assert "time budget reached at step 2,400" in text
    assert "AMD EPYC 7543 32-Core Processor" in text


def test_final_metrics_come_with_floor_direction_and_provenance(finished_html: str) -> None:
    text = Page(finished_html).text
    assert "FD-SqueezeNet 21.4 1.33 ↓ lower" in text
    assert "KID-SqueezeNet 0.0271 ± 0.0031 0.0002 ↓ lower" in text
    assert "extractor squeezenet weights 5eed5a175eed real 10,000, held-out generated 5,000" in text
    assert "Confident share 0.776 0.91 ↑ higher" in text
    assert "ankle boot" in text


def test_every_figure_has_its_curves_and_its_numbers(finished_html: str, synthetic: SimpleNamespace) -> None:
    found = figures(finished_html)
    charts = found["charts"]
    assert {"loss", "logits", "sigma", "gradient-norm", "speed", "spectra", "metric-0"} <= charts.keys()
    assert [series["name"] for series in charts["sigma"]["series"]] == synthetic.layers
    assert [series["name"] for series in charts["spectra"]["series"]] == synthetic.layers
    assert found["timeline"]["step"] == list(range(10, 2401, 10))
    assert found["resumed"] == [1500]
    for name in charts:
        assert f'data-chart="{name}"' in finished_html
    for chart in charts.values():
        for series in chart["series"]:
            xs = series.get("x", found["timeline"])
            assert len(series["y"]) == len(xs["step"] if isinstance(xs, dict) else xs)


def test_metrics_of_different_provenance_are_different_series(finished_html: str) -> None:
    chart = next(c for c in figures(finished_html)["charts"].values() if c["title"] == "FD-Classifier")
    assert [(series["name"], len(series["y"])) for series in chart["series"]] == [
        ("2,000 samples", 5),
        ("5,000 samples", 1),
    ]
    assert chart["rules"] == [{"y": 0.71, "label": "real data", "color": "soft"}]


def test_a_metric_that_was_measured_again_at_a_step_is_one_point_there(
    make_run: MakeRun, synthetic: SimpleNamespace
) -> None:
    def measured(step: int, value: float) -> Evaluation:
        evaluation = synthetic.evaluation(step)
        return dataclasses.replace(evaluation, metrics=[dataclasses.replace(evaluation.metrics[0], value=value)])

    # The last one is of a checkpoint before the cut, measured after it.
    evaluations = [measured(100, 9.0), measured(200, 8.0), measured(300, 7.0), measured(200, 6.0)]
    (chart,) = figures(build_report(make_run(evaluations)).read_text(encoding="utf-8"))["charts"].values()
    (series,) = chart["series"]
    assert (series["x"]["step"], series["y"]) == ([100, 200, 300], [9.0, 6.0, 7.0])


def test_a_metric_of_one_step_alone_has_no_chart(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    twice = [synthetic.evaluation(100), synthetic.evaluation(100)]
    assert figures(build_report(make_run(twice)).read_text(encoding="utf-8"))["charts"] == {}


def test_metrics_of_a_run_that_went_on_are_not_called_final(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    # One that was interrupted, evaluated, and trained further.
    records = [synthetic.session(), synthetic.evaluation(100, final=True), synthetic.scalars(200)]
    text = Page(build_report(make_run(records)).read_text(encoding="utf-8")).text
    assert "There is no final evaluation: the metrics shown are those of step 100." in text
    assert "Latest evaluation, step 100." in text


def test_details_of_a_metric_are_bars_only_where_they_are_shares_of_a_whole(
    make_run: MakeRun, synthetic: SimpleNamespace
) -> None:
    evaluation = synthetic.evaluation(100)
    metrics = [
        dataclasses.replace(evaluation.metrics[0], details={"subset size": 500.0}),
        dataclasses.replace(evaluation.metrics[1], details={"if both were equally frequent": math.log(2)}),
        dataclasses.replace(evaluation.metrics[2], details={"cat": 0.75, "dog": 0.25}),
    ]
    html = build_report(make_run([dataclasses.replace(evaluation, metrics=metrics)])).read_text(encoding="utf-8")
    text = Page(html).text
    assert html.count('<figure class="shares">') == 1
    assert "cat 75.0% dog 25.0%" in text
    assert "FD-Classifier subset size 500" in text
    assert "KID-Classifier if both were equally frequent 0.6931" in text


def test_settings_and_data_are_shown_in_full(finished_html: str, synthetic: SimpleNamespace) -> None:
    text = Page(finished_html).text
    for name in synthetic.config:
        assert f" {name} " in text
    assert "generator_lr 0.0002 " in text
    assert "class_names – " in text
    assert "zero-padded 28 -> 32" in text
    assert "bags/IMG_0421.png the file ends early" in text


def test_the_page_is_built_again_alike(finished_run: Path, finished_html: str) -> None:
    assert build_report(finished_run).read_text(encoding="utf-8") == finished_html
    assert sorted(path.name for path in finished_run.iterdir()) == [
        "config.json", "data.json", "metrics.jsonl", "report.html", "samples",
    ]  # fmt: skip


def test_a_page_stays_small_for_a_long_run_with_large_colour_pictures(
    make_run: MakeRun, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    run = tmp_path / "run"
    grid = synthetic.save_grid(run, "samples", 0, 8, 8, size=64, mode="RGB", detail=0.5)
    copies = []
    for step in range(60):
        copy = run / f"samples/step-{step:09d}.png"
        if not copy.exists():
            os.link(run / grid.file, copy)
        copies.append(type(grid)(**{**grid.__dict__, "step": step, "file": f"samples/{copy.name}"}))
    final = synthetic.save_grid(run, "final", 60, 8, 16, size=64, mode="RGB", detail=0.5)
    page = build_report(make_run([synthetic.session(), *copies, final]))
    assert page.stat().st_size < 5_000_000
    html = page.read_text(encoding="utf-8")
    assert html.count('data-step="') == 48
    assert "48 of 60 grids" in Page(html).text


def test_text_from_records_cannot_become_markup(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    evil = "</script><script>alert(1)</script><!--"
    values = {f"sigma/{evil}": 1.0, "loss/generator": 1.0}
    record = Scalars(step=10, images_seen=1, training_seconds=1.0, values=values)
    data = {**synthetic.data, "name": evil, "unreadable": [{"file": evil, "reason": evil}]}
    html = build_report(make_run([record], {**synthetic.config, "recipe": evil}, data)).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<!--" not in html
    assert figures(html)["charts"]["sigma"]["series"][0]["name"] == evil
    assert evil in Page(html).text


def test_a_run_without_records_says_so(make_run: MakeRun) -> None:
    run = make_run([])
    (run / "metrics.jsonl").unlink()
    (run / "data.json").unlink()
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "metrics.jsonl is absent" in text
    assert "data.json is absent" in text
    assert "There are no samples yet." in text
    assert "not trained yet" in text


def test_an_interrupted_run_shows_what_there_is_and_says_what_is_missing(
    make_run: MakeRun, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    grid = synthetic.save_grid(tmp_path / "run", "samples", 100, 8, 8)
    records = [synthetic.session(), *(synthetic.scalars(step) for step in range(10, 101, 10)), grid]
    ending = Ending(
        step=100, reason="interrupted", images_seen=6400, training_seconds=6.2, total_seconds=8, peak_memory_bytes=1
    )
    text = Page(build_report(make_run([*records, ending])).read_text(encoding="utf-8")).text
    assert "The run was interrupted; the command that started it resumes it." in text
    assert "There is no final grid: the samples shown are those of step 100." in text
    assert "nearest training images, interpolations, singular-value spectra." in text
    assert "No metrics were recorded" in text


def test_a_run_that_still_goes_on_is_not_called_finished(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    text = Page(build_report(make_run([synthetic.session(), synthetic.scalars(10)])).read_text("utf-8")).text
    assert "no end recorded: still running, or cut off" in text


def test_pictures_lost_or_broken_are_named(make_run: MakeRun, tmp_path: Path, synthetic: SimpleNamespace) -> None:
    run = tmp_path / "run"
    lost = synthetic.save_grid(run, "final", 10, 2, 2)
    broken = synthetic.save_grid(run, "neighbours", 10, 2, 4)
    (run / lost.file).unlink()
    (run / broken.file).write_bytes(b"no PNG")
    text = Page(build_report(make_run([synthetic.session(), lost, broken])).read_text(encoding="utf-8")).text
    assert "samples/final.png is missing." in text
    assert "samples/neighbours.png is not a readable image." in text


def test_samples_of_a_run_that_went_on_replace_an_older_final_grid(
    make_run: MakeRun, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    run = tmp_path / "run"
    records = [synthetic.save_grid(run, "final", 50, 8, 16), synthetic.save_grid(run, "samples", 80, 8, 8)]
    text = Page(build_report(make_run([synthetic.session(), *records])).read_text(encoding="utf-8")).text
    assert "64 generated images, step 80." in text


def test_a_diverged_curve_leaves_a_gap_and_a_count(make_run: MakeRun) -> None:
    records = [
        Scalars(step=step, images_seen=step, training_seconds=step, values={"loss/generator": value})
        for step, value in ((1, 0.5), (2, math.nan), (3, 0.25))
    ]
    html = build_report(make_run(records)).read_text(encoding="utf-8")
    assert figures(html)["charts"]["loss"]["series"][0]["y"] == [0.5, None, 0.25]
    assert "generator (1 not finite) 0.5 0.25 0.25 0.5" in Page(html).text


def test_a_file_cut_by_a_kill_is_shown_up_to_the_cut(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    run = make_run([synthetic.session(), synthetic.scalars(10), synthetic.scalars(20)])
    records = run / "metrics.jsonl"
    records.write_bytes(records.read_bytes()[:-30])
    assert figures(build_report(run).read_text(encoding="utf-8"))["timeline"]["step"] == [10]


def test_text_is_honest_about_a_discriminator_without_normalization(
    make_run: MakeRun, synthetic: SimpleNamespace
) -> None:
    records = [synthetic.session(), synthetic.scalars(10), synthetic.spectra(10)]
    run = make_run(records, {**synthetic.config, "normalization": "none"})
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "no normalization" in text
    assert "Nothing holds these norms back in this run" in text
    assert "keeps norm 1" not in text


@pytest.mark.parametrize("config", [None, "", "[]", '{"model_type": "bert"}', "\xff"])
def test_a_folder_of_something_else_is_refused_in_one_sentence(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(UserError) as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No run folder at"):
        build_report(tmp_path / "nowhere")


def test_an_old_report_stays_when_the_new_one_cannot_be_written(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    run = make_run([synthetic.session()])
    report = build_report(run)
    before = report.read_text(encoding="utf-8")
    (run / ".report.html.tmp").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        build_report(run)
    assert report.read_text(encoding="utf-8") == before


def test_a_run_on_points_speaks_of_points(make_run: MakeRun, synthetic: SimpleNamespace) -> None:
    config = {**synthetic.config, "architecture": "points", "image_size": 1, "channels": 2}
    run = make_run([synthetic.session(), synthetic.scalars(10), synthetic.spectra(10)], config)
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "points in the plane" in text
    assert "images of 1 × 1 pixels" not in text
    assert "not there yet: nearest training images" not in text
