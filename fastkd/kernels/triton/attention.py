"""Attention maps, the distance between them, and the features' gradient from its slopes.

A map's tile has positions and channels, and is longer along those that lie side by side: each
feature is read once. Then one program compares the two maps of a sample, or of a few.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton import rows
from fastkd.kernels.triton.distance import distance
from fastkd.kernels.triton.hint import add_up
from fastkd.kernels.triton.power import MOST, derivative, known, power
from fastkd.kernels.triton.tiles import COMPUTE, TILE, launch, locate, offsets, plan, power_of_2
from fastkd.parameters import Map, Transfer

# The most channels of a tile. Where positions lie side by side, that leaves it 32 of them, as many
# as a warp has threads; where channels do, 16.
_CHANNELS_APART = TILE // 32
_CHANNELS = TILE // 16

# Positions of a sample that are compared at once, and of several samples where they have fewer.
_BLOCK = TILE
_SEVERAL = TILE // 4

# Samples' losses that are added up at once.
_LOSSES = 1024


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["to", "argmax"])
def channel_map(
    features,
    to,  # the map, or of max_pow the features at the argmax if there is one and it is not RAISED
    argmax,  # or None
    p: tl.float64,
    count,  # of positions of all samples
    units,  # of channels
    sizes,
    strides,  # of positions, in units
    channel_stride,
    COMPUTE: tl.constexpr,
    P: tl.constexpr,
    RAISED: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Unnormalised map at a tile of positions."""
    channels = units * UNIT
    inner, outer, position, exists = rows.tile_of_rows(count, sizes, ROWS, SIDE_BY_SIDE)
    channel = tl.arange(0, CHANNELS)[None, :]
    at = features + rows.locate(inner, outer, sizes, strides, UNIT)
    found = tl.full([ROWS, CHANNELS], 0 if argmax is None else -1, COMPUTE)
    which = tl.zeros([ROWS, CHANNELS], tl.int32)
    for first in range(0, channels, CHANNELS):
        k = first + channel
        mask = exists & (k < channels)
        x = tl.load(at + k.to(tl.int64) * channel_stride, mask=mask, other=0).to(COMPUTE)
        if argmax is None:
            found += power(x, p, P)
        else:
            # NaN wins, as it does in torch, and then stays. What is past the last channel is 0 and
            # comes after all others, which beat it or tie with it.
            a = tl.abs(x)
            wins = (a > found) | ((a != a) & (found == found))
            found = tl.where(wins, a, found)
            which = tl.where(wins, k, which)
    if argmax is None:
        total = tl.sum(found, 1, keep_dims=True)
    else:
        is_nan = found != found
        has_nan = tl.max(is_nan.to(tl.int32), 1, keep_dims=True) != 0
        largest = tl.max(tl.where(is_nan, -1, found), 1, keep_dims=True)
        attains = tl.where(has_nan, is_nan, found == largest)
        first = tl.min(tl.where(attains, which, channels), 1, keep_dims=True)
        tl.store(argmax + position, first, mask=exists)
        at += first.to(tl.int64) * channel_stride
        total = tl.load(at, mask=exists, other=0).to(COMPUTE)
        if RAISED:
            total = power(total, p, P)
    tl.store(to + position, total, mask=exists)


@triton.jit
def at_position(place, sizes, strides, CHANNELS: tl.constexpr):
    """Where a tile's slopes lie, as few as there are, which exist, and the tile's channels.

    Slopes are the same along the dimension of channels.
    """
    at = tl.zeros([1, 1, 1], tl.int64)
    exists = tl.full([1, 1, 1], True, tl.int1)
    channel = at
    number = place[3]
    for d in tl.static_range(len(sizes)):
        if d < 3:
            if d == CHANNELS:
                channel = place[d]
            else:
                at += place[d] * strides[d]
                exists &= place[d] < sizes[d]
        else:
            if d == CHANNELS:
                channel += number % sizes[d]
            else:
                at += tl.cast(number % sizes[d], tl.int64) * strides[d]
            number = number // sizes[d]
    return at, exists, channel


