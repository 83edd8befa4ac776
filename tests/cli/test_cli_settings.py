"""The face of ``train``: its help, where settings come from; and ``recipes``."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spectralnorm.cli import _COMMANDS, main, train
from spectralnorm.cli.arguments import field_docs
from spectralnorm.cli.settings import flatten, grouped
from spectralnorm.gan.augment import AUGMENTATIONS
from spectralnorm.gan.config import Config
from spectralnorm.gan.initialization import INITIALIZATIONS
from spectralnorm.gan.losses import LOSSES
from spectralnorm.gan.models import ARCHITECTURES
from spectralnorm.gan.networks import build_discriminator, build_generator
from spectralnorm.gan.normalizations import NORMALIZATIONS
from spectralnorm.gan.parameter_counts import parameter_counts
from spectralnorm.gan.penalties import PENALTIES
from spectralnorm.gan.recipe_costs import COSTS_FILE, Cost, read_costs, telling_settings, write_costs
from spectralnorm.gan.recipes import RECIPES, make_config

HIDDEN = {"class_names", "class_counts"}
SHOWN = [field for field in dataclasses.fields(Config) if field.name not in HIDDEN]


def resolved(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["train", "--dry-run", *words]) == 0
    return json.loads(capsys.readouterr().out)


def help_of(command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_of_train_fits_and_groups_every_setting(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    page = help_of("train", columns, capsys, monkeypatch)
    assert [line for line in page.splitlines() if len(line) > columns] == []
    for field in SHOWN:
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", page)
        assert field.name == "recipe" or f" {field.metadata['group']} options " in page
    assert not any(f"--{name.replace('_', '-')} " in page for name in HIDDEN)
    assert all(flag in page for flag in ("--recipe", "--config", "--out", "--dry-run"))
    assert page[page.index("examples:") :].count("spectralnorm train") >= 4


def test_every_setting_is_explained():
    docs = field_docs(Config)
    assert all(docs.get(field.name) for field in SHOWN)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("architecture", ARCHITECTURES),
        ("augmentation", AUGMENTATIONS),
        ("initialization", INITIALIZATIONS),
        ("loss", LOSSES),
        ("normalization", NORMALIZATIONS),
        ("penalty", PENALTIES),
    ],
)
def test_the_help_of_a_choice_names_all_choices(field: str, choices: dict):
    words = re.findall(r"[\w-]+", field_docs(Config)[field])
    assert set(choices) <= set(words)


def test_the_defaults_in_the_help_are_those_of_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    page = help_of("train --recipe dcgan-64", 120, capsys, monkeypatch)
    assert "(default: 50000)" in page
    assert "(default: dcgan-64)" in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_hold_every_setting_of_a_recipe(recipe: str):
    @dataclasses.dataclass(frozen=True)
    class Front:
        recipe: str

    config = make_config(recipe)
    front, values = flatten(grouped(vars(config), front=Front(recipe)))
    hidden = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)} | values
    assert Config(**{**hidden, "recipe": front.recipe}) == config
    assert set(values) == {field.name for field in SHOWN} - {"recipe"}


def test_the_command_line_beats_the_file_and_the_file_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "dcgan-64"\nbatch_size = 32\nbeta1 = 0.25\nminutes = 3\npenalty = "r1"\n')
    config = resolved(capsys, "--config", str(file), "--beta1", "0.75")
    assert (config["recipe"], config["image_size"], config["batch_size"]) == ("dcgan-64", 64, 32)
    assert (config["beta1"], config["penalty"]) == (0.75, "r1")
    assert (config["steps"], config["minutes"]) == (None, 3.0)
    config = resolved(capsys, f"--config={file}", "--steps", "9", "--recipe", "sncnn-cifar10", "--penalty", "none")
    assert (config["recipe"], config["architecture"], config["batch_size"]) == ("sncnn-cifar10", "sncnn", 32)
    assert (config["steps"], config["minutes"], config["penalty"]) == (9, None, None)


def test_a_value_of_the_file_that_the_command_line_replaces_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.toml"
    file.write_text('architecture = "stylegan2"\nimage_size = 256\n')
    assert resolved(capsys, "--config", str(file), "--channels", "3")["image_size"] == 256
    assert resolved(capsys, "--config", str(file), "--image-size", "64", "--architecture=dcgan")["image_size"] == 64


def test_the_output_of_a_dry_run_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--recipe", "fashion-strict", "--steps", "70", "--minutes", "1.5", "--loss", "hinge", "--lipschitz=none"]
    config = resolved(capsys, *words)
    assert (config["steps"], config["minutes"], config["lipschitz"]) == (70, 1.5, None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert resolved(capsys, "--config", str(file)) == config
    custom = {**config, "recipe": "custom"}
    file.write_text(json.dumps(custom))
    assert resolved(capsys, "--config", str(file)) == custom


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("stepz = 3", [], "Unknown setting 'stepz' in mine.toml; did you mean steps?"),
        ("steps = -3", [], "steps must be a number at least 1, got -3"),
        ('recipe = "fashoin"', [], "Unknown recipe 'fashoin' (did you mean fashion?); choose one of fashion"),
        ('loss = "hing"', [], "Unknown loss 'hing' (did you mean hinge?); choose one of hinge"),
        ("", ["--beta1", "high"], "--beta1 must be a number, got 'high'"),
        ("", ["--stepz", "4"], "Unknown option '--stepz'; did you mean --steps?"),
        ("", ["--confg", "4"], "Unknown option '--confg'; did you mean --config?"),
        ("", ["--config"], "--config needs a value"),
        ("", ["--steps", "none", "--minutes=none"], "steps and minutes are both missing"),
    ],
)
def test_a_slip_in_a_file_or_a_flag_is_one_sentence(
    text: str,
    words: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    assert main(["train", "--config", "mine.toml", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {says}")
    assert captured.err.count("\n") == 1


def test_recipes_are_listed_with_their_source_and_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes"]) == 0
    page = capsys.readouterr().out
    assert "…" not in page
    for name in RECIPES:
        (row,) = re.findall(rf"^{re.escape(name)} +\S.*$", page, re.MULTILINE)
        assert make_config(name).architecture in row
        assert re.search(r"\d, \d+|\d, \?|not measured|too much", row)
    assert "Miyato et al. 2018, Table 1." in page


def test_one_recipe_is_shown_with_all_settings_and_what_it_changes(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "sncnn-cifar10"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"^ *loss +nonsaturating +hinge *$", page, re.MULTILINE)
    assert re.search(r"^ *batch_size +64 *$", page, re.MULTILINE)
    for field in SHOWN:
        assert field.name == "recipe" or re.search(rf"^ *{field.name} ", page, re.MULTILINE)
    assert main(["recipes", "sncn"]) == 2
    assert "Unknown recipe 'sncn'; choose one of fashion" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["fashion", "sngan-projection-cifar10", "stylegan2-64"])
def test_parameters_are_counted_without_making_the_networks(recipe: str):
    config = dataclasses.replace(make_config(recipe), generator_width=8, discriminator_width=8)
    given = dataclasses.replace(config, class_names=tuple("0123456789")) if config.conditional else config
    networks = build_generator(given, normalized=False), build_discriminator(given, normalized=False)
    assert parameter_counts(config) == tuple(sum(p.numel() for p in network.parameters()) for network in networks)


def test_a_run_is_gone_on_with_by_the_program_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / ".venv" / "bin" / "spectralnorm"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [".venv/bin/spectralnorm"])
    monkeypatch.setenv("PATH", str(tmp_path))
    commands = []
    monkeypatch.setattr(train, "_train", lambda config, out, command: commands.append(command) or 0)
    assert main(["train", "--out", "my run"]) == 0
    monkeypatch.setenv("PATH", str(program.parent))
    assert main(["train", "--out", "my run"]) == 0
    monkeypatch.setattr("sys.argv", ["-c"])
    assert main(["train", "--out", "my run"]) == 0
    assert commands == [".venv/bin/spectralnorm train --out 'my run'", *2 * ["spectralnorm train --out 'my run'"]]


def test_no_help_page_imports_torch():
    # One process for all commands: where none of them has imported torch at the end, none has.
    code = f"""
