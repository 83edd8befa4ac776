"""``spectralnorm train``: parse, call, print."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.cli.settings import flatten, grouped
from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, config_to_json
from spectralnorm.gan.config_file import overlay, read_config_file
from spectralnorm.gan.recipes import RECIPES, make_config

__all__ = ["run"]

_PROG = "spectralnorm train"

_DESCRIPTION = """Train a GAN on the built-in images or on yours; the same command again resumes.

A setting is what the command line says, else the file, else the recipe.

The defaults below are those of the recipe and the file that are given here."""

_EXAMPLES = """examples:
  spectralnorm train                         the built-in images, minutes
  spectralnorm train --data photos/ --recipe dcgan-64 --minutes 60
  spectralnorm train --recipe r3gan-32 --help    the defaults of that recipe
  spectralnorm train --loss hinge --dry-run > mine.json    all settings, to edit
  spectralnorm train --config mine.json --seed 1  from a file, one replaced
  spectralnorm recipes                       what recipes there are"""


@dataclass(frozen=True)
class RunOptions:
    """Where the settings come from and where the run goes."""

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """What the settings start from; spectralnorm recipes lists them. --steps or --minutes replaces its budget."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File of settings, any number of them: TOML, YAML, or the JSON that --dry-run prints."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Run folder; none: runs/ and the name of the recipe, or of the data."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """Print all settings and stop; the output is a file for --config."""


def run(words: list[str]) -> int:
    """Train, then write the report."""
    config, options = _options(words)
    if options.dry_run:
        print(config_to_json(config), end="")
        return 0
    return _train(config, options.out, command=shlex.join([_program(), "train", *words]))


def _program() -> str:
    """How to call the command again: as it was called, where its name alone does not find it."""
    called, found = Path(sys.argv[0]), shutil.which("spectralnorm")
    is_found = found is not None and Path(found).resolve() == called.resolve()
    return "spectralnorm" if called.name != "spectralnorm" or is_found else sys.argv[0]


def _train(config: Config, out: Path | None, *, command: str) -> int:
    # Here, and not above: a help page needs none of it.
    from spectralnorm.cli.display import TerminalDisplay
    from spectralnorm.gan.run import train
    from spectralnorm.report import build_report

    try:
        with TerminalDisplay(config) as display:
            result = train(config, out=out, display=display)
    except KeyboardInterrupt:  # while images were read, at the end, or a second time
        print(f"Interrupted. Go on from the last checkpoint with: {command}", file=sys.stderr)
        return 130
    if not result.is_first:  # of several processes the first one reports
        return 130 if result.reason == "interrupted" else 0
    if result.reason == "interrupted":
        print(f"Stopped at step {result.step}; everything is saved in {result.folder}. Go on with: {command}")
        return 130
    if result.reason == "already finished":
        print(f"{result.folder} is already finished (step {result.step}); give more --steps or --minutes to go on.")
        if (result.folder / "report.html").exists():
            return 0
    print(f"Report: {build_report(result.folder)}")
    return 0


def _options(words: list[str]) -> tuple[Config, RunOptions]:
    file = _value_of("--config", words)
    from_file = {} if file is None else read_config_file(file)
    recipe = _value_of("--recipe", words) or from_file.get("recipe", "fashion")
    below = overlay(_settings_of(recipe), from_file) | {"recipe": recipe}
    default = grouped(below, front=RunOptions(recipe=recipe))
    options = parse(type(default), words, prog=_PROG, default=default, description=_DESCRIPTION, epilog=_EXAMPLES)
    front, values = flatten(options)
    # What the command line says of the budget replaces what stood below it; all other values are there already.
    given = {name: values[name] for name in ("steps", "minutes") if _value_of(f"--{name}", words) is not None}
    return Config(**overlay({**below, **values}, given)), front


def _settings_of(recipe: str) -> dict[str, Any]:
    if recipe == "custom":  # settings that began with no recipe, such as a config made in Python
        return {field.name: field.default for field in dataclasses.fields(Config)}
    return vars(make_config(recipe))


def _value_of(flag: str, words: list[str]) -> str | None:
    for position, word in enumerate(words):
        if word == flag:
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                choices = f"; choose one of {', '.join(RECIPES)}" if flag == "--recipe" else ""
                raise UserError(f"{flag} needs a value{choices}.")
            return words[position + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