@triton.jit(
    do_not_specialize=["grad_output_stride", "tiles", "parts"],
    do_not_specialize_on_alignment=["grad_output", "slopes", "argmax"],
)
def channel_gradient(
    grad_output,  # one number, or one a sample
    grad_output_stride,
    features,
    slopes,
    argmax,  # or None
    gradient,
    p: tl.float64,
    tiles,
    parts,
    counts,
    sizes,
    feature_strides,
    gradient_strides,
    slope_strides,
    COMPUTE: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,  # which dimension they are
    BY_SAMPLE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of one tile after another: at an argmax its slope, else times d|x|^p/dx."""
    upstream = tl.full((), 1, COMPUTE)
    if not BY_SAMPLE:
        upstream = tl.load(grad_output).to(COMPUTE)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        place, mask = locate(tile, parts, counts, sizes, DEPTH, ROWS, COLUMNS)
        at, exists, channel = at_position(place, sizes, slope_strides, CHANNELS)
        slope = tl.load(slopes + at, mask=exists, other=0) * upstream
        if BY_SAMPLE:
            of_sample = grad_output + place[2] * grad_output_stride
            slope *= tl.load(of_sample, mask=place[2] < sizes[2], other=0).to(COMPUTE)
        if argmax is None:
            x = tl.load(features + offsets(place, sizes, feature_strides), mask=mask, other=0)
            g = slope * derivative(x.to(COMPUTE), p, P)
        else:
            largest = tl.load(argmax + at, mask=exists, other=0)
            g = tl.where(channel == largest, slope, 0)
        to = gradient + offsets(place, sizes, gradient_strides)
        tl.store(to, g.to(gradient.dtype.element_ty), mask=mask)


def attention_map_forward(features: Tensor, raw: Tensor, argmax: Tensor, p: Map) -> None:
    """Fill the unnormalised map, and the argmax of max_pow."""
    _map(features, raw, argmax if p.kind == "max_pow" else None, True, p)


def attention_transfer_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    gradients: Sequence[Tensor],  # none: backward computes them
    transfer: Transfer,
    p: Map,
) -> None:
    """Fill the loss, slopes and argmax."""
    pairs, batch = len(students), len(students[0])
    by_sample = transfer.reduction == "none"
    parts = 1 if by_sample else pairs * batch
    losses = loss if parts == 1 else loss.new_empty(parts, dtype=torch.float64)
    for j, some in enumerate(losses.view(pairs, batch)):
        both = students[j], teachers[j]
        to_teacher = slopes[pairs + j] if len(slopes) > pairs else None
        maps = slopes[j], torch.empty_like(slopes[j]) if to_teacher is None else to_teacher
        for side, (features, raw) in enumerate(zip(both, maps, strict=True)):
            at = side * pairs + j
            won = argmax[at] if at < len(argmax) else None
            if won is None and p.kind == "max_pow":
                won = torch.empty_like(argmax[j])
            _map(features, raw, won, False, p)
        _compare(maps, slopes[j], to_teacher, some, transfer, p)
    if parts != 1:
        launch(add_up, 1, loss, losses, loss, 1, parts, ROWS=1, COLUMNS=_LOSSES)


def attention_backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    gradients: Sequence[Tensor],
    p: Map,
) -> None:
    """Fill the features' gradients."""
    by_sample = grad_output.ndim > 0
    for j, (x, slope, gradient) in enumerate(zip(features, slopes, gradients, strict=True)):
        upstream = grad_output[j % len(grad_output)] if by_sample else grad_output
        won = argmax[j] if p.kind == "max_pow" else None
        source = gradient if won is not None else x
        shape = list(x.shape)
        shape[p.channel_dim] = 1
        tiles = plan([source, gradient, slope.view(shape).expand_as(x)], by_sample=True)
        along = tiles.strides[2]
        launch(
            channel_gradient,
            tiles.tiles,
            x,
            upstream,
            upstream.stride(0) if by_sample else 0,
            source,
            slope,
            won,
            gradient,
            min(p.p, MOST),
            tiles.tiles,
            tiles.parts,
            tiles.counts,
            tiles.sizes,
            *tiles.strides,
            COMPUTE=COMPUTE[slope.dtype],
            P=known(p.p) if won is None else None,
            CHANNELS=along.index(0) if 0 in along else -1,
            BY_SAMPLE=by_sample,
            **tiles.shape,
        )


class _Walk(NamedTuple):
    """Of `channel_map` over features: programs, arguments that locate elements, and the tile."""

    programs: int
    args: tuple[Any, ...]
    tile: dict[str, int]


@functools.lru_cache(maxsize=4096)
def _walk(shape: tuple[int, ...], strides: tuple[int, ...], dim: int, dtype: torch.dtype) -> _Walk:
    """Over positions in C order, the channels of each; the batch size has no say in the tile."""
    dim %= len(shape)
    p = rows.plan(shape, (strides,), (0,) * (len(shape) - 1), dim, dtype)
    unit, (of_positions,), (of_channels,) = p.tile["UNIT"], p.row_strides, p.class_strides
    apart = of_channels > of_positions[0] * unit
    channels = min(power_of_2(shape[dim]), _CHANNELS_APART if apart else _CHANNELS)
    tile = TILE // channels
    # A stretch of positions that is known to be one is accessed 16 bytes at a time; others need
    # not end where a tile does.
    side_by_side = apart and bool(p.sizes) and p.sizes[0] % 16 == 0
    stretch = p.sizes[0] if side_by_side else p.rows
    return _Walk(
        -(-stretch // tile) * (p.rows // max(stretch, 1)),
        (p.rows, p.units, p.sizes, of_positions, of_channels),
        {"UNIT": unit, "SIDE_BY_SIDE": side_by_side, "ROWS": tile, "CHANNELS": channels},
    )


def _map(features: Tensor, to: Tensor, argmax: Tensor | None, raised: bool, p: Map) -> None:
    walk = _walk(features.shape, features.stride(), p.channel_dim, to.dtype)
    launch(
        channel_map,
        walk.programs,
        features,
        features,
        to,
        argmax,
        min(p.p, MOST),
        *walk.args,
        COMPUTE=COMPUTE[to.dtype],
        P=known(p.p) if raised or argmax is None else None,
        RAISED=raised,
        **walk.tile,
    )


def _compare(
    maps: Sequence[Tensor],
    to_student: Tensor,
    to_teacher: Tensor | None,
    losses: Tensor,
    transfer: Transfer,
    p: Map,
) -> None:
    batch, positions = to_student.shape
    is_max, is_mse, order = p.kind == "max_pow", transfer.distance == "mse", transfer.order
    weight = transfer.beta / positions if is_mse else transfer.beta / 2
    if transfer.reduction == "mean":
        weight /= max(batch, 1)
    # Numbers of 8 bytes take two registers each.
    block = min(power_of_2(positions), _BLOCK * 4 // to_student.dtype.itemsize)
    several = max(_SEVERAL // block, 1)
    launch(
        distance,
        -(-batch // several),
        losses,
        *maps,
        to_student,
        to_teacher,
        losses,
        weight,
        min(order, MOST),
        # The inverse of less is no float32.
        max(p.eps, torch.finfo(to_student.dtype).tiny),
        min(p.p, MOST),
        batch,
        positions,
        IS_MAX=is_max,
        IS_MSE=is_mse,
        ORDER=order if order in (1, 2, float("inf")) else None,
        P=known(p.p) if is_max else None,
        SAMPLES=several,
        BLOCK=block,
        # Equal maps differ by 0, and the largest difference is found again.
        enable_fp_fusion=False,
    )
