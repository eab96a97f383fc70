"""What kernels on matrices of pairs have in common: square tiles, and sums of what programs found.

Half of such a matrix tells all of it: programs take the tiles on and above the diagonal.
"""

import triton
import triton.language as tl

# Sums that one program adds up at a time.
SUMS = 1024


def tiles_of_pairs(count: int, rows: int) -> int:
    """The number of these tiles, where there are `count` rows and `rows` of them in a tile."""
    along = -(-count // rows)
    return along * (along + 1) // 2


@triton.jit
def tile_of_pairs(ROWS: tl.constexpr):
    """The program's rows and columns; tiles are numbered column by column."""
    number = tl.program_id(0).to(tl.int64)
    column = ((tl.sqrt(8 * number.to(tl.float64) + 1) - 1) / 2).to(tl.int64)
    # The root is rounded.
    column -= (column * (column + 1) // 2 > number).to(tl.int64)
    column += ((column + 1) * (column + 2) // 2 <= number).to(tl.int64)
    row = number - column * (column + 1) // 2
    return row * ROWS + tl.arange(0, ROWS), column * ROWS + tl.arange(0, ROWS)


@triton.jit
def store_twice(to, i, j, n, values):
    """A tile's values at their pairs and at those in the other order."""
    i, j = i[:, None], j[None, :]
    mask = (i <= j) & (j < n)
    tl.store(to + i * n + j, values, mask=mask)
    tl.store(to + j * n + i, values, mask=mask)


@triton.jit
def added(sums, parts, SUMS: tl.constexpr):
    """The sum of all parts, in the same order in every program."""
    total = tl.zeros([SUMS], tl.float64)
    for first in range(0, parts, SUMS):
        part = first + tl.arange(0, SUMS)
        total += tl.load(sums + part, mask=part < parts, other=0)
    return tl.sum(total)
