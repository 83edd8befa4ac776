"""A model card: what a run's own files say of it, as Markdown. Every number in it stands in one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectralnorm.errors import UserError
from spectralnorm.gan.data import DataSummary
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.run_folder import DATA_FILE, RECORDS_FILE
from spectralnorm.gan.sampling import GENERATOR_FILE
from spectralnorm.records import Ending, Evaluation, Metric, Session, latest_evaluation, read_records

__all__ = ["model_card"]

_CONFIG_FILE = "config.json"
_CERTIFICATE_FILE = "certificate.json"
_UNKNOWN = "unknown"


def model_card(run: Path, *, license: str | None = None, picture: str | None = None) -> str:
    """Describe a run: its data, settings, training, metrics with their provenance, limits, and how to use it.

    Args:
        run: the run folder.
        license: of the weights, as the model hub names it; None: left for the user to fill in.
        picture: file name of a sample grid beside the card.

    Raises:
        UserError: the folder is not that of a run.
    """
    config = _json(run / _CONFIG_FILE)
    data = DataSummary.from_json(_json(run / DATA_FILE))
    try:
        records = list(read_records(run / RECORDS_FILE))
    except OSError as error:
        raise UserError(f"{run} has no readable {RECORDS_FILE} ({error.strerror}); give a run folder.") from error
    sessions = [record for record in records if isinstance(record, Session)]
    endings = [record for record in records if isinstance(record, Ending)]
    evaluation = latest_evaluation([record for record in records if isinstance(record, Evaluation)])
    last_step = max((record.step for record in records), default=0)
    sections = [
        _front_matter(config, license),
        f"# {run.resolve().name}",
        _what(config),
        "" if picture is None else f"![Samples]({picture})",
        "## How to use it",
        _use(config),
        "## Data",
        _table(("What", "Found"), data.rows()),
        "" if data.licence else "The licence of the data is not recorded: say here what it allows.",
        "## Training",
        _training(sessions, endings),
        "## Metrics",
        _metrics(evaluation, last_step),
        *_certificate(run / _CERTIFICATE_FILE, last_step),
        "## Limits",
        _limits(config, evaluation),
        "## All settings",
        f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _limits(config: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    if _makes_points(config):
        return "- It was trained on points that a formula makes. Intended for study."
    names = [] if evaluation is None else [metric.name for metric in evaluation.metrics]
    not_published = "Of them only FID is the published one. They" if "FID" in names else "They are not FID, and they"
    return f"""\
- It makes images like those it was trained on, with their gaps and their prejudices; nothing filters them.
- An image may resemble a training image. The run's report shows the nearest training image of some samples; that is no
  proof for the others.
- Distances above are measured through the feature extractors named there. {not_published} compare only with
  numbers of the same extractor, weights and number of images.
- Intended for research and for study. Who publishes images of it answers for them, under the licence of the data."""


def _front_matter(config: Mapping[str, Any], license: str | None) -> str:
    given = f"license: {license}" if license else f"license: {_UNKNOWN}  # yours to choose; see Data below"
    of_images = not _makes_points(config)
    tags = ["gan", "pytorch", "spectral-normalization", *["image-generation"] * of_images, str(config["architecture"])]
    task = ["pipeline_tag: unconditional-image-generation"] if of_images else []
    lines = [given, "library_name: spectralnorm", *task, "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _what(config: Mapping[str, Any]) -> str:
    size, kind = config["image_size"], "gray" if config["channels"] == 1 else "colour"
    names = config.get("class_names") or ()
    classes = f" of {len(names)} classes ({', '.join(names)})" if config.get("conditional") and names else ""
    made = "points in the plane" if _makes_points(config) else f"{kind} images of {size} x {size} pixels{classes}"
    return (
        f"A generative adversarial network (architecture `{config['architecture']}`) that makes {made} from latents of "
        f"{config['latent_dim']} normal numbers. The discriminator's normalization was `{config['normalization']}`, "
        f"the loss `{config['loss']}`. {GENERATOR_FILE} holds the averaged weights of the generator."
    )


def _makes_points(config: Mapping[str, Any]) -> bool:
    return config["architecture"] in ARCHITECTURES and ARCHITECTURES[config["architecture"]].makes_points


def _use(config: Mapping[str, Any]) -> str:
    names = config.get("class_names") or ()
    label = f", labels={names[0]!r}" if config.get("conditional") and names else ""
    sample = f"images = generator.sample(16, seed=0{label})  # uint8, (num, channels, height, width)"
    if _makes_points(config):
        sample = "points = generator.sample(16, seed=0).flatten(1)  # float32, (num, 2)"
    return f"""\
```console
$ pip install "spectralnorm[gan]"
```

```python
import spectralnorm

generator = spectralnorm.gan.load("{GENERATOR_FILE}")
{sample}
```"""


def _training(sessions: Sequence[Session], endings: Sequence[Ending]) -> str:
    rows: list[tuple[str, str]] = []
    if endings:
        ending = endings[-1]
        rows += [
            ("generator updates", f"{ending.step:,}"),
            ("real images seen", f"{ending.images_seen:,}"),
            ("training time", f"{ending.training_seconds:,.1f} s"),
            ("ended because of", ending.reason),
        ]
    else:
        rows.append(("ended", "not yet"))
    if sessions:
        session = sessions[-1]
        rows += [
            ("begun", sessions[0].started_at),
            ("hardware", ", ".join(f"{name}: {text}" for name, text in session.hardware.items())),
            ("versions", ", ".join(f"{name} {text}" for name, text in session.versions.items())),
        ]
    return _table(("What", "Recorded"), rows)


def _metrics(evaluation: Evaluation | None, last_step: int) -> str:
    if evaluation is None:
        return "None were measured."
    of = f"Of the {'final' if evaluation.final else 'last'} evaluation, at step {evaluation.step:,}"
    if evaluation.step < last_step:
        of = f"Of an evaluation at step {evaluation.step:,}; the run went on to step {last_step:,}"
    head = (
        "Metric",
        "Value",
        "Spread",
        "Real images score",
        "Better",
        "Real",
        "Generated",
        "Split",
        "Resize",
        "Seen by",
    )
    return f"{of}. What real images score is the same metric between two halves of the real images.\n\n" + _table(
        head, map(_metric_row, evaluation.metrics)
    )


def _metric_row(metric: Metric) -> tuple[str, ...]:
    source = metric.provenance
    return (
        metric.name,
        _number(metric.value),
        _number(metric.spread),
        _number(metric.floor),
        metric.better,
        f"{source.num_real:,}",
        f"{source.num_fake:,}",
        source.split,
        source.resize,
        f"{source.extractor} `{source.weights_sha256[:12]}`",
    )


def _certificate(file: Path, last_step: int) -> list[str]:
    if not file.exists():
        return []
    certificate = _json(file)
    step = certificate.get("step")
    of_step = "" if step is None else f" of step {step:,}"
    if step is not None and step < last_step:
        of_step += f", after which the run went on to step {last_step:,}, with SHA-256"
    # In full: a bound must not be rounded down.
    text = (
        f"Proven by `spectralnorm certify` for the weights{of_step} `{certificate['weights_sha256'][:12]}`: at most "
        f"{certificate['upper_bound']!r}, and at least {certificate['lower_bound']!r}."
    )
    return ["## Lipschitz constant of the discriminator", text]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a folder made by 'spectralnorm train'.") from error
