"""``spectralnorm train``: parse, call, print."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from spectralnorm.cli.arguments import parse
from spectralnorm.cli.display import TerminalDisplay
from spectralnorm.errors import UserError
from spectralnorm.gan.config import Config, config_to_json
from spectralnorm.gan.recipes import RECIPES, make_config
from spectralnorm.gan.run import train
from spectralnorm.report import build_report

__all__ = ["run"]

_PROG = "spectralnorm train"


@dataclass(frozen=True)
class TrainOptions:
    """Train a GAN on the built-in images or on your own; the same command again resumes.

    The recipe sets every default; --steps or --minutes replaces its budget.
    """

    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path | None = None
    """Run folder; none: runs/ and the name of the recipe, or of the data."""
    dry_run: bool = False
    """Print the full config and stop."""


def run(words: list[str]) -> int:
    """Train, then write the report."""
    options = _options(words)
    if options.dry_run:
        print(config_to_json(options.config), end="")
        return 0
    command = shlex.join([*_PROG.split(), *words])
    try:
        with TerminalDisplay(options.config) as display:
            result = train(options.config, out=options.out, display=display)
    except KeyboardInterrupt:  # while images were read, at the end, or a second time
        print(f"Interrupted. Go on from the last checkpoint with: {command}", file=sys.stderr)
        return 130
    if result.reason == "interrupted":
        print(f"Stopped at step {result.step}; everything is saved in {result.folder}. Go on with: {command}")
        return 130
    if result.reason == "already finished":
        print(f"{result.folder} is already finished (step {result.step}); give more --steps or --minutes to go on.")
        if (result.folder / "report.html").exists():
            return 0
    print(f"Report: {build_report(result.folder)}")
    return 0


def _options(words: list[str]) -> TrainOptions:
    recipe = _value_of("--recipe", words) or "fashion"
    base = make_config(recipe)
    # A budget that is given takes the place of the recipe's, instead of running beside it.
    budget = {name: getattr(base, name) for name in ("steps", "minutes")}
    given = {name for name in budget if _value_of(f"--{name}", words) is not None}
    options = parse(TrainOptions, words, prog=_PROG, default=TrainOptions(config=base))
    if given:
        dropped = {name: None for name in budget if name not in given}
        options = replace(options, config=replace(options.config, **dropped))
    return options


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
