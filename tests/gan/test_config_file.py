import dataclasses
import sys
from pathlib import Path

import pytest

from spectralnorm.errors import UserError
from spectralnorm.gan.config import config_to_json
from spectralnorm.gan.config_file import overlay, read_config_file
from spectralnorm.gan.recipes import RECIPES, make_config

SETTINGS = {"recipe": "dcgan-64", "batch_size": 32, "generator_lr": 1e-4, "beta1": 0.0, "minutes": None}
TEXTS = {
    ".toml": 'recipe = "dcgan-64"\nbatch-size = 32\ngenerator_lr = 1e-4\nbeta1 = 0\nminutes = "none"\n',
    ".yaml": "recipe: dcgan-64\nbatch_size: 32\ngenerator_lr: 1e-4\nbeta1: 0\nminutes:\n",
    ".json": '{"recipe": "dcgan-64", "batch_size": 32.0, "generator_lr": 1e-4, "beta1": 0, "minutes": null}',
}


@pytest.mark.parametrize("suffix", TEXTS)
def test_the_same_settings_come_out_of_each_format(suffix: str, tmp_path: Path):
    if suffix == ".yaml":
        pytest.importorskip("yaml")
    file = tmp_path / f"mine{suffix}"
    file.write_text(TEXTS[suffix])
    settings = read_config_file(file)
    assert settings == SETTINGS
    assert [type(value) for value in settings.values()] == [type(value) for value in SETTINGS.values()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_run_writes_is_read_back_whole(recipe: str, tmp_path: Path):
    config = make_config(recipe)
    file = tmp_path / "config.json"
    file.write_text(config_to_json(config))
    assert read_config_file(file) == dataclasses.asdict(config)


def test_an_empty_file_changes_nothing(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text("")
    assert read_config_file(file) == {}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "batch_sise = 3", "Unknown setting 'batch_sise' in {}; did you mean batch_size?"),
        ("a.toml", "qqq = 3", "Unknown setting 'qqq' in {}; spectralnorm train --help lists the settings."),
        ("a.toml", "[training]\nsteps = 3", "Unknown section 'training' in {}"),
        ("a.toml", "steps = 3\nsteps = 4", "is not valid TOML"),
        ("a.toml", "num_evaluations = 3\nnum-evaluations = 4", "gives num_evaluations twice"),
        ("a.toml", "steps = ", "is not valid TOML (Invalid value"),
        ("a.toml", 'batch_size = "many"', 'batch_size in {} must be a whole number, got "many".'),
        ("a.toml", "batch_size = 3.5", "batch_size in {} must be a whole number, got 3.5."),
        ("a.toml", "batch_size = true", "batch_size in {} must be a whole number, got true."),
        ("a.toml", "batch_size = inf", "batch_size in {} must be a whole number, got Infinity."),
        ("a.toml", 'beta1 = "high"', 'beta1 in {} must be a number, got "high".'),
        ("a.toml", 'steps = "few"', 'steps in {} must be a whole number or none, got "few".'),
        ("a.toml", "loss = 3", "loss in {} must be a text, got 3."),
        ("a.toml", "loss = 2024-01-01", 'loss in {} must be a text, got "2024-01-01".'),
        ("a.json", "[1]", "must hold names and values of settings, got list"),
        ("a.json", '{"steps": 3', "is not valid JSON"),
        ("a.yaml", "steps: [3", "is not valid YAML (line"),
        ("a.txt", "steps = 3", "must be a .toml, .yaml or .json file"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(name: str, text: str, says: str, tmp_path: Path):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_config_file(file)
    assert says.format(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="Cannot read"):
        read_config_file(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes('data = "Schönes"'.encode("latin-1"))
    with pytest.raises(UserError, match="not a text in UTF-8"):
        read_config_file(tmp_path / "latin.toml")


def test_yaml_without_its_package_names_the_extra_and_the_other_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.yaml").write_text("steps: 3")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r"spectralnorm\[yaml\].*TOML"):
        read_config_file(tmp_path / "mine.yaml")


def test_a_budget_above_replaces_the_one_below():
    below = {"steps": None, "minutes": 2.0, "seed": 0}
    assert overlay(below, {"steps": 5}) == {"steps": 5, "minutes": None, "seed": 0}
    assert overlay(below, {"steps": 5, "minutes": 1.0}) == {"steps": 5, "minutes": 1.0, "seed": 0}
    assert overlay(below, {"steps": None, "seed": 1}) == {"steps": None, "minutes": 2.0, "seed": 1}
