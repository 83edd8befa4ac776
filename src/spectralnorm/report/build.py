"""From a run folder to ``report.html``: read, choose what to say, render, write."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from spectralnorm.errors import UserError
from spectralnorm.records import Evaluation, latest_evaluation, replace_text
from spectralnorm.report import tables
from spectralnorm.report.charts import Chart, curve_charts, metric_charts, spectrum_chart
from spectralnorm.report.contents import Contents, read_run
from spectralnorm.report.gallery import Gallery, collect
from spectralnorm.report.guarantee import Guarantee, guarantee
from spectralnorm.report.text import count_text, duration_text, number_text

__all__ = ["build_report"]

_REPORT_FILE = "report.html"
_NORMALIZATIONS = {
    "spectral": "spectral normalization",
    "strict": "strict spectral normalization",
    "weight": "weight normalization",
    "batch": "batch normalization",
    "layer": "layer normalization",
    "none": "no normalization",
}


def build_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from its records and images alone.

    The page is one file that opens from disk and asks nothing of a network. What a run lacks, because it was
    interrupted or is still going on, is left out, and said.

    Args:
        run: the run folder: ``config.json`` and, as far as they exist, ``data.json``, ``metrics.jsonl``,
            ``samples/*.png``.

    Returns:
        The path of the page.

    Raises:
        UserError: ``run`` is not a run folder, or cannot be written to.
    """
    run = Path(run)
    contents = read_run(run)
    page = _environment().get_template("template.html.j2").render(_view(contents, collect(contents))).lstrip()
    report = run / _REPORT_FILE
    try:
        replace_text(report, page)
    except OSError as error:
        raise UserError(f"Cannot write {report} ({error.strerror}); make the folder writable or free space.") from error
    return report


def _environment() -> jinja2.Environment:
    files = importlib.resources.files("spectralnorm.report")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8")),
        # style.css and the scripts are included as they are, so they must stay free of template marks and `</`.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _view(contents: Contents, gallery: Gallery) -> Mapping[str, Any]:
    """What the template shows: text, images, and what the scripts read."""
    curves = curve_charts(contents)
    spectrum = spectrum_chart(contents.spectra, normalization=contents.config["normalization"])
    evaluation = latest_evaluation(contents.evaluations)
    of_metrics = metric_charts(contents.evaluations)
    guaranteed = _guarantee(contents)
    metric_shares = [
        (metric.name, shares) for metric in _metrics(evaluation) if (shares := tables.shares(metric))
    ]  # fmt: skip
    return {
        "title": _title(contents),
        "makes_points": _makes_points(contents),
        "summary": _summary(contents),
        "finished": contents.ending is not None and contents.ending.reason in ("steps", "minutes"),
        "status": tables.ending_text(contents.ending),
        "facts": _facts(contents, evaluation),
        "missing": contents.problems + _missing(contents, gallery, evaluation),
        "gallery": gallery,
        "total_step": contents.step,
        "curves": curves,
        "spectrum": spectrum,
        "guarantee": guaranteed,
        "last_step": contents.step,
        "metric_charts": of_metrics,
        "evaluation": evaluation,
        "is_final_evaluation": _is_final(contents, evaluation),
        "metric_groups": tables.metric_groups(evaluation),
        "metric_shares": metric_shares,
        "config": tables.config_rows(contents.config),
        "data": tables.data_table(contents.data),
        "times": tables.time_rows(contents),
        "versions": tables.version_rows(contents),
        "sessions": tables.session_rows(contents),
        "figures": _figures(contents, [*curves.values(), *([spectrum] if spectrum else []), *of_metrics]),
    }


def _guarantee(contents: Contents) -> Guarantee | None:
    if contents.certificate is None:
        return None
    try:
        return guarantee(contents.certificate)
    except (KeyError, TypeError, ValueError):
        contents.problems.append("certificate.json is not a certificate, so no guarantee is shown.")
        return None


def _figures(contents: Contents, charts: Sequence[Chart]) -> dict[str, Any]:
    return {
        "timeline": contents.curves.abscissae(),
        "resumed": [sitting.session.step for sitting in contents.sittings[1:] if sitting.session.step > 0],
        "charts": {chart.id: {"title": chart.title, **chart.spec} for chart in charts},
    }


def _metrics(evaluation: Evaluation | None) -> Sequence[Any]:
    return evaluation.metrics if evaluation is not None else ()


