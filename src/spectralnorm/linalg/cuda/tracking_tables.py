"""Where matrices lie and what programs do with them, in the form that the kernels of tracking read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from spectralnorm.linalg.cuda.tiles import FAST
from spectralnorm.linalg.cuda.tracking_fields import ROWS, SLOW, WIDE, Field
from spectralnorm.linalg.layout import Layout
from spectralnorm.linalg.tracking import NUM_TRACKED

__all__ = ["TRITON_DTYPES", "Identity", "Spans", "Tables", "identity_of", "is_complete", "tables_of"]

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Entries of a matrix that one program reads: over the slow side its sums are the whole width of a row.
_ENTRIES_OVER_FAST, _ENTRIES_OVER_SLOW = 16384, 32768

# Pieces of the memory begin at multiples of as many floats.
_ALIGNMENT = 32

Identity = tuple[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], ...]
"""Of each matrix its address, type, shape and strides."""


def identity_of(matrices: Sequence[Tensor]) -> Identity:
    """What must be the same for tables to be right."""
    return tuple((matrix.data_ptr(), matrix.dtype, matrix.shape, matrix.stride()) for matrix in matrices)


def is_complete(size: int) -> bool:
    """Whether a frame on a side of that size spans all of it, and stays as it is (`complete_frame`)."""
    return size <= NUM_TRACKED


# For each type: the programs of a launch, and their number.
_Launches = list[tuple[Any, Tensor, int]]


class Spans(NamedTuple):
    """Which matrix, and from where: (programs, 2)."""

    along_n: Tensor
    along_m: Tensor


class Tables(NamedTuple):
    """What the kernels read for frames on given sides.

    The side of the frame counts M, the other N; a vector along N is a leading one, along M an end.
    """

    maps: Tensor  # (matrices, Field.WIDTH)
    counters: Tensor  # int32, at zero between launches
    image_blocks: _Launches  # (programs, BlockField.WIDTH)
    other_blocks: _Launches
    spans: Spans | None  # of sets so large that a program of each matrix would be waited for
    size: int  # entries of the memory
    first_vector: int  # place of the leading vectors, which the ends follow
    first_sigma: int
    vector_sizes: list[int]  # entries of each tensor's leading vectors, then of each one's ends
    next_sizes: list[int]  # an eighth of the entries of each tensor's next frames
    next_sides: tuple[bool, ...]

    def sigmas_in(self, memory: Tensor) -> Tensor:
        """The norms of all matrices."""
        return memory[self.first_sigma : self.first_sigma + self.maps.shape[0]]


class _Places:
    """Pieces of a memory, one after the other."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        """Where the next piece begins."""
        self.size += size
        return self.size - size

    def align(self) -> None:
        """Let the next piece begin at a multiple of `_ALIGNMENT`."""
        self.size += -self.size % _ALIGNMENT


def tables_of(
    identity: Identity, layouts: Sequence[Layout], sides: Sequence[bool], is_split: bool, device: torch.device
) -> Tables:
    """Those for frames on given sides.

    Args:
        identity: of the tensors.
        layouts: of each.
        sides: for each tensor whether its frame is on the left.
        is_split: whether what follows from a product is done in launches of its own.
        device: where the tables go.
    """
    both = list(zip(identity, layouts, strict=True))
    maps: list[list[int]] = []
    of_tensors: list[list[list[int]]] = []
    frames, direction = _Places(), 0
    for (address, dtype, *_), layout, is_left in zip(identity, layouts, sides, strict=True):
        rows, columns = layout.rows, layout.columns
        of_rows = rows, layout.row_levels, (rows, 0, 1)
        of_columns = columns, layout.column_levels, layout.column_places
        (m, m_levels, m_places), (n, n_levels, n_places) = (of_rows, of_columns) if is_left else (of_columns, of_rows)
        entries = []
        for index in range(layout.batch):
            entry = [0] * Field.WIDTH
            entry[Field.ADDRESS] = address + index * layout.batch_stride * dtype.itemsize
            entry[Field.M], entry[Field.N] = m, n
            for field, levels in (
                (Field.M_INNER, m_levels),
                (Field.N_INNER, n_levels),
                (Field.M_PLACE_INNER, m_places),
                (Field.N_PLACE_INNER, n_places),
            ):
                entry[field : field + 3] = levels
            entry[Field.IS_ALIGNED] = int(layout.is_aligned)
            entry[Field.FAST_IS_M] = int(layout.fast_is_columns != is_left)
            entry[Field.FRAME] = frames.take(NUM_TRACKED * m)
            entry[Field.DIRECTION] = direction if is_left else direction + rows
            entries.append(entry)
        maps += entries
        of_tensors.append(entries)
        direction += rows + columns
    memory, counters = _Places(), _Places()
    # Next frames lie one after the other at the beginning, so that they can be read where they are; what is turned for
    # its first row alone comes after them.
    for entry in maps:
        stays = is_complete(entry[Field.M])
        place = memory.take(NUM_TRACKED * entry[Field.M if stays else Field.N])
        entry[Field.TURNED], entry[Field.KEPT] = (-1, place) if stays else (place, -1)
    for entry in maps:
        if entry[Field.KEPT] >= 0:
            entry[Field.TURNED] = memory.take(NUM_TRACKED * entry[Field.N])
    for place, size in (Field.LEAD, Field.N), (Field.END, Field.M):
        for entry in maps:
            entry[place] = memory.take(entry[size])
    memory.align()
    for entry in maps:
        entry[Field.SIGMA] = memory.take(1)
    image_blocks, other_blocks = [], []
    for index, entry in enumerate(maps):
        m, n, fast_is_m = entry[Field.M], entry[Field.N], bool(entry[Field.FAST_IS_M])
        memory.align()
        images, entry[Field.IMAGE_PARTS : Field.IMAGE_PARTS + 3] = _blocks(
            index, n, m, fast_is_m, memory, NUM_TRACKED * n
        )
        others, entry[Field.OTHER_PARTS : Field.OTHER_PARTS + 3] = _blocks(index, m, n, not fast_is_m, memory, m)
        _, num_image_parts, num_image_blocks = entry[Field.IMAGE_PARTS : Field.IMAGE_PARTS + 3]
        num_other_blocks = entry[Field.OTHER_PARTS + 2]
        for field, size in (
            (Field.IMAGE, NUM_TRACKED * n),
            (Field.GRAMS, NUM_TRACKED**2 * (num_image_blocks + num_image_parts)),
            (Field.TURN, NUM_TRACKED**2),
            (Field.LENGTH, math.ceil(n / WIDE)),
            (Field.OTHER, m),
            (Field.SQUARES, num_other_blocks),
        ):
            entry[field] = memory.take(size)
        entry[Field.IMAGE_COUNTERS] = counters.take(num_image_blocks + 1)
        entry[Field.OTHER_COUNTERS] = counters.take(num_other_blocks + 1)
        image_blocks.append(images)
        other_blocks.append(others)
    dtypes = [dtype for (_, dtype, *_), layout in both for _ in range(layout.batch)]
    # What follows from a product is done by one program, and takes longest where the side is long that is kept. Such
    # matrices come first: others are still being read when that is done.
    images = sorted(range(len(maps)), key=lambda index: -maps[index][Field.N])
    others = sorted(range(len(maps)), key=lambda index: -maps[index][Field.M])
    stay = [is_complete(entries[0][Field.M]) for entries in of_tensors]
    return Tables(
        maps=torch.tensor(maps, device=device),
        counters=torch.zeros(counters.size, dtype=torch.int32, device=device),
        image_blocks=_launches(images, dtypes, image_blocks, device),
        other_blocks=_launches(others, dtypes, other_blocks, device),
        spans=Spans(_spans(maps, Field.N, device), _spans(maps, Field.M, device)) if is_split else None,
        size=memory.size,
        first_vector=maps[0][Field.LEAD],
        first_sigma=maps[0][Field.SIGMA],
        vector_sizes=[len(entries) * entries[0][field] for field in (Field.N, Field.M) for entries in of_tensors],
        next_sizes=[
            len(entries) * entries[0][Field.M if stays else Field.N]
            for entries, stays in zip(of_tensors, stay, strict=True)
        ],
        next_sides=tuple(is_left if stays else not is_left for is_left, stays in zip(sides, stay, strict=True)),
    )


def _spans(maps: Sequence[Sequence[int]], side: Field, device: torch.device) -> Tensor:
    spans = [[which, start] for which, entry in enumerate(maps) for start in range(0, entry[side], WIDE)]
    return torch.tensor(spans, device=device)


def _blocks(
    which: int, kept: int, summed: int, sums_fast: bool, memory: _Places, part_size: int
) -> tuple[list[list[int]], list[int]]:
    """Programs of a product: blocks of the side that is kept, times parts of the one that is summed over.

    A part's blocks follow each other, so that programs that run at the same time read the same piece of the frame.

    Returns:
        Their rows of the table; the place of the parts, their number and that of the blocks.
    """
    width = ROWS * SLOW if sums_fast else FAST
    length = (_ENTRIES_OVER_FAST if sums_fast else _ENTRIES_OVER_SLOW) // width
    kept_starts, starts = range(0, kept, width), range(0, summed, length)
    first = memory.take(len(starts) * part_size)
    rows = [
        [which, kept_start, start, min(start + length, summed), first + part * part_size, block]
        for part, start in enumerate(starts)
        for block, kept_start in enumerate(kept_starts)
    ]
    return rows, [first, len(starts), len(kept_starts)]


def _launches(
    order: Sequence[int], dtypes: Sequence[torch.dtype], blocks: Sequence[list[list[int]]], device: torch.device
) -> _Launches:
    """One for each type of the matrices in ``order``."""
    of_types: dict[torch.dtype, list[list[int]]] = {}
    for index in order:
        of_types.setdefault(dtypes[index], []).extend(blocks[index])
    return [(TRITON_DTYPES[dtype], torch.tensor(rows, device=device), len(rows)) for dtype, rows in of_types.items()]
