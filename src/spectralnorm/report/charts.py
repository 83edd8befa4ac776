"""Which curves the report draws: what ``charts.js`` reads, and the same in numbers for those who cannot see it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectralnorm.records import Evaluation, Metric, Provenance, Spectra
from spectralnorm.report.contents import Contents
from spectralnorm.report.series import Curves, thin
from spectralnorm.report.text import count_text, number_text

__all__ = ["Chart", "curve_charts", "metric_charts", "spectrum_chart"]

_FIRST_RANKS, _OTHER_RANKS = 64, 192
"""Points of one spectrum: each of the first ranks, where a logarithmic axis has room, and the others evenly spread."""

_SIGMA_MEANS = {
    "none": "Nothing holds these norms back in this run; look for steady growth: the discriminator gets ever steeper, "
    "and training less stable.",
    "spectral": "The layer divides its weight by this number, so growth is harmless here: the weight it uses keeps "
    "norm 1.",
    "strict": "Here it is a guaranteed bound of what the whole layer does to its input, and the layer divides by it, "
    "so growth is harmless: what it uses stays below 1.",
}
"""What sigma is to a layer, by how the run normalizes."""
_SPECTRUM_BEGINS = {
    "none": "Nothing bounds where they begin in this run. ",
    "spectral": "Normalized, each begins at about 1. ",
    "strict": "A convolution begins below 1: its map of whole images is what is held at 1. ",
}


@dataclass(frozen=True)
class Chart:
    """One figure."""

    id: str
    title: str
    about: str
    """What it is, and what to look for, for somebody who sees one for the first time."""
    spec: dict[str, Any]
    """For charts.js: ``kind`` (timeline, points or ranks), ``series``, and options."""
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table below the figure."""


def curve_charts(contents: Contents) -> dict[str, Chart]:
    """Charts of what was logged while training, by id; without those of which nothing was logged."""
    sigma_meaning = _of_normalization(_SIGMA_MEANS, contents.config["normalization"])
    charts = [
        _timeline(
            contents.curves,
            "loss",
            "Losses",
            "What each network minimizes. They pull against one another, so neither falls to zero in a healthy run: "
            "look for both to settle. A discriminator loss near zero means that the generator no longer learns.",
            [("loss/discriminator", "discriminator", "a"), ("loss/generator", "generator", "b")],
        ),
        _timeline(
            contents.curves,
            "logits",
            "Logits: D(real) and D(fake)",
            "The discriminator's mean score for real and for generated images. Look for a gap that stays open but does "
            "not run away: no gap, and it cannot tell them apart; a widening one, and it is winning.",
            [("logits/real", "real images", "a"), ("logits/fake", "generated images", "b")],
        ),
        _timeline(
            contents.curves,
            "sigma",
            "Largest singular value of each raw weight",
            "Sigma is the most a layer's stored weight can stretch its input; colours run from the first layer to the "
            f"last. {sigma_meaning}",
            _by_depth(contents.curves.names("sigma/"), "sigma/"),
            # Measured, not noisy: a mean would hide how it moves.
            smooth=False,
        ),
        _timeline(
            contents.curves,
            "gradient-norm",
            "Gradient norms",
            "Length of the gradient of all weights of a network. Look for a level course: a rise by orders of "
            "magnitude, or many spikes, comes before training breaks; a fall to zero means that nothing is learned.",
            [
                ("gradient_norm/discriminator", "discriminator", "a"),
                ("gradient_norm/generator", "generator", "b"),
            ],
            log=True,
        ),
        _timeline(
            contents.curves,
            "speed",
            "Images per second",
            "Real images trained on per second of training time. Look for a level line; a dip means that "
            "something else kept the machine busy.",
            [("images_per_second", "images/s", "c")],
            from_zero=True,
        ),
    ]
    return {chart.id: chart for chart in charts if chart is not None}


