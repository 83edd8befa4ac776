"""The pictures of the report: which are shown, cut into what parts, at what cost in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectralnorm.records import Picture
from spectralnorm.report.contents import Contents
from spectralnorm.report.images import Grid, InlineImage, UnusablePicture, inline, open_grid
from spectralnorm.report.series import thin

__all__ = ["Frame", "Gallery", "Pair", "Sheet", "collect"]

_MAX_FRAMES = 48
_PANEL_COLUMNS = 8
"""Columns of a sheet that stay together; on a phone the panels of a sheet stand below one another."""
_SHEET_SIZE = (1024, 768)
_FRAME_SIZE = (512, 512)
_WALK_SIZE = (1024, 768)
_SHEET_BYTES, _STRIP_BYTES, _PAIR_BYTES, _WALK_BYTES = 600_000, 1_800_000, 200_000, 400_000


@dataclass(frozen=True)
class Sheet:
    """A grid of images in panels, left to right."""

    panels: Sequence[InlineImage]
    rows: int
    columns: int
    step: int
    caption: str

    @property
    def count(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Frame:
    """The samples of one step."""

    image: InlineImage
    step: int


@dataclass(frozen=True)
class Pair:
    """A generated image and the training image nearest to it."""

    generated: InlineImage
    nearest: InlineImage


@dataclass(frozen=True)
class Gallery:
    """Everything to look at; None or empty where the run has no such picture."""

    samples: Sheet | None
    final: bool
    """Whether ``samples`` are the last, large grid, not the latest of those over training."""
    real: Sheet | None
    frames: Sequence[Frame]
    num_frames: int
    """Sample grids of the run, of which ``frames`` are at most 48."""
    pairs: Sequence[Pair]
    pairs_picture: Picture | None
    walks: Sheet | None


def collect(contents: Contents) -> Gallery:
    """Read and compress the pictures; what cannot be shown is added to ``contents.problems``."""
    pictures = sorted(contents.pictures.get("samples", {}).values(), key=lambda picture: picture.step)
    grids = [(picture, grid) for picture in _chosen(pictures) if (grid := _opened(contents, picture)) is not None]
    images = inline([grid.within(width=_FRAME_SIZE[0], height=_FRAME_SIZE[1]).image for _, grid in grids],
                    budget=_STRIP_BYTES)  # fmt: skip
    frames = [Frame(image, picture.step) for (picture, _), image in zip(grids, images, strict=True)]

    final = contents.picture("final")
    last = pictures[-1] if pictures else None
    # A run that went on after it had ended once still has the final grid of then.
    if final is not None and last is not None and last.step > final.step:
        final = None
    samples = _sheet(contents, final, _SHEET_SIZE, _SHEET_BYTES)
    is_final = samples is not None
    if samples is None:
        samples = _sheet(contents, last, _SHEET_SIZE, _SHEET_BYTES)
    neighbours = contents.picture("neighbours")
    return Gallery(
        samples=samples,
        final=is_final,
        real=_sheet(contents, contents.picture("real"), _SHEET_SIZE, _SHEET_BYTES),
        frames=frames,
        num_frames=len(pictures),
        pairs=_pairs(contents, neighbours),
        pairs_picture=neighbours,
        walks=_sheet(contents, contents.picture("interpolation"), _WALK_SIZE, _WALK_BYTES, in_panels=False),
    )


def _chosen(pictures: Sequence[Picture]) -> list[Picture]:
    return [pictures[index] for index in thin(len(pictures), limit=_MAX_FRAMES)]


def _opened(contents: Contents, picture: Picture | None) -> Grid | None:
    if picture is None:
        return None
    try:
        return open_grid(contents.folder, picture)
    except UnusablePicture as problem:
        if str(problem) not in contents.problems:
            contents.problems.append(str(problem))
        return None


def _sheet(
    contents: Contents, picture: Picture | None, size: tuple[int, int], budget: int, *, in_panels: bool = True
) -> Sheet | None:
    grid = _opened(contents, picture)
    if grid is None or picture is None:
        return None
    grid = grid.within(width=size[0], height=size[1])
    panels = grid.panels(columns=_PANEL_COLUMNS) if in_panels else [grid]
    images = inline([panel.image for panel in panels], budget=budget)
    return Sheet(images, grid.rows, grid.columns, picture.step, picture.caption)


def _pairs(contents: Contents, picture: Picture | None) -> list[Pair]:
    grid = _opened(contents, picture)
    if grid is None or grid.rows < 2:
        return []
    tiles = [
        grid.crop(left=column, top=row, rows=1, columns=1).image for column in range(grid.columns) for row in (0, 1)
    ]
    images = inline(tiles, budget=_PAIR_BYTES)
    return [Pair(*images[start : start + 2]) for start in range(0, len(images), 2)]
