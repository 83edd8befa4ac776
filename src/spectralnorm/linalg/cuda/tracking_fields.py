"""What the tables of `spectralnorm.linalg.cuda.tracking` hold, and the sizes of its programs."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ROWS", "SLOW", "SPAN", "WIDE", "BlockField", "Field", "WholeField"]

SLOW = 4
ROWS = 4  # times SLOW: rows of a matrix that a program has where it sums over their fast side
SPAN = 256  # entries of a whole vector in one program
WIDE = 512  # entries of vectors: each thread of four warps has four, and all eight rows of them


class Field(IntEnum):
    """What the table of maps holds for each matrix, as int64. Places are entries from the beginning of the memory."""

    ADDRESS = 0
    M = 1  # size of the side where the frame is
    N = 2  # size of the other side
    M_INNER = 3  # three each, as in `Levels`
    N_INNER = 6
    M_PLACE_INNER = 9  # an index' place in the vector that is returned
    N_PLACE_INNER = 12
    IS_ALIGNED = 15
    FAST_IS_M = 16
    FRAME = 17  # where the frame begins among all
    DIRECTION = 18  # where in the directions its own begins
    IMAGE_PARTS = 19  # place of the parts of Y = F A, their number, and that of the blocks of N
    OTHER_PARTS = 22  # of z: the same, with blocks of M
    IMAGE = 25  # place of Y
    GRAMS = 26  # of the shares in Y Y^T, one for each block of N, and after them of those in F F^T, one for each part
    TURN = 27  # of T, 8 x 8
    TURNED = 28  # of T Y
    KEPT = 29  # of a complete frame that stays as it is; else -1
    LENGTH = 30  # of the shares in the squared length of the first row of T Y, one for each `WIDE` of N
    LEAD = 31  # of the vector along N
    OTHER = 32  # of z
    SQUARES = 33  # of the shares in the square of its length, one for each block of M
    END = 34  # of the vector along M
    SIGMA = 35
    IMAGE_COUNTERS = 36  # among all counters: one for each block of N, and one of the matrix
    OTHER_COUNTERS = 37  # for each block of M, and one of the matrix
    WIDTH = 38  # of the table


class BlockField(IntEnum):
    """What the table of programs holds for each of them, as int64."""

    MAP = 0  # which matrix
    KEPT_START = 1  # of the side that is kept
    START = 2  # of the side that is summed over
    STOP = 3
    PART = 4  # place where the sums go
    BLOCK = 5  # number of the block
    WIDTH = 6


class WholeField(IntEnum):
    """What the table of whole vectors holds for each of them, as int64."""

    SIGMAS = 0  # place of the norms of the weight's blocks
    BLOCKS = 1
    SIZE = 2  # of one block's vector
    SOURCE = 3  # place of the first block's
    TARGET = 4  # where it begins among all whole vectors
    IS_STACKED = 5  # whether the blocks follow each other along this vector
    SIGMA = 6  # where the norm goes, before the whole vectors
    WIDTH = 7
