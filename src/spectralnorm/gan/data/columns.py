"""Which columns of a table hold the images and their classes."""

from __future__ import annotations

from collections.abc import Sequence

from spectralnorm.errors import UserError

__all__ = ["LABEL_COLUMNS", "choose_images", "choose_labels"]

_IMAGE_COLUMNS = "image img images picture photo pixels pixel_values jpg jpeg png webp x".split()
LABEL_COLUMNS = "label labels class fine_label class_label category target cls y".split()


def choose_images(candidates: Sequence[str], all_columns: Sequence[str], *, what: str) -> str:
    """The column with the customary name, or the only one that can hold images.

    Raises:
        UserError: there is none, or more than one and none has a customary name.
    """
    customary = _customary(candidates, _IMAGE_COLUMNS)
    if customary is not None:
        return customary
    if len(candidates) == 1:
        return candidates[0]
    raise UserError(
        f"{what} has the columns {', '.join(all_columns) or 'of no name'}; expected the images in one called 'image', "
        "as encoded bytes or as arrays of uint8."
    )


def choose_labels(candidates: Sequence[str], named: Sequence[str]) -> str | None:
    """The column of the classes, or None.

    Args:
        candidates: columns that hold whole numbers or text.
        named: those of them that come with names of classes; one of these needs no customary name.
    """
    customary = _customary(named, LABEL_COLUMNS) or _customary(candidates, LABEL_COLUMNS)
    return customary if customary is not None or len(named) != 1 else named[0]


def _customary(columns: Sequence[str], names: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
