"""How a kernel walks over tensors of one shape, each with strides of its own.

Dimensions go innermost first, by the first tensor's strides, and those that lie alike in all
tensors are merged: dense tensors of one layout are a single run. A tile has up to three of them,
(depth, rows, columns), the innermost last. Rows run along the dimension in which another tensor
is dense, where that is another one: so each tensor is accessed along its own dense dimension.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements and warps of a program. A thread loads 16 elements of each of two tensors before it waits
# for any: in float32 that is eight accesses of 16 bytes, in half precision four. The 56 registers
# that this takes in float32 let 4 programs share a multiprocessor: 128 kB under way, where a
# bandwidth of 4 TB/s needs some 30 kB.
TILE = 4096
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

# Left alone, ptxas may spill a register or two to fit one more program on a multiprocessor; told of
# a bound, even the most there are, it does not. The compilers of other makers take no such option.
_IS_NVIDIA = torch.version.hip is None and torch.version.xpu is None

# Longest stretch of columns where there are other dimensions: shorter ones waste less at the end.
# A tile that another tensor crosses is as long as it is wide.
_COLUMNS = 512
_CROSSED_COLUMNS = 64

# Tiles of a program that may find nothing to do: more, and such a launch ends sooner; fewer, and
# those that work end together.
_SEVERAL = 4

# Triton's name of what the losses compute in.
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


class _Dim(NamedTuple):
    size: int
    strides: tuple[int, ...]  # one a tensor


class Plan(NamedTuple):
    """Sizes and each tensor's strides, innermost first, and the tiles that cover them.

    Tiles are numbered so that `parts` of them, one after another, share their place in depth.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    tiles: int
    parts: int
    counts: tuple[int, ...]  # of tiles along columns and rows
    shape: dict[str, int]

    @property
    def few(self) -> int:
        """Programs to launch where each takes several tiles."""
        return -(-self.tiles // _SEVERAL)


@functools.lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], by_sample: bool) -> Plan:
    dims = [_Dim(*dim) for dim in zip(sizes, zip(*strides, strict=True), strict=True)]
    batch, dims = ([dims[0]], dims[1:]) if by_sample else ([], dims)
    dims, is_crossed = _across(_merged(dims))
    unit = _Dim(1, (0,) * len(strides))
    if by_sample:
        dims = [*(dims + [unit] * 2)[:2], *batch, *dims[2:]]
    elif len(dims) > 3:
        longest = max(dims[2:], key=lambda dim: dim.size)
        dims = [*dims[:2], longest, *[dim for dim in dims[2:] if dim is not longest]]
    dims = dims or [unit]
    columns, rows, depth = _shape([dim.size for dim in dims], is_crossed)
    blocks = (columns, rows, depth, *[1] * len(dims))
    counts = [-(-dim.size // block) for dim, block in zip(dims, blocks, strict=False)]
    return Plan(
        tuple([dim.size for dim in dims]),
        tuple(zip(*[dim.strides for dim in dims], strict=True)),
        math.prod(counts),
        math.prod(counts[:2] + counts[3:]),
        tuple(counts[:2]),
        {"DEPTH": depth, "ROWS": rows, "COLUMNS": columns},
    )


def plan(tensors: Sequence[Tensor], by_sample: bool = False) -> Plan:
    """The plan for tensors of one shape; `by_sample` keeps the first dimension, as the depth."""
    return _plan(tensors[0].shape, tuple([t.stride() for t in tensors]), by_sample)


def _merged(dims: list[_Dim]) -> list[_Dim]:
    # A tensor that is expanded along a dimension has no say in where that belongs.
    dims = sorted(dims, key=lambda dim: next(filter(None, dim.strides), 0))
    merged: list[_Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        if merged and dim.strides == tuple([merged[-1].size * s for s in merged[-1].strides]):
            merged[-1] = _Dim(merged[-1].size * dim.size, merged[-1].strides)
        else:
            merged.append(dim)
    return merged


def _across(dims: list[_Dim]) -> tuple[list[_Dim], bool]:
    """The dimensions with the second tensor's densest one first or second, and whether second."""
    if len(dims) < 2 or len(dims[0].strides) < 2:
        return dims, False
    densest = min(dims, key=lambda dim: dim.strides[1] or math.inf)
    if densest is dims[0]:
        return dims, False
    return [dims[0], densest, *[dim for dim in dims[1:] if dim is not densest]], True


def _shape(sizes: list[int], is_crossed: bool) -> tuple[int, int, int]:
    """Columns, rows and depth of a tile.

    The last of them takes what is left whatever its size, which may be the batch's: no kernel is
    compiled anew for that.
    """
    if len(sizes) == 1:
        return TILE, 1, 1
    most = _CROSSED_COLUMNS if is_crossed else _COLUMNS
    columns = min(power_of_2(sizes[0]), most)
    left = TILE // columns
    if len(sizes) == 2:
        return columns, left, 1
    rows = min(power_of_2(sizes[1]), left)
    return columns, rows, left // rows


def power_of_2(size: int) -> int:
    """The least one that is no smaller than the size."""
    return 1 << max(size - 1, 0).bit_length()


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel where the tensor `on` is: Triton itself launches on the current device."""
    if programs == 0:
        return
    options = {**_OPTIONS, **constants}
    if _IS_NVIDIA:
        options["maxnreg"] = min(255, 2048 // options["num_warps"])
    index = on.device.index
    elsewhere = index is not None and index != torch.accelerator.current_device_index()
    with torch.accelerator.device_index(index) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


@triton.jit
def locate(
    tile,
    parts,
    counts,
    sizes,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Where the elements of a tile are, and which of them exist.

    The place is indices in columns, rows and depth, and the number of the slice: a slice is one
    step in each of the dimensions from the fourth on.
    """
    column = tile
    row = 0
    depth = 0
    number = 0
    if len(sizes) > 2:
        depth = tile // parts
        column = tile % parts
    if len(sizes) > 1:
        row = column // counts[0]
        column = column % counts[0]
    if len(sizes) > 3:
        number = row // counts[1]
        row = row % counts[1]
    columns = tl.cast(column, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    rows = tl.cast(row, tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    depths = tl.cast(depth, tl.int64) * DEPTH + tl.arange(0, DEPTH)[:, None, None]
    mask = columns < sizes[0]
    if len(sizes) > 1:
        mask &= rows < sizes[1]
    if len(sizes) > 2:
        mask &= depths < sizes[2]
    return (columns, rows, depths, number), mask


@triton.jit
def offsets(place, sizes, strides):
    """Where a tile's elements lie in a tensor."""
    at = place[0] * strides[0]
    if len(sizes) > 1:
        at += place[1] * strides[1]
    if len(sizes) > 2:
        at += place[2] * strides[2]
    number = place[3]
    for d in tl.static_range(3, len(sizes)):
        at += tl.cast(number % sizes[d], tl.int64) * strides[d]
        number = number // sizes[d]
    return at