def spectrum_chart(spectra: Spectra | None, *, normalization: str) -> Chart | None:
    """The singular values of every layer against their rank; None without any."""
    layers = {
        name: [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        for name, values in (spectra.layers if spectra is not None else {}).items()
    }
    layers = {name: values for name, values in layers.items() if values}
    if not layers:
        return None
    series = []
    for depth, (name, values) in enumerate(layers.items()):
        first = min(_FIRST_RANKS, len(values))
        ranks = [*range(first), *(first + rank for rank in thin(len(values) - first, limit=_OTHER_RANKS))]
        series.append(
            {
                "name": name,
                "color": _depth(depth, len(layers)),
                "x": [rank + 1 for rank in ranks],
                "y": [_compact(values[rank]) for rank in ranks],
                "count": len(values),
            }
        )
    bound = _of_normalization(_SPECTRUM_BEGINS, normalization)
    return Chart(
        id="spectra",
        title="Singular values of each discriminator layer, as used",
        about="Every singular value of each weight matrix, largest first: how strongly the layer passes on each "
        f"direction of its input. {bound}Look for curves that stay high over many ranks; one that drops at once passes "
        "on a few directions only, and the discriminator is blind to the rest.",
        spec={"kind": "ranks", "series": series, "log": True, "xLabel": "rank"},
        headings=("layer", "values", "largest", "median", "smallest", "directions that count (stable rank)"),
        rows=[
            (
                name,
                count_text(len(values)),
                number_text(values[0]),
                number_text(values[len(values) // 2]),
                number_text(values[-1]),
                # Squared Frobenius norm over squared spectral norm: how many directions count.
                number_text(math.fsum(v * v for v in values) / values[0] ** 2 if values[0] else math.nan, 3),
            )
            for name, values in layers.items()
        ],
    )


def metric_charts(evaluations: Sequence[Evaluation]) -> list[Chart]:
    """A chart of each metric over training.

    Values of different provenance do not compare: each has its own series. Of two at one step the later one counts.
    """
    steps: dict[str, set[int]] = defaultdict(set)
    for evaluation in evaluations:
        for metric in evaluation.metrics:
            steps[metric.name].add(evaluation.step)
    # One step is no course: the table has it.
    names = [name for name, of_name in steps.items() if len(of_name) > 1]
    return [_metric_chart(index, name, evaluations) for index, name in enumerate(names)]


def _metric_chart(index: int, name: str, evaluations: Sequence[Evaluation]) -> Chart:
    by_step: dict[Provenance, dict[int, tuple[Evaluation, Metric]]] = defaultdict(dict)
    for evaluation in evaluations:
        for metric in evaluation.metrics:
            if metric.name == name:
                by_step[metric.provenance][evaluation.step] = (evaluation, metric)
    # A generator that was measured afterwards may be of a step before the last one.
    groups = {provenance: [points[step] for step in sorted(points)] for provenance, points in by_step.items()}
    series, floors = [], {}
    for provenance, points in groups.items():
        sample_text = f"{count_text(provenance.num_fake)} samples"
        series.append(
            {
                "name": sample_text,
                "color": ("a", "b", "c")[len(series) % 3],
                "x": {
                    "step": [evaluation.step for evaluation, _ in points],
                    "images": [evaluation.images_seen for evaluation, _ in points],
                    "seconds": [_compact(evaluation.training_seconds) for evaluation, _ in points],
                },
                "y": [_compact(metric.value) for _, metric in points],
                "error": [_compact(metric.spread) for _, metric in points],
            }
        )
        floor = points[-1][1].floor
        if floor is not None and math.isfinite(floor):
            floors[_compact(floor)] = series[-1]["color"]
    if len(floors) == 1:
        floors = dict.fromkeys(floors, "soft")
    rules = [{"y": floor, "label": "real data", "color": color} for floor, color in floors.items()]
    better = next(iter(groups.values()))[0][1].better
    rows = [
        (count_text(evaluation.step), _with_spread(metric), number_text(metric.floor), count_text(p.num_fake))
        for p, points in groups.items()
        for evaluation, metric in points
    ]
    return Chart(
        id=f"metric-{index}",
        title=name,
        about=f"{better.capitalize()} is better.",
        spec={"kind": "points", "series": series, "rules": rules},
        headings=("step", "value", "real data", "samples"),
        rows=rows,
    )


def _timeline(
    curves: Curves,
    chart_id: str,
    title: str,
    about: str,
    wanted: Sequence[tuple[str, str, str]],
    *,
    log: bool = False,
    smooth: bool = True,
    from_zero: bool = False,
) -> Chart | None:
    present = set(curves.names())
    shown = [(key, name, color) for key, name, color in wanted if key in present and curves.digest(key).count]
    if not shown:
        return None
    series = [{"name": name, "color": color, **curves.ordinates(key)} for key, name, color in shown]
    spec = {"kind": "timeline", "series": series, "log": log, "smooth": smooth, "fromZero": from_zero}
    rows = []
    for key, name, _ in shown:
        digest = curves.digest(key)
        lost = f" ({count_text(digest.num_not_finite)} not finite)" if digest.num_not_finite else ""
        numbers = map(number_text, (digest.first, digest.last, digest.low, digest.high))
        rows.append((name + lost, *numbers))
    return Chart(chart_id, title, about, spec, ("curve", "first", "last", "least", "greatest"), rows)


def _by_depth(keys: Sequence[str], prefix: str) -> list[tuple[str, str, str]]:
    return [(key, key.removeprefix(prefix), _depth(index, len(keys))) for index, key in enumerate(keys)]


def _depth(index: int, count: int) -> str:
    """A place on the colour ramp, from the first layer (0) to the last (1)."""
    return f"{index / max(1, count - 1):.3f}"


def _with_spread(metric: Metric) -> str:
    spread = f" ± {number_text(metric.spread, 2)}" if metric.spread is not None else ""
    return number_text(metric.value) + spread


def _compact(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _of_normalization(texts: Mapping[str, str], setting: str) -> str:
    """The text for a normalization, with options or without; those that bound no singular value are like none."""
    return texts.get(setting.partition(":")[0], texts["none"])
