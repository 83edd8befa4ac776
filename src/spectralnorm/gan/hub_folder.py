"""A folder that can be uploaded to a model hub as it is; nothing is uploaded here."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from spectralnorm.errors import UserError
from spectralnorm.gan.config import config_to_json
from spectralnorm.gan.inputs import prepare_data
from spectralnorm.gan.model_card import model_card
from spectralnorm.gan.pictures import image_grid, save_png
from spectralnorm.gan.run_pictures import NUM_POINTS, save_points
from spectralnorm.gan.sampling import GENERATOR_FILE, TrainedGenerator, save_generator
from spectralnorm.records import replace_text

__all__ = ["write_hub_folder"]

_PICTURE = "samples.png"


def write_hub_folder(
    run: Path, generator: TrainedGenerator, folder: Path, *, license: str | None = None, num_samples: int = 64
) -> None:
    """Write the weights, ``config.json``, a picture of samples, and ``README.md``: the model card with its metadata.

    Args:
        run: the run folder, whose records the card tells.
        generator: as `spectralnorm.gan.load` reads it from there.
        folder: new or empty.
        license: of the weights, as the hub names it; None: left for the user to fill in.
        num_samples: images of the grid, those of the run's own seed; points are drawn on top of real ones instead.

    Raises:
        UserError: the folder holds something, or the run's records are missing.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; choose another --out.")
    card = model_card(run, license=license, picture=_PICTURE)
    # Whole or not at all: a folder with a part of it would look ready.
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_generator(temporary / GENERATOR_FILE, generator)
        replace_text(temporary / "config.json", config_to_json(generator.config))
        _draw(generator, temporary, num_samples)
        replace_text(temporary / "README.md", card)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw(generator: TrainedGenerator, folder: Path, num_samples: int) -> None:
    if generator.makes_points:
        real, _ = prepare_data(generator.config).examples(NUM_POINTS)
        save_points(folder, generator, real, file=_PICTURE, step=generator.step, role="final")
        return
    samples = generator.sample(num_samples, seed=generator.config.seed)
    save_png(folder / _PICTURE, image_grid(samples, columns=math.ceil(math.sqrt(num_samples))))
