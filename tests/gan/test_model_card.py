import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectralnorm.cli import main
from spectralnorm.errors import UserError
from spectralnorm.gan import load, make_config, train
from spectralnorm.gan.hub_folder import write_hub_folder
from spectralnorm.gan.model_card import model_card
from spectralnorm.gan.scatter import SIDE
from spectralnorm.records import Evaluation, Metric, Provenance, RecordFile, Scalars, read_records

TINY: dict[str, Any] = {"batch_size": 4, "generator_width": 2, "discriminator_width": 2, "latent_dim": 8}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
FENCE = re.compile(r"```(?!json).*?```", re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a metric and a certificate, whose numbers are like no others."""
    folder = tmp_path_factory.mktemp("runs") / "garments"
    images = torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8)
    train(make_config("fashion", steps=3, device="cpu", num_sample_grids=1, **TINY), out=folder, data=images)
    provenance = Provenance(
        extractor="SqueezeNet",
        weights_sha256="f77c" * 16,
        num_real=7919,
        num_fake=6841,
        split="held-out",
        resize="none",
    )
    metrics = [
        Metric(name="KID", value=0.0314159, spread=0.00271828, floor=1.61803e-5, provenance=provenance),
        Metric(name="Broken", value=math.nan, provenance=provenance),
    ]
    file = RecordFile(folder / "metrics.jsonl")
    file.append(Evaluation(step=3, images_seen=12, training_seconds=1.0, final=True, metrics=metrics))
    file.close()
    certificate = {"step": 3, "upper_bound": 8.700000000000001, "lower_bound": 3.1, "weights_sha256": "abcd" * 16}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return folder


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.items() for leaf in _leaves(list(item))]
    if isinstance(value, list | tuple):
        # How many there are is recorded, too.
        return [len(value), *(leaf for item in value for leaf in _leaves(item))]
    return [value]


def _strangers(card: str, run: Path) -> list[str]:
    """The numbers of a card, its code apart, that none of the run's files holds in as many digits."""
    texts = [(run / name).read_text(encoding="utf-8") for name in ("config.json", "data.json", "certificate.json")]
    texts += (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    leaves = [run.name, *(leaf for text in texts for leaf in _leaves(json.loads(text)))]
    classes = json.loads((run / "data.json").read_text(encoding="utf-8"))["classes"]
    numbers = [float(leaf) for leaf in [*leaves, len(classes)] if isinstance(leaf, int | float)]
    words = " ".join(leaf for leaf in leaves if isinstance(leaf, str))
    strangers = []
    for match in NUMBER.finditer(FENCE.sub("", card)):
        token = match[0].rstrip(",")
        mantissa, _, exponent = token.replace(",", "").partition("e")
        decimals = len(mantissa.partition(".")[2])
        half_a_digit = 0.5000001 * 10.0 ** (int(exponent or 0) - decimals)
        value = float(token.replace(",", ""))
        if token not in words and not any(abs(value - number) <= half_a_digit for number in numbers):
            strangers.append(token)
    return strangers


def test_every_number_of_a_card_stands_in_the_records(run: Path):
    card = model_card(run, picture="samples.png")
    assert _strangers(card, run) == []
    # The test itself sees a number that comes from nowhere.
    assert _strangers(card + "\nTrained on 123,457 images to 98.765 %.\n", run) == ["123,457", "98.765"]


def test_a_card_tells_metrics_with_floor_and_provenance(run: Path):
    card = model_card(run)
    (row,) = [line for line in card.splitlines() if line.startswith("| KID")]
    for told in ("0.03142", "0.002718", "1.618e-05", "7,919", "6,841", "held-out", "SqueezeNet `f77cf77cf77c`"):
        assert told in row
    assert "| Broken | nan |" in card
    assert "for the weights of step 3 `abcdabcdabcd`: at most 8.700000000000001, and at least 3.1" in card


def test_a_metric_that_is_measured_later_joins_the_others_of_a_card(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    provenance = Provenance(
        extractor="Inception", weights_sha256="ab" * 32, num_real=9, num_fake=8, split="held-out", resize="none"
    )
    file = RecordFile(tmp_path / "run" / "metrics.jsonl")
    metrics = [Metric(name="FID", value=55.5, provenance=provenance)]
    file.append(Evaluation(step=3, images_seen=12, training_seconds=1.0, final=True, metrics=metrics))
    file.close()
    card = model_card(tmp_path / "run")
    assert "| KID | 0.03142 |" in card
    assert "| FID | 55.5 |" in card
    assert "Of them only FID is the published one." in card
    assert "They are not FID" in model_card(run)


def test_metrics_of_a_run_that_went_on_are_not_called_final(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    assert "Of the final evaluation, at step 3." in model_card(run)
    file = RecordFile(tmp_path / "run" / "metrics.jsonl")
    file.append(Scalars(step=5, images_seen=20, training_seconds=2.0, values={}))
    file.close()
    card = model_card(tmp_path / "run")
    assert "Of an evaluation at step 3; the run went on to step 5." in card
    assert "for the weights of step 3, after which the run went on to step 5, with SHA-256 `abcd" in card

    (old,) = [record for record in read_records(run / "metrics.jsonl") if isinstance(record, Evaluation)]
    newer = [dataclasses.replace(metric, value=7.5) for metric in old.metrics]
    file = RecordFile(tmp_path / "run" / "metrics.jsonl")
    file.append(dataclasses.replace(old, step=4, final=False, metrics=newer))
    file.close()
    card = model_card(tmp_path / "run")
    assert "Of an evaluation at step 4; the run went on to step 5." in card
    assert "| KID | 7.5 |" in card


def test_a_run_on_points_is_told_and_drawn_as_points(tmp_path: Path):
    run, folder = tmp_path / "run", tmp_path / "hub"
    train(make_config("toy-ring", steps=2, device="cpu", num_sample_grids=1, batch_size=8), out=run)
    assert main(["export", str(run), "--format", "huggingface", "--out", str(folder)]) == 0
    assert Image.open(folder / "samples.png").size == (SIDE, SIDE)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "makes points in the plane from latents" in card
    assert "image" not in card.split("## Data")[0]
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code.replace('"generator.safetensors"', repr(str(folder))), namespace)
    assert namespace["points"].shape == (16, 2)


def test_a_card_says_what_is_not_known(run: Path, tmp_path: Path):
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_text((run / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("")
    card = model_card(tmp_path)
    assert "None were measured." in card
    assert "| ended | not yet |" in card
    assert "The licence of the data is not recorded" in card
    assert "license: unknown  # yours to choose" in card
    assert "license: cc0-1.0\n" in model_card(tmp_path, license="cc0-1.0")
    assert "Lipschitz" not in card


def test_a_hub_folder_is_complete_and_its_snippet_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "new" / "upload"
    write_hub_folder(run, load(run), folder, license="mit", num_samples=9)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generator.safetensors",
        "samples.png",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["upload"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert "license: mit\n" in front
    assert "pipeline_tag: unconditional-image-generation\n" in front
    assert "![Samples](samples.png)" in body
    assert Image.open(folder / "samples.png").size == (96, 96)
    assert json.loads((folder / "config.json").read_text()) == json.loads((run / "config.json").read_text())
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert torch.equal(namespace["images"], load(run).sample(16, seed=0))
    with pytest.raises(UserError, match="not empty"):
        write_hub_folder(run, load(run), folder)


def test_the_command_writes_each_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), "--format", "card", "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == model_card(run)
    assert main(["export", str(run), "--format", "huggingface", "--out", str(tmp_path / "hub")]) == 0
    assert "yours to choose" in capsys.readouterr().out
    assert main(["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "generator.pt2")]) == 0
    assert re.search(r"differ from the trained generator's by at most \S+\.\n", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"card.md", "hub", "generator.pt2"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{run} --format tflite", "choose one of onnx, torch-export, huggingface, card"),
        ("{run} --format torch-export --license mit", "--license belongs to a model card"),
        ("{run}/generator.safetensors --format card", "is not a run folder"),
        ("{run}/samples --format card", "cannot be read"),
        ("{run}/nowhere", "does not exist"),
        ("{run} --format card --out /proc/none/card.md", "choose another --out"),
    ],
)
def test_a_slip_in_export_is_one_sentence(words: str, says: str, run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", *words.format(run=run).split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
