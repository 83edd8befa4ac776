"""``spectralnorm evaluate``: parse, call, print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.config import choose
from spectralnorm.gan.run_folder import RECORDS_FILE, locked
from spectralnorm.records import Evaluation, Metric, RecordFile, metric_fields, replace_text
from spectralnorm.report.text import number_text

if TYPE_CHECKING:
    from spectralnorm.gan.sampling import TrainedGenerator

__all__ = ["EvaluateOptions", "run"]


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's samples, or images in a folder, against real images.

    A run is measured against the held-out part of its data, and the numbers are added to its records. Images are
    measured against the held-out part of --data, or against what is in --against. Of either, at most half is set aside
    first: it stands in for generated images, and what it scores is the floor.
    """

    target: tyro.conf.Positional[Path]
    """Run folder, generator.safetensors, or images: whatever train takes as --data."""
    data: Path | None = None
    """Real images, parted as for training; none: a run's own data."""
    against: Path | None = None
    """Images to compare with, none held out."""
    metrics: str = "default"
    """Comma-separated: default (fd, kid, classes), is, pr, dc, diversity, copying, ppl, wasserstein; or all."""
    extractor: str = "auto"
    """Comma-separated: classifier, squeezenet, inception, dinov2, or a TorchScript file; auto: what fits."""
    weights: Path | None = None
    """File of the weights of inception or dinov2; nothing is ever downloaded."""
    num: int | None = None
    """Generated images; none: 5000 of a run, all of a folder."""
    image_size: int | None = None
    """Height and width at which folders are compared; none: that of the first image."""
    seed: int | None = None
    """Of the latents; none: a fixed one, other than that of the sample grids."""
    device: str = "auto"
    """auto, cpu or cuda."""
    intervals: bool = True
    """Whether to find 95 % intervals of the distances."""
    wasserstein: bool = False
    """Also bound the Wasserstein-1 distance of the features from below, with a critic trained for it."""
    json: Path | None = None
    """File to write the numbers to."""


def run(words: list[str]) -> int:
    """Measure, print a table, append to the run's records."""
    options = parse(EvaluateOptions, words, prog="spectralnorm evaluate")
    choose("device", options.device, ("auto", "cpu", "cuda"))
    if options.num is not None and options.num < 100:
        raise UserError(f"num must be at least 100 for a metric to mean anything, got {options.num}.")
    if options.image_size is not None and options.image_size < 1:
        raise UserError(f"image_size must be at least 1, got {options.image_size}.")
    # Here, and not above: a help page needs no torch.
    from spectralnorm.cli.measuring import is_run, measure_images, measure_run, metric_names
    from spectralnorm.gan.inputs import resolve_device

    names = metric_names(options)
    if options.data is not None and options.against is not None:
        raise UserError("--data and --against are two things to compare with; give one of them.")
    device = resolve_device(options.device)
    console = Console(soft_wrap=True, highlight=False)
    with _ProgressBar(console) as progress:
        if is_run(options.target):
            metrics, generator = measure_run(options, names, device=device, progress=progress.show)
        else:
            metrics, generator = measure_images(options, names, device=device, progress=progress.show), None
    table = _table(metrics, options)
    # As wide as it is: a name that was cut short names nothing.
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False)
    for line in _provenance(metrics):
        console.print(line, markup=False)
    if any(metric.floor is not None for metric in metrics):
        console.print(" The floor is what real images score that were set aside for it.", markup=False)
    if "all" in names:
        console.print(" Left out is what these images, extractors and data do not allow.", markup=False)
    if generator is not None and options.target.is_dir() and options.data is None:
        _record(options.target, generator, metrics)
    if options.json is not None:
        _write_json(options, metrics)
    return 0


class _ProgressBar:
    """One line for each thing that is being done, where there is a terminal."""

    def __init__(self, console: Console) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Say how much of something is done."""
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)


def _record(run: Path, generator: TrainedGenerator, metrics: tuple[Metric, ...]) -> None:
    evaluation = Evaluation(
        step=generator.step,
        images_seen=generator.images_seen,
        training_seconds=generator.training_seconds,
        final=True,
        metrics=metrics,
    )
    try:
        # Two writers of one file would lose each other's lines.
        with locked(run):
            records = RecordFile(run / RECORDS_FILE)
            records.append(evaluation)
            records.close()
    except UserError:
        print(f"Not recorded, because another process is training in {run}.")
    except OSError as error:
        raise UserError(
            f"Cannot write to {run} ({error.strerror}), so these numbers are not recorded; make it writable or free "
            "some space."
        ) from error


def _write_json(options: EvaluateOptions, metrics: tuple[Metric, ...]) -> None:
    assert options.json is not None
    compared_with = options.against or options.data
    content: dict[str, Any] = {
        "generated": str(options.target),
        "real": None if compared_with is None else str(compared_with),
        "metrics": [metric_fields(metric) for metric in metrics],
    }
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"Cannot write {options.json} ({error.strerror}); give another --json.") from error


def _table(metrics: tuple[Metric, ...], options: EvaluateOptions) -> Table:
    title = "Generated against held-out real images"
    if options.against is not None:
        title = f"{options.target} against {options.against}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    headings = ["metric", "value", "spread", "95 % interval", "floor", "better"]
    rows = [
        (
            metric.name,
            number_text(metric.value),
            "" if metric.spread is None else number_text(metric.spread, 2),
            "" if metric.interval is None else " to ".join(number_text(end, 3) for end in metric.interval),
            "" if metric.floor is None else number_text(metric.floor),
            metric.better,
        )
        for metric in metrics
    ]
    shown = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    for place in shown:
        table.add_column(headings[place], no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _provenance(metrics: tuple[Metric, ...]) -> list[str]:
    """What each extractor's numbers depend on, beside what the table says: one line an extractor."""
    sources = dict.fromkeys(metric.provenance for metric in metrics if metric.provenance.num_real)
    return [
        f" {source.extractor}: {source.num_fake} generated against {source.num_real} real images "
        f"({source.split}), weights {source.weights_sha256[:12]}, "
        f"resized: {source.resize}"
        for source in sources
    ]
