"""How a kernel walks over logits as rows of classes, whatever their dimensions and strides.

Rows are numbered in C order, the classes' dimension left out. A program takes a tile of rows and
classes: whole rows where these are short, or one block of classes after another.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.tiles import TILE, power_of_2

# The most classes of a row that is held in registers in float32, 16 of each side a thread: 115
# registers let 2 programs share a multiprocessor, and twice as many classes no more than one.
# Blocks of longer rows have half as many, because running sums take registers, too.
WHOLE = TILE

# Tiles of several rows are smaller: a thread needs registers for the numbers of each row it has a
# part of. Of rows that lie side by side, as many are accessed together as a warp has threads.
SEVERAL = TILE // 4
SIDE_BY_SIDE = 32


class Plan(NamedTuple):
    """Rows in C order, the classes' dimension left out, and the tile that a program takes.

    Neighbouring dimensions that lie alike in all tensors are merged. Strides are one tuple a
    tensor, innermost first; the outermost size is left out, as the number of rows has it.
    """

    programs: int
    rows: int
    units: int
    sizes: tuple[int, ...]
    row_strides: tuple[tuple[int, ...], ...]
    class_strides: tuple[int, ...]
    upstream_strides: tuple[int, ...]
    tile: dict[str, int]


@functools.lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    upstream: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
) -> Plan:
    """For logits of a shape, and a grad_output of that shape without the classes."""
    every = *strides, (*upstream[:dim], 0, *upstream[dim:])
    axes = list(zip(shape, zip(*every, strict=True), strict=True))
    classes, class_strides = axes.pop(dim)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in reversed(axes):
        if size == 1:
            continue
        if merged and steps == tuple([merged[-1][0] * step for step in merged[-1][1]]):
            merged[-1] = size * merged[-1][0], merged[-1][1]
        else:
            merged.append((size, steps))
    sizes, steps = zip(*(merged or [(1, (0,) * len(every))]), strict=True)
    *row_strides, upstream = zip(*steps, strict=True)
    class_strides = class_strides[:-1]
    sides = zip(row_strides, class_strides, strict=True)
    side_by_side = any([of_rows[0] == 1 and of_classes > 1 for of_rows, of_classes in sides])
    # What Triton itself finds out is whether a number is a multiple of 16.
    is_dense = set(class_strides) == {1}
    unit = math.gcd(16, classes, *itertools.chain(*row_strides)) if is_dense else 1
    tile = _tile(classes, side_by_side, dtype)
    rows, stretch = math.prod(sizes), sizes[0] if side_by_side else math.prod(sizes)
    return Plan(
        -(-stretch // tile["ROWS"]) * (rows // max(stretch, 1)),
        rows,
        classes // unit,
        sizes[:-1],
        tuple([tuple([stride // unit for stride in of_rows]) for of_rows in row_strides]),
        class_strides,
        upstream,
        {"UNIT": unit, "SIDE_BY_SIDE": side_by_side, **tile},
    )


def upstream_of(grad_output: Tensor | None, student: Tensor) -> tuple[int, ...]:
    """The strides of one number a row, or of one for all."""
    if grad_output is None or grad_output.ndim == 0:
        return (0,) * (student.ndim - 1)
    return grad_output.stride()


def _tile(classes: int, side_by_side: bool, dtype: torch.dtype) -> dict[str, int]:
    """What a program holds: some rows, one row, or a block of one row or of some.

    The number of rows has no say: no kernel is compiled anew for that.
    """
    # Numbers of 8 bytes take two registers each.
    most = WHOLE * 4 // dtype.itemsize
    if side_by_side:
        columns = min(power_of_2(classes), SIDE_BY_SIDE)
    else:
        columns = power_of_2(classes) if classes <= most else most // 2
    rows = max(SEVERAL // columns, 1)
    # A thread has 4 classes if rows are several, else 8, and 16 of the longest row.
    warps = 8 if rows > 1 else min(columns // 256, 8)
    return {"ROWS": rows, "CLASSES": columns, "num_warps": warps}


@triton.jit
def tile_of_rows(rows, sizes, ROWS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr):
    """A program's rows: indices in the innermost dimension and beyond it, numbers, which exist.

    Where rows lie side by side a tile keeps to one stretch of them, which the compiler then knows
    to be one.
    """
    index = tl.arange(0, ROWS)[:, None]
    program = tl.program_id(0).to(rows.dtype)
    if len(sizes) == 0:
        row = program * ROWS + index
        return row, row, row, row < rows
    elif SIDE_BY_SIDE:
        tiles = tl.cdiv(sizes[0], ROWS)
        inner = program % tiles * ROWS + index
        outer = program // tiles
        return inner, outer, outer * sizes[0] + inner, inner < sizes[0]
    else:
        row = program * ROWS + index
        return row % sizes[0], row // sizes[0], row, row < rows


@triton.jit
def locate(inner, outer, sizes, strides, UNIT: tl.constexpr):
    """Where rows start in a tensor; strides are in units, so that the compiler knows of these.

    The outermost dimension has a stride and needs no size.
    """
    at = tl.cast(inner, tl.int64) * strides[0]
    for d in tl.static_range(1, len(sizes)):
        at += tl.cast(outer % sizes[d], tl.int64) * strides[d]
        outer = outer // sizes[d]
    if len(sizes) > 0:
        at += tl.cast(outer, tl.int64) * strides[len(sizes)]
    return at * UNIT


@triton.jit
def look_up(labels, row, is_row, ignore_index, classes, all_classes=None):
    """The rows' labels, which of the rows count, and which labels are classes.

    With `all_classes` these are a shard of them, and every label that counts is a class of a shard.
    """
    if labels is None:
        return row, is_row, is_row
    else:
        label = tl.load(labels + row, mask=is_row, other=ignore_index)
        counts = is_row & (label != ignore_index)
        if all_classes is None:
            return label, counts, (label >= 0) & (label < classes)
        else:
            return label, counts, counts


@triton.jit
def load(at, column, stride, mask, COMPUTE: tl.constexpr):
    """Logits, excluded where there are none."""
    logits = tl.load(at + column.to(tl.int64) * stride, mask=mask, other=float("-inf"))
    return logits.to(COMPUTE)


@triton.jit
def store(at, column, stride, mask, gradient):
    """What `load` loads from, written."""
    tl.store(at + column.to(tl.int64) * stride, gradient.to(at.dtype.element_ty), mask=mask)