import sys
from spectralnorm.cli import _COMMANDS, main, train
for command in {tuple(_COMMANDS)}:
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert "torch" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: spectralnorm {command}" in done.stdout for command in _COMMANDS)


def cost_of(config: Config, **fields: object) -> Cost:
    given = {"peak_memory_bytes": 2**30, "images_per_second": 50.0, "machine": "this one"} | fields
    return Cost(versions="torch", date="2020-01-01", settings=telling_settings(config), **given)


def test_a_cost_counts_as_long_as_the_settings_are_those_of_the_recipe(tmp_path: Path):
    file, config = tmp_path / "costs.json", make_config("fashion")
    assert read_costs("fashion", config, file=file) == []
    write_costs("fashion", cost_of(config), file=file)
    write_costs("fashion", cost_of(config, machine="another"), file=file)
    write_costs("fashion", cost_of(config, images_per_second=None), file=file)
    found = {cost.machine: cost.images_per_second for cost in read_costs("fashion", config, file=file)}
    assert found == {"this one": None, "another": 50.0}
    assert len(read_costs("fashion", dataclasses.replace(config, seed=3, log_every=7, minutes=9.0), file=file)) == 2
    assert read_costs("fashion", dataclasses.replace(config, batch_size=17), file=file) == []


def test_a_cost_with_a_pace_comes_before_one_of_a_busy_machine(tmp_path: Path):
    file, config = tmp_path / "costs.json", make_config("fashion")
    write_costs("fashion", cost_of(config, machine="busy", images_per_second=None), file=file)
    write_costs("fashion", cost_of(config), file=file)
    assert [cost.machine for cost in read_costs("fashion", config, file=file)] == ["this one", "busy"]


def test_the_costs_that_are_shipped_are_of_recipes_that_there_are():
    table = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    assert table
    for name, entries in table.items():
        assert name in RECIPES
        assert all(Cost(**entry).peak_memory_bytes is None or Cost(**entry).peak_memory_bytes > 0 for entry in entries)
