"""``spectralnorm recipes``: parse, call, print."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch.overrides import TorchFunctionMode

from spectralnorm.cli.arguments import parse
from spectralnorm.cli.settings import shown_fields
from spectralnorm.gan.config import Config, choose
from spectralnorm.gan.networks import build_discriminator, build_generator
from spectralnorm.gan.recipe_costs import Cost, read_costs
from spectralnorm.gan.recipes import RECIPES, make_config

__all__ = ["run"]

_NOT_MEASURED = "not measured"
_CLASSES = tuple("0123456789")
"""For a recipe whose classes come with the data: as many as in the set that it is named after."""


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes: what each trains, what it costs, where it is from."""

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")]] = None
    """Show all settings of this one."""


def run(words: list[str]) -> int:
    """Print the table, or one recipe."""
    options = parse(RecipesOptions, words, prog="spectralnorm recipes")
    console = Console(highlight=False)
    if options.name is None:
        _print_all(console)
    else:
        choose("recipe", options.name, RECIPES)
        _print_one(console, options.name)
    return 0


def _print_all(console: Console) -> None:
    machines: dict[str, None] = {}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("recipe", "networks", "images", "budget", "G + D, M", "GiB, images/s"):
        table.add_column(heading, no_wrap=True)
    for name in RECIPES:
        config = make_config(name)
        costs = read_costs(name, config)
        machines |= dict.fromkeys(cost.machine for cost in costs[:1])
        cost = _cost(costs[0]) if costs else _NOT_MEASURED
        table.add_row(name, config.architecture, _images(config), _budget(config), _parameters(config), cost)
    console.print(table)
    console.print()
    for name in RECIPES:
        console.print(Text(name, style="bold"))
        console.print(Padding(_source(name), (0, 0, 0, 2)))
    console.print()
    notes = [
        "images: height in pixels. G + D: millions of parameters of the generator and the discriminator. GiB: the most "
        "memory that a process takes. images/s: real images that the discriminator learns from; ?: not measured. By "
        "python benchmarks/recipes.py" + (f" on {'; '.join(machines)}." if machines else "."),
        "spectralnorm recipes NAME shows all settings of one; spectralnorm train --recipe NAME trains with them.",
    ]
    console.print(Group(*(Text(note) for note in notes)))


def _print_one(console: Console, name: str) -> None:
    config = make_config(name)
    console.print(Text(name, style="bold"))
    console.print(Padding("\n\n".join(_paragraphs(name)), (0, 0, 1, 2)))
    facts = Table(box=None, show_header=False, padding=(0, 2), pad_edge=False)
    facts.add_row("parameters", f"{_parameters(config)} M (generator + discriminator)")
    for cost in read_costs(name, config):
        facts.add_row("GiB, images/s", f"{_cost(cost)} ({cost.machine}; {cost.versions}; {cost.date})")
    if not read_costs(name, config):
        facts.add_row("GiB, images/s", _NOT_MEASURED)
    console.print(Padding(facts, (0, 0, 1, 2)))
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("setting", "value", "default, where it is another"):
        table.add_column(heading)
    group = None
    for field in shown_fields():
        if field.name == "recipe":
            continue
        if field.metadata.get("group") != group:
            group = field.metadata["group"]
            table.add_row(Text(str(group), style="bold"), "", "")
        value = getattr(config, field.name)
        differs = value != field.default
        style = "bold" if differs else ""
        table.add_row(f"  {field.name}", Text(_shown(value), style=style), _shown(field.default) if differs else "")
    console.print(table)


def _paragraphs(name: str) -> list[str]:
    text = inspect.cleandoc(RECIPES[name].__doc__ or "").replace("`", "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph]


def _source(name: str) -> str:
    """The first sentence of what the recipe says of itself."""
    first = _paragraphs(name)[0]
    # A point ends a sentence where a capital follows; "et al. 2018" goes on.
    return re.split(r"(?<=\.)\s+(?=[A-Z])", first)[0]


def _images(config: Config) -> str:
    return f"{config.image_size} {'gray' if config.channels == 1 else 'RGB'}"


def _budget(config: Config) -> str:
    parts = []
    if config.steps is not None:
        parts.append(f"{config.steps} steps".replace("000 steps", "k steps"))
    if config.minutes is not None:
        parts.append(f"{config.minutes:g} min")
    return " or ".join(parts)


def _parameters(config: Config) -> str:
    if config.conditional and not config.class_names:
        config = dataclasses.replace(config, class_names=_CLASSES)
    with torch.device("meta"), _NoInitialization():  # counts, and fills no memory
        networks = [build(config, normalized=False) for build in (build_generator, build_discriminator)]
    return "+".join(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2g}" for network in networks)


class _NoInitialization(TorchFunctionMode):
    """Random numbers for tensors without memory would only take time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _cost(cost: Cost) -> str:
    memory = "too much" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**30:.2g}"
    pace = cost.images_per_second
    if pace is None:
        return f"{memory}, ?"
    return f"{memory}, {pace:.0f}" if pace >= 100 else f"{memory}, {pace:.2g}"


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
