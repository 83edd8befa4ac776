"""The images that come with the package: Fashion-MNIST, 10,000 to train on and 10,000 held out.

Built by ``tools/build_fashion_mnist.py``, which says what the files are.
"""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
from PIL import Image

from spectralnorm.gan.data.arrays import ArraySource

__all__ = ["LICENCE", "NAME", "SOURCE", "open_builtin"]

NAME = "fashion-mnist"
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
"""In the summary it tells these images from all others: no path is written so."""
LICENCE = "MIT, Copyright 2017 Zalando SE"

_TILE = 28
_COLUMNS = 100


def open_builtin() -> ArraySource:
    """The built-in images, 28 x 28 gray, zero-padded to 32."""
    folder = resources.files("spectralnorm") / "assets" / "fashion_mnist"
    description = json.loads((folder / "atlas.json").read_text(encoding="utf-8"))
    parts = []
    for name in ("training", "held_out"):
        with (folder / f"{name}.png").open("rb") as stream, Image.open(stream, formats=("PNG",)) as atlas:
            images = _tiles(np.asarray(atlas))
        counts = description[name]["images_per_class"]
        parts.append((images, np.repeat(np.arange(len(counts)), counts)))
    (images, labels), test = parts
    source = ArraySource(images, labels, test=test, what="the built-in images", pad_28=True)
    source.class_names = tuple(description["class_names"])
    return source


def _tiles(atlas: np.ndarray) -> np.ndarray:
    """Cut an atlas into images, row by row: uint8 (N, 28, 28)."""
    rows = atlas.shape[0] // _TILE
    tiles = atlas.reshape(rows, _TILE, _COLUMNS, _TILE).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows * _COLUMNS, _TILE, _TILE)
