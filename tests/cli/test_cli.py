import builtins
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spectralnorm.cli import main
from spectralnorm.gan.data import ImageSet, ImageStream, open_images
from spectralnorm.gan.inputs import open_run_data
from spectralnorm.gan.run_folder import locked
from spectralnorm.gan.sampling import TrainedGenerator, load, save_generator
from spectralnorm.records import Evaluation, Metric, read_records

SIZE = {"image_size": 32, "channels": 1}
TINY = "--batch-size 4 --generator-width 2 --discriminator-width 2 --latent-dim 8 --device cpu".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--out", str(folder), "--steps", "4", *TINY]) == 0
    return folder


def test_training_ends_with_a_report(run: Path):
    assert (run / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_the_same_command_again_says_it_is_finished(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--out", str(run), "--steps", "4", *TINY]) == 0
    assert "already finished (step 4)" in capsys.readouterr().out


def test_a_dry_run_prints_the_whole_config_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--recipe", "sncnn-cifar10", "--steps", "7", "--loss=hinge"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["recipe"], config["steps"], config["loss"]) == ("sncnn-cifar10", 7, "hinge")
    assert config["minutes"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_grid_of_samples_is_one_picture(run: Path, tmp_path: Path):
    assert main(["sample", str(run), "--num", "6", "--columns", "3", "--out", str(tmp_path / "grid.png")]) == 0
    assert Image.open(tmp_path / "grid.png").size == (96, 64)


def test_none_stands_for_no_value_where_the_help_says_so(run: Path, tmp_path: Path):
    words = ["--num", "4", "--class=none", "--columns", "none", "--out", str(tmp_path / "grid.png")]
    assert main(["sample", str(run), *words]) == 0
    assert Image.open(tmp_path / "grid.png").size == (64, 64)


@pytest.mark.parametrize("command", ["sample", "evaluate", "certify", "export", "report", "recipes", "train"])
def test_help_pages_show_no_types_of_the_parser(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    page = capsys.readouterr().out
    assert "--help" in page
    assert "None" not in page


def test_single_samples_are_single_files_and_nothing_else(run: Path, tmp_path: Path):
    assert main(["sample", str(run), "--num", "11", "--format", "png", "--out", str(tmp_path / "images")]) == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{index:02d}.png" for index in range(11)]
    assert Image.open(tmp_path / "images" / names[0]).size == (32, 32)


def test_a_seed_names_its_picture(run: Path, tmp_path: Path):
    # After four steps all images are still one flat gray; larger weights tell the latents apart.
    generator = load(run)
    for parameter in generator.parameters():
        parameter *= 10
    save_generator(tmp_path / "generator.safetensors", generator)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            main(["sample", str(tmp_path), "--num", "4", "--seed", seed, "--out", str(tmp_path / f"{name}.png")]) == 0
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_walks_have_one_row_each(run: Path, tmp_path: Path):
    assert main(["sample", str(run), "--interpolate", "--num", "2", "--out", str(tmp_path / "walks.png")]) == 0
    assert Image.open(tmp_path / "walks.png").size == (12 * 32, 2 * 32)


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch):
    """Of the built-in images 200 of 10,000 are held out, since SqueezeNet takes half a minute for all."""

    def few(*arguments: Any) -> ImageSet:
        images = open_run_data(*arguments)
        assert isinstance(images, ImageSet)
        labels = None if images.held_out_labels is None else images.held_out_labels[:200]
        return dataclasses.replace(images, held_out=images.held_out[:200], held_out_labels=labels)

    monkeypatch.setattr("spectralnorm.cli.measuring.open_run_data", few)


@pytest.mark.usefixtures("few_held_out")
def test_evaluate_prints_the_numbers_and_records_them(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(run), "--num", "100", "--no-intervals"]) == 0
    printed = capsys.readouterr().out
    (record,) = [record for record in read_records(run / "metrics.jsonl") if isinstance(record, Evaluation)]
    assert record.step == 4
    for metric in record.metrics:
        source = metric.provenance
        for told in (metric.name, source.extractor, source.weights_sha256[:12], source.split, source.resize):
            assert told in printed


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of noise, dark and bright."""
    folders = []
    for number, most in enumerate((60, 256)):
        folder = tmp_path_factory.mktemp("photos")
        generator = torch.Generator().manual_seed(number)
        for index in range(24):
            pixels = torch.randint(0, most, (20, 20, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        folders.append(folder)
    return folders


def test_two_folders_are_compared_and_written_as_json(
    photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["evaluate", str(photos[0]), "--against", str(photos[1]), "--metrics", "fd, pr"]
    assert main([*command, "--json", str(tmp_path / "new" / "numbers.json")]) == 0
    written = json.loads((tmp_path / "new" / "numbers.json").read_text(encoding="utf-8"))
    assert [metric["name"] for metric in written["metrics"]] == [
        *("FD-SqueezeNet", "Precision-SqueezeNet", "Recall-SqueezeNet")
    ]
    distance = written["metrics"][0]
    assert distance["provenance"]["num_fake"] == 24
    assert distance["provenance"]["split"] == photos[1].name
    assert distance["interval"][0] < distance["value"] < distance["interval"][1]
    printed = capsys.readouterr().out
    assert f"24 generated against 12 real images ({photos[1].name})" in printed
    assert "The floor is what real images score that were set aside for it." in printed
    assert "FD-SqueezeNet" in printed
    assert "95 % interval" in printed
    assert "e+" not in printed  # thousands are written out
    assert distance["value"] > 5 * distance["floor"]


def test_a_folder_is_compared_with_the_held_out_part_of_data(photos: list[Path], capsys: pytest.CaptureFixture[str]):
    command = ["evaluate", str(photos[0]), "--data", str(photos[1]), "--metrics", "fd,copying", "--no-intervals"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Copied share-SqueezeNet" in printed
    assert "real images (held-out)" in printed


def test_nothing_in_a_table_of_metrics_is_cut_short(
    photos: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["evaluate", str(photos[0]), "--against", str(photos[1]), "--metrics", "fd,diversity"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    rows = [line.split() for line in printed.splitlines() if "SqueezeNet " in line and ":" not in line]
    assert [row[-1] for row in rows] == ["lower", "1"]


@pytest.mark.usefixtures("few_held_out")
def test_numbers_of_a_run_are_recorded_although_their_file_cannot_be_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(run, tmp_path / "run")
    before = len(list(read_records(run / "metrics.jsonl")))
    (tmp_path / "file").write_text("")
    command = ["evaluate", str(copy), "--num", "100", "--no-intervals", "--json", str(tmp_path / "file" / "n.json")]
    assert main(command) == 2
    assert "give another --json" in capsys.readouterr().err
    assert len(list(read_records(copy / "metrics.jsonl"))) == before + 1


@pytest.mark.usefixtures("few_held_out")
def test_the_path_length_of_a_run_is_measured(run: Path, capsys: pytest.CaptureFixture[str]):
    command = ["evaluate", str(run / "generator.safetensors"), "--num", "100", "--metrics", "ppl"]
    assert main([*command, "--extractor", "classifier"]) == 0
    assert "Path length in z-Classifier" in capsys.readouterr().out


@pytest.mark.usefixtures("few_held_out")
def test_evaluating_a_run_that_is_being_trained_leaves_its_records_alone(run: Path, capsys: pytest.CaptureFixture[str]):
    before = (run / "metrics.jsonl").stat()
    with locked(run):
        assert main(["evaluate", str(run), "--num", "100", "--no-intervals"]) == 0
    printed = capsys.readouterr().out
    assert "KID-SqueezeNet" in printed
    assert "Not recorded, because another process is training" in printed
    after = (run / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@pytest.mark.parametrize("loading", ["stream", "prepare"])
def test_a_run_is_measured_against_what_it_held_out_and_no_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, loading: str
):
    measured = []

    def sums(images: ImageSet | ImageStream) -> list[int]:
        return sorted(images.held_out.sum(dim=(1, 2, 3)).tolist())

    def measure(generator: TrainedGenerator, images: ImageSet | ImageStream, **options: object) -> tuple[Metric, ...]:
        measured.append(sums(images))
        return ()

    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("spectralnorm.cli.measuring.measure", measure)
    monkeypatch.setattr("spectralnorm.gan.data.load._must_stream", lambda *arguments: True)
    data, moved, run = tmp_path / "noise.npy", tmp_path / "moved" / "noise.npy", tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 256, (60, 32, 32), dtype=np.uint8))
    train = ["train", "--data", str(data), "--data-loading", loading, "--out", str(run), "--steps", "2", *TINY]
    assert main(train) == 0
    split = {each: sums(open_images(data, **SIZE, loading=each)) for each in ("stream", "prepare")}
    assert split["stream"] != split["prepare"]
    moved.parent.mkdir()
    shutil.copy(data, moved)
    for words in ([run], [run, "--data", data], [run / "generator.safetensors", "--data", moved]):
        assert main(["evaluate", *map(str, words), "--num", "100"]) == 0
    assert measured == [split[loading]] * 3

    np.save(data, np.load(data)[::-1] // 2)
    assert main(["evaluate", str(run), "--num", "100"]) == 2
    assert "not those that" in capsys.readouterr().err
    assert len(measured) == 3


def test_images_are_compared_with_what_a_training_on_a_large_set_holds_out(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compared = []

    def compare(fake: torch.Tensor, real: torch.Tensor, *, training: torch.Tensor | None, **options: object):
        compared.append((real, None if training is None else len(training)))
        return ()

    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("spectralnorm.gan.data.load._must_stream", lambda *arguments: True)
    monkeypatch.setattr("spectralnorm.cli.measuring.evaluate", compare)
    for metrics in ("fd", "fd,copying"):
        assert main(["evaluate", str(photos[0]), "--data", str(photos[1]), "--metrics", metrics]) == 0
    held_out = open_images(photos[1], image_size=20, channels=3, loading="stream").held_out
    assert all(torch.equal(real, held_out) for real, _ in compared)
    assert [num_training for _, num_training in compared] == [None, 22]


def test_report_rebuilds_the_page(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text("not an image")
    (tmp_path / "one").mkdir()
    picture = Image.effect_noise((40, 40), 60)
    picture.save(tmp_path / "one" / "only.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cut.png").write_bytes((tmp_path / "one" / "only.png").read_bytes()[:200])
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "not-a-run" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train --data {}/nowhere", "nowhere"),
        ("train --data {}/empty", "empty"),
        ("train --data {}/texts", "texts"),
        ("train --data {}/one", "one"),
        ("train --data {}/broken", "cut.png"),
        ("train --recipe fashoin", "choose one of fashion"),
        ("train --recipe", "--recipe needs a value; choose one of fashion"),
        ("train --loss hing", "choose one of hinge, nonsaturating"),
        ("train --normalization instance", "choose one of spectral, strict, weight"),
        ("train --stepz 5", "Unknown option '--stepz'; did you mean --steps?"),
        ("train --qqqqqq 5", "choose one of --"),
        ("train --steps abc", "--steps must be a whole number, got 'abc'"),
        ("train --minutes abc", "--minutes must be a number, got 'abc'"),
        ("train --penalty R1", "choose one of r1, r2, r1-r2, gradient-penalty, dragan, or none"),
        ("train --steps -5", "steps must be a number at least 1, got -5"),
        ("train --steps 0", "steps must be a number at least 1, got 0"),
        ("train --minutes nan", "minutes must be a number above 0, got nan"),
        ("train --generator-lr nan", "generator_lr must be a number above 0, got nan"),
        ("train --discriminator-lr -1", "discriminator_lr must be a number above 0, got -1.0"),
        ("train --batch-size 100000", "batch_size must be at most the number of training images"),
        ("train --batch-size", "--batch-size"),
        ("train extra", "Unexpected argument 'extra'"),
        ("train --out {}/not-a-run", "not a run folder"),
        ("train --out {}/file", "choose another --out"),
        ("train --out /proc/nothing-can-be-made-here", "choose another --out"),
        ("trian", "Unknown command 'trian'; choose one of train, recipes, sample, export, evaluate, certify, report"),
        ("sample {}/nowhere", "does not exist"),
        ("sample {}/empty", "has no trained generator yet"),
        ("sample", "spectralnorm sample needs PATH: run folder, or generator.safetensors; see"),
        ("sample {}/empty --num x", "--num must be a whole number, got 'x'"),
        ("sample {}/empty --clas 3", "did you mean --class?"),
        ("recipes --all", "Unknown option '--all'; spectralnorm recipes has none besides --help"),
        ("sample {}/empty --qqqqqq 5", "choose one of --class, --columns, --device, --format, --fps, --frames"),
        ("sample {}/empty --format jpeg", "choose one of grid, png"),
        ("sample {}/empty --out grid.jpg", "--out of a grid must end in .png, got 'grid.jpg'"),
        ("train --data=", "data is empty; give a path or a name"),
        ("sample {}/empty --num 0", "num must be at least 1, got 0"),
        ("evaluate {}/nowhere", "does not exist"),
        ("evaluate {}/empty --num 5", "num must be at least 100"),
        ("evaluate {}/one --against {}/one --image-size 0", "image_size must be at least 1, got 0"),
        ("evaluate {}/one --against {}/one --image-size -5", "image_size must be at least 1, got -5"),
        ("evaluate {}/empty", "say what to compare them with: --data"),
        ("evaluate {}/empty --data a --against b", "two things to compare with"),
        ("evaluate {}/empty --metrics fd,nope", "Unknown metric 'nope'; choose one of default, all, fd"),
        ("evaluate {}/empty --against {}/texts --metrics ppl", "needs a generator"),
        ("evaluate {}/empty --against {}/texts", "is empty"),
        ("evaluate {}/texts --against {}/one", "holds no images, only other files"),
        ("evaluate {}/one/only.png --against {}/one", "is a single image"),
        ("evaluate {}/one --against {}/one", "at least two generated images, got 1"),
        ("evaluate {}/one --against {}/one --metrics ,", "--metrics names none; choose of default"),
        ("report {}/nowhere", "nowhere"),
    ],
)
def test_a_slip_is_one_clear_line_and_status_two(
    command: str,
    says: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(files / "empty")
    words = [word.format(files) for word in command.split()]
    if words[0] == "train" and not {"--steps", "--minutes"} & set(words):
        words += ["--steps", "4"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    assert says in captured.err
    assert "Traceback" not in captured.out


def test_ctrl_c_before_training_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectralnorm.gan.run.train", interrupt)
    assert main(["train", "--steps", "4", "--out", str(tmp_path / "my run")]) == 130
    assert capsys.readouterr().err.endswith(f"with: spectralnorm train --steps 4 --out '{tmp_path}/my run'\n")


def test_cuda_where_there_is_none_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--device", "cuda", "--steps", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: device 'cuda' was asked for")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_shows_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "sample", "evaluate", "report"))


def test_the_help_of_train_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--data", "--steps", "--minutes", "--out", "--dry-run", "--loss"))


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"spectralnorm \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_certificate_is_written_beside_the_run_and_into_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    words = ["--recipe", "fashion-strict", "--steps", "2", "--minutes", "1", *TINY]
    assert main(["train", "--out", str(run), *words]) == 0
    assert main(["certify", str(run), "--max", "8"]) == 0
    certificate = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    assert 0 < certificate["lower_bound"] <= certificate["upper_bound"] <= 8
    assert certificate["step"] == 2
    assert "Lipschitz constant at most" in capsys.readouterr().out
    assert "with every rounding error accounted for" in (run / "report.html").read_text(encoding="utf-8")
    assert main(["certify", str(run), "--max", "0.01"]) == 1
    assert "above the maximum 0.01" in capsys.readouterr().out

    checkpoint = max((run / "checkpoints").glob("*.safetensors"))
    out = tmp_path / "of-file.json"
    settings = ["--recipe", "fashion-strict", "--discriminator-width", "2", "--out", str(out)]
    assert main(["certify", str(checkpoint), *settings]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["upper_bound"] == certificate["upper_bound"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist; give a run folder or a file of weights"),
        ([__file__], "give --recipe NAME"),
        (["nowhere", "--recipe", "fashion"], "There is no file nowhere"),
        (["nowhere", "--max", "-1"], "max must be a positive number"),
    ],
)
def test_a_slip_in_certify_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["certify", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "evaluate", "certify"])
def test_a_missing_package_is_named_with_what_installs_it(
    command: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    imported = builtins.__import__

    def without_safetensors(name: str, *arguments, **options):
        if name == "safetensors" or name.startswith(("safetensors.", "spectralnorm.gan.sampling")):
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
        return imported(name, *arguments, **options)

    for module in [name for name in sys.modules if name.startswith("spectralnorm.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_safetensors)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "spectralnorm.gan.discriminators", raising=False)
    assert main([command, str(run)]) == 2
    assert "needs the package 'safetensors'; install it with: pip install" in capsys.readouterr().err
