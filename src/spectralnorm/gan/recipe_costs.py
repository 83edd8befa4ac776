"""What the recipes cost, as it was measured: a table beside this file, which ``benchmarks/recipes.py`` writes.

A measurement holds the settings that it was made with. It counts for a recipe only as long as those are the recipe's:
what has changed since is not measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralnorm.gan.config import Config
from spectralnorm.records import replace_text

__all__ = ["COSTS_FILE", "Cost", "read_costs", "telling_settings", "write_costs"]

COSTS_FILE = Path(__file__).with_name("recipe_costs.json")

# Neither the pace nor the memory depends on these.
_IRRELEVANT = {"recipe", "data", "seed", "lr_decay_from"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one recipe cost on one machine."""

    machine: str
    """Processor or GPU, number of cores and threads."""
    versions: str
    """Of Python and torch."""
    date: str
    """ISO 8601."""
    settings: Mapping[str, Any]
    """`telling_settings` of the recipe at that time."""
    peak_memory_bytes: int | None
    """Of the process, data and all, or of the GPU; None: more than the machine has."""
    images_per_second: float | None
    """Real images that the discriminator sees; None: not measured, as on a machine that was busy."""


def telling_settings(config: Config) -> dict[str, Any]:
    """The settings of a config that are not the defaults, without those that the cost does not depend on."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default
        and field.name not in _IRRELEVANT
        and not field.metadata["resumable"]
    }


def read_costs(recipe: str, config: Config, *, file: Path = COSTS_FILE) -> list[Cost]:
    """The measurements of a recipe that hold for its present settings, those with a pace first; none: an empty list."""
    if not file.exists():
        return []
    table = json.loads(file.read_text(encoding="utf-8"))
    # Through JSON, so that a tuple compares with what became of it there.
    settings = json.loads(json.dumps(telling_settings(config)))
    costs = [cost for cost in (Cost(**entry) for entry in table.get(recipe, [])) if cost.settings == settings]
    return sorted(costs, key=lambda cost: cost.images_per_second is None)


def write_costs(recipe: str, cost: Cost, *, file: Path = COSTS_FILE) -> None:
    """Put a measurement into the table, in the place of one on the same machine."""
    table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    others = [entry for entry in table.get(recipe, []) if entry["machine"] != cost.machine]
    table[recipe] = [*others, dataclasses.asdict(cost)]
    replace_text(file, json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
