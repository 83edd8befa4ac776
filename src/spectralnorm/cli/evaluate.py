"""``spectralnorm evaluate``: parse, call, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from spectralnorm.cli.arguments import parse
from spectralnorm.errors import UserError
from spectralnorm.gan.config import choose
from spectralnorm.gan.evaluation import extractors_for, measure
from spectralnorm.gan.inputs import prepare_data, resolve_device
from spectralnorm.gan.run_folder import RECORDS_FILE, locked
from spectralnorm.gan.sampling import TrainedGenerator, load
from spectralnorm.records import Evaluation, Metric, RecordFile

__all__ = ["run"]


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's samples against held-out real images, and add the numbers to its records."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    num: int = 5000
    """Generated images."""
    seed: int | None = None
    """Of the latents; none: a fixed one, other than that of the sample grids."""
    device: str = "auto"
    """auto, cpu or cuda."""
    wasserstein: bool = False
    """Also bound the Wasserstein-1 distance of the features from below, with a critic trained for it."""


def run(words: list[str]) -> int:
    """Measure, print a table, append to the run's records."""
    options = parse(EvaluateOptions, words, prog="spectralnorm evaluate")
    choose("device", options.device, ("auto", "cpu", "cuda"))
    if options.num < 100:
        raise UserError(f"num must be at least 100 for a metric to mean anything, got {options.num}.")
    device = resolve_device(options.device)
    generator = load(options.run, device=str(device))
    images = prepare_data(generator.config)
    metrics = measure(
        generator,
        images,
        extractors=extractors_for(images, device=device),
        num=options.num,
        seed=options.seed,
        wasserstein=options.wasserstein,
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(_table(metrics))
    for line in _provenance(metrics):
        console.print(line, markup=False)
    if options.run.is_dir():
        _record(options.run, generator, metrics)
    return 0


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


def _table(metrics: tuple[Metric, ...]) -> Table:
    table = Table(title="Generated against held-out real images", title_justify="left", box=None, padding=(0, 1))
    for heading in ("metric", "value", "spread", "floor", "better", "fake", "real", "extractor"):
        table.add_column(heading, no_wrap=True)
    for metric in metrics:
        source = metric.provenance
        table.add_row(
            metric.name,
            f"{metric.value:.4g}",
            "" if metric.spread is None else f"{metric.spread:.2g}",
            "" if metric.floor is None else f"{metric.floor:.4g}",
            metric.better,
            str(source.num_fake),
            str(source.num_real),
            source.extractor,
        )
    return table


def _provenance(metrics: tuple[Metric, ...]) -> list[str]:
    """What each extractor's numbers depend on, beside what the table says: one line an extractor."""
    sources = dict.fromkeys(metric.provenance for metric in metrics)
    return [
        f" {source.extractor}: weights {source.weights_sha256[:12]}, real images: {source.split}, "
        f"resized: {source.resize}"
        for source in sources
    ]