def _title(contents: Contents) -> str:
    data = contents.data or {}
    name = data.get("name") or contents.config.get("data") or contents.config["recipe"]
    if not contents.step:
        return f"{name}, not trained yet"
    return f"{name}, {count_text(contents.step)} steps in {duration_text(contents.training_seconds)}"


def _summary(contents: Contents) -> str:
    config, data = contents.config, contents.data or {}
    normalization = _normalization_text(config["normalization"])
    networks = f"Recipe {config['recipe']}: a {config['architecture']} generator and discriminator with {normalization}"
    loss = f" and the {config['loss']} loss" if config.get("loss") else ""
    size, num_training = config.get("image_size"), data.get("num_training")
    channels = "gray " if config.get("channels") == 1 else "colour " if config.get("channels") == 3 else ""
    images = f"{count_text(num_training)} " if isinstance(num_training, int) else ""
    pixels = f" of {size} × {size} pixels" if size else ""
    hardware = contents.sittings[-1].session.hardware if contents.sittings else {}
    device = hardware.get("gpu") or hardware.get("cpu")
    on = f" on {device}" if device else ""
    shown = "points in the plane" if _makes_points(contents) else f"{channels}images{pixels}"
    return f"{networks}{loss}, trained on {images}{shown}{on}."


def _makes_points(contents: Contents) -> bool:
    """Whether the run is on points, which have one picture and neither neighbours nor walks."""
    return contents.config.get("architecture") == "points"


def _facts(contents: Contents, evaluation: Evaluation | None) -> list[tuple[str, str, str]]:
    """The few numbers to know first: a label, the number, and a note."""
    facts = [
        ("Steps", count_text(contents.step), "generator updates"),
        ("Images seen", count_text(contents.images_seen), _epochs(contents)),
        ("Training time", duration_text(contents.training_seconds), _wall_time(contents)),
    ]
    if contents.training_seconds > 0:
        rate = number_text(contents.images_seen / contents.training_seconds, 3)
        facts.append(("Speed", rate, "images per second"))
    for metric in _metrics(evaluation)[:1]:
        floor = f"real data: {number_text(metric.floor, 3)}, " if metric.floor is not None else ""
        facts.append((metric.name, number_text(metric.value, 3), f"{floor}{metric.better} is better"))
    return facts


def _epochs(contents: Contents) -> str:
    num_training = (contents.data or {}).get("num_training")
    if not isinstance(num_training, int) or num_training < 1:
        return "real images"
    return f"{number_text(contents.images_seen / num_training, 3)} times through the data"


def _wall_time(contents: Contents) -> str:
    num = len(contents.sittings)
    sessions = f"in {count_text(num)} sessions" if num > 1 else "in one session"
    return sessions if num else "no session recorded"


def _missing(contents: Contents, gallery: Gallery, evaluation: Evaluation | None) -> list[str]:
    """What this run does not show, and why."""
    sentences = []
    if contents.ending is None:
        sentences.append(
            "The run has no recorded end: it is still going on, or was cut off. The command that started it resumes it."
        )
    elif contents.ending.reason == "interrupted":
        sentences.append("The run was interrupted; the command that started it resumes it.")
    if gallery.samples is None:
        sentences.append("There are no samples yet.")
    elif not gallery.final:
        sentences.append(
            f"There is no final grid: the samples shown are those of step {count_text(gallery.samples.step)}."
        )
    absent = [
        name
        for name, present in (
            ("nearest training images", gallery.pairs or _makes_points(contents)),
            ("interpolations", gallery.walks or _makes_points(contents)),
            ("singular-value spectra", contents.spectra),
        )
        if not present
    ]
    if absent:
        sentences.append(f"Written when a run ends, and not there yet: {', '.join(absent)}.")
    if evaluation is None:
        sentences.append("No metrics were recorded: very short runs skip them, others write the first after a while.")
    elif not _is_final(contents, evaluation):
        sentences.append(
            f"There is no final evaluation: the metrics shown are those of step {count_text(evaluation.step)}."
        )
    if not contents.curves.names():
        sentences.append("No curves were logged.")
    return sentences


def _is_final(contents: Contents, evaluation: Evaluation | None) -> bool:
    """Whether it is of what the run ended with: a run may go on after it had ended, or was evaluated, once."""
    return evaluation is not None and evaluation.final and evaluation.step == contents.step


def _normalization_text(setting: str) -> str:
    name, _, options = setting.partition(":")
    text = _NORMALIZATIONS.get(name, name)
    return f"{text} ({options.replace(',', ', ')})" if options else text
