"""Soft targets and hard labels: the softmaxes of both sides, the loss and the gradient in one pass.

Rows that fit are held in registers, several to a program where they are short: each logit is read
once. Longer rows are read in blocks, with sums that are rescaled as a maximum grows, and once more
for the gradient.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.hint import add_up
from fastkd.kernels.triton.rows import Plan, load, locate, look_up, store, tile_of_rows
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.softmax import (
    INFINITY,
    LN_2,
    LOGIT_SCALE,
    SCALE,
    exponentials,
    factors,
    in_blocks,
    student_gradient,
    weighted,
    whole,
)
from fastkd.kernels.triton.tiles import COMPUTE, TILE, launch

if TYPE_CHECKING:
    from fastkd.ops.soft_target import Parameters

# How many labels a program counts.
_LABELS = 4 * TILE

# Statistics of a row, in the order in which all backends have them, and the parts after them.
_ROW = tl.constexpr(7)
_PARTS = 3

BY_ROWS = frozenset({"batchmean", "mean"})


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["labels", "losses", "statistics", "sums", "kept"],
)
def logits_forward(
    student,
    teacher,
    gradient,  # or None
    labels,  # one a row, or None
    losses,  # one a row, or None
    statistics,  # or None
    sums,  # of cross-entropies, divergences and rows that count, one a program each; or None
    kept,  # the number by which the gradient is divided, or None
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    ignore_index,
    rate: tl.float64,  # log₂(e) / T, of scaled logits
    soft: tl.float64,  # the factor of q − p
    hard: tl.float64,  # the factor of q at temperature 1 less the target
    smoothing: tl.float64,
    rows,
    units,  # of classes
    sizes,
    row_strides,  # in units
    class_strides,
    COMPUTE: tl.constexpr,
    SHARP: tl.constexpr,  # whether temperature 1 takes exponentials of its own
    SMOOTHS: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Loss, statistics and gradient of a tile of rows."""
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    rate, soft = tl.full([1, 1], rate, COMPUTE), tl.full([1, 1], soft, COMPUTE)
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    label, counts, is_class = look_up(labels, row, is_row, ignore_index, classes)
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_at = teacher + locate(inner, outer, sizes, row_strides[1], UNIT)

    if WHOLE:
        mask = counts & (column < classes)
        s = load(s_at, column, class_strides[0], mask, COMPUTE)
        t = load(t_at, column, class_strides[1], mask, COMPUTE)
        s_max, t_max, pivot, es, et, eh, difference, pivoted = whole(
            s, t, column, classes, rate, SHARP
        )
        s_sum, t_sum, hard_sum = es, et, eh
    else:
        s_max, t_max, pivot, s_sum, t_sum, hard_sum, difference, pivoted = in_blocks(
            s_at, t_at, class_strides, counts, column, classes, rate, COMPUTE, SHARP, SMOOTHS
        )
    s_sum = tl.sum(s_sum, 1, keep_dims=True)
    t_sum = tl.sum(t_sum, 1, keep_dims=True)
    hard_sum = tl.sum(hard_sum, 1, keep_dims=True) if SHARP else s_sum
    # Scaled, and so is the cross-entropy.
    kl = tl.sum(difference, 1, keep_dims=True) / t_sum * (rate * SCALE)
    kl += tl.log2(s_sum / t_sum) * SCALE
    # Rounding may leave a tiny negative number.
    kl = tl.where(counts, tl.where(kl < 0, 0, kl * LN_2), 0)
    ce = tl.zeros_like(kl)
    if labels is not None:
        at = s_at + label.to(tl.int64) * class_strides[0]
        logit = tl.load(at, mask=counts & is_class, other=float("nan")).to(COMPUTE)
        log_sum = tl.log2(hard_sum) * LN_2 * SCALE
        ce = log_sum + (s_max * SCALE - logit * SCALE)
        if SMOOTHS:
            mean = log_sum + (s_max * SCALE - pivot) - tl.sum(pivoted, 1, keep_dims=True) / classes
            # At 1 the label's own term, which may be infinite, is left out.
            ce = tl.where(is_class & (smoothing == 1), 0, ce * (1 - smoothing))
            ce += mean * smoothing
        ce = tl.where(counts, ce, 0)

    if losses is not None:
        loss = weighted(kl, tl.full((), soft_weight, COMPUTE)) + weighted(
            ce, tl.full((), hard_weight, COMPUTE)
        )
        tl.store(losses + row, loss / SCALE, mask=is_row)
    if sums is not None:
        at = sums + tl.program_id(0)
        tl.store(at, tl.sum(ce).to(tl.float64))
        tl.store(at + tl.num_programs(0), tl.sum(kl).to(tl.float64))
        tl.store(at + 2 * tl.num_programs(0), tl.sum(counts.to(tl.int32)).to(tl.float64))
    if statistics is not None:
        at = statistics + row.to(tl.int64) * _ROW
        tl.store(at, tl.where(counts, s_max, 0), mask=is_row)
        tl.store(at + 1, tl.where(counts, s_sum, 0), mask=is_row)
        tl.store(at + 2, tl.where(counts, t_max, 0), mask=is_row)
        tl.store(at + 3, tl.where(counts, t_sum, 0), mask=is_row)
        tl.store(at + 4, tl.where(counts, hard_sum, 0), mask=is_row)
        tl.store(at + 5, kl, mask=is_row)
        tl.store(at + 6, ce, mask=is_row)

    if gradient is not None:
        lives = counts & ((soft != 0) | (hard != 0))
        share = tl.full((), 1, COMPUTE)
        if kept is not None:
            share /= tl.maximum(tl.load(kept), 1)
        of = factors(
            soft * share,
            hard * share,
            smoothing,
            classes,
            s_sum,
            t_sum,
            hard_sum,
            is_class,
            SHARP,
        )
        g_at = gradient + locate(inner, outer, sizes, row_strides[2], UNIT)
        if WHOLE:
            g = student_gradient(es, et, eh, column, label, of, soft != 0, SHARP)
            g = tl.where(lives, g, 0)
            store(g_at, column, class_strides[2], is_row & (column < classes), g)
        else:
            # Backwards: what was read last may still be in the cache.
            for block in range(tl.cdiv(classes, CLASSES) - 1, -1, -1):
                k = block * CLASSES + column
                s = load(s_at, k, class_strides[0], lives & (k < classes), COMPUTE)
                t = load(t_at, k, class_strides[1], lives & (k < classes), COMPUTE)
                _, _, es, et, eh = exponentials(s, t, s_max, t_max, rate, SHARP)
                g = student_gradient(es, et, eh, k, label, of, soft != 0, SHARP)
                g = tl.where(lives, g, 0)
                store(g_at, k, class_strides[2], is_row & (k < classes), g)


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["grad_output", "labels", "statistics", "kept"],
)
def logits_backward(
    grad_output,
    student,
    teacher,
    to_student,  # or None
    to_teacher,  # or None
    labels,  # one a row, or None
    statistics,
    kept,  # the number by which the gradients are divided, or None
    ignore_index,
    rate: tl.float64,
    soft: tl.float64,
    hard: tl.float64,
    smoothing: tl.float64,
    rows,
    units,
    sizes,
    row_strides,
    class_strides,
    upstream_strides,
    COMPUTE: tl.constexpr,
    SHARP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Gradients of a tile of rows, a block at a time.

    With IN_PLACE those of students are there, for a `grad_output` of 1.
    """
    if IN_PLACE and tl.load(grad_output).to(COMPUTE) == 1:
        return
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    rate, soft = tl.full([1, 1], rate, COMPUTE), tl.full([1, 1], soft, COMPUTE)
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    label, counts, is_class = look_up(labels, row, is_row, ignore_index, classes)
    lives = counts & ((soft != 0) | (hard != 0))
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_at = teacher + locate(inner, outer, sizes, row_strides[1], UNIT)

    at = statistics + row.to(tl.int64) * _ROW
    s_max = tl.load(at, mask=lives, other=0)
    s_sum = tl.load(at + 1, mask=lives, other=1)
    t_max = tl.load(at + 2, mask=lives, other=0)
    t_sum = tl.load(at + 3, mask=lives, other=1)
    hard_sum = tl.load(at + 4, mask=lives, other=1)
    upstream = tl.load(
        grad_output + locate(inner, outer, sizes, upstream_strides, 1), mask=lives, other=0
    )
    upstream = upstream.to(COMPUTE)
    if kept is not None:
        upstream /= tl.maximum(tl.load(kept), 1)
    of = factors(
        soft * upstream,
        hard * upstream,
        smoothing,
        classes,
        s_sum,
        t_sum,
        hard_sum,
        is_class,
        SHARP,
    )
    for first in range(0, classes, CLASSES):
        k = first + column
        mask = is_row & (k < classes)
        s = load(s_at, k, class_strides[0], lives & mask, COMPUTE)
        t = load(t_at, k, class_strides[1], lives & mask, COMPUTE)
        x, y, es, et, eh = exponentials(s, t, s_max, t_max, rate, SHARP)
        if to_student is not None:
            g = student_gradient(es, et, eh, k, label, of, soft != 0, SHARP)
            to_at = to_student + locate(inner, outer, sizes, row_strides[2], UNIT)
            store(to_at, k, class_strides[2], mask, tl.where(lives, g, 0))
        if to_teacher is not None:
            kl = tl.load(statistics + row.to(tl.int64) * _ROW + 5, mask=lives, other=0)
            surplus = (y - x) * (rate * SCALE) + tl.log2(s_sum / t_sum) * SCALE
            surplus = surplus * LN_2 - kl
            g = tl.where((t == -INFINITY) | (soft == 0), 0, et * of[1] * surplus / SCALE)
            to_at = to_teacher + locate(inner, outer, sizes, row_strides[3], UNIT)
            store(to_at, k, class_strides[3], mask, tl.where(lives, g, 0))


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["labels", "counts"],
)
def count(labels, counts, ignore_index, rows, LABELS: tl.constexpr):
    """How many labels of a stretch are not ignored."""
    row = tl.program_id(0).to(tl.int64) * LABELS + tl.arange(0, LABELS)
    label = tl.load(labels + row, mask=row < rows, other=ignore_index)
    found = tl.sum((label != ignore_index).to(tl.int32))
    tl.store(counts + tl.program_id(0), found.to(counts.dtype.element_ty))


@triton.jit(
    do_not_specialize=["programs"],
    do_not_specialize_on_alignment=["sums", "loss", "parts"],
)
def conclude(
    sums,  # of cross-entropies, divergences and rows that count, one a program each
    loss,  # or None
    parts,  # or None
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    size: tl.float64,  # the divisor of one row
    t2: tl.float64,
    programs,
    BY_ROWS: tl.constexpr,  # whether the number of rows is part of the divisor
    COLUMNS: tl.constexpr,
):
    """The loss and its parts, from sums that are added up in the same order each time."""
    hard = tl.zeros([COLUMNS], tl.float64)
    kl, kept = hard, hard
    for start in range(0, programs, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at, mask = sums + column, column < programs
        hard += tl.load(at, mask=mask, other=0)
        kl += tl.load(at + programs, mask=mask, other=0)
        kept += tl.load(at + 2 * programs, mask=mask, other=0)
    rows = tl.sum(kept)
    divisor = size * tl.maximum(rows, 1) if BY_ROWS else size
    hard_part = tl.sum(hard) / divisor
    kl_part = tl.sum(kl) / divisor
    if loss is not None:
        total = weighted(kl_part, soft_weight) + weighted(hard_part, hard_weight)
        tl.store(loss, (total / SCALE).to(loss.dtype.element_ty))
    if parts is not None:
        tl.store(parts, (hard_part / SCALE).to(parts.dtype.element_ty))
        tl.store(parts + 1, (weighted(kl_part, t2) / SCALE).to(parts.dtype.element_ty))
        tl.store(parts + 2, rows.to(parts.dtype.element_ty))


# All of the GPU waits for such a program: it has as many threads as there can be.
ALONE = {"COLUMNS": TILE, "num_warps": 32}


def soft_target_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    loss: Tensor,
    statistics: Tensor | None,
    gradient: Tensor | None,
    p: "Parameters",
) -> None:
    """Fill the loss, and those that are wanted of the rows' statistics and the gradient."""
    logits = student, teacher, student if gradient is None else gradient
    strides = tuple([x.stride() for x in logits])
    plan = plan_rows(student.shape, strides, (0,) * (student.ndim - 1), p.dim, loss.dtype)
    labels = labels if labels is None else labels.contiguous()
    losses = loss if p.reduction == "none" else None
    sums = kept = None
    if losses is None or statistics is not None:
        sums = loss.new_empty(3 * plan.programs, dtype=torch.float64)
    if labels is not None and gradient is not None and p.reduction in BY_ROWS:
        kept = count_kept(labels, loss.new_empty(1), p.ignore_index)
    launch(
        logits_forward,
        plan.programs,
        student,
        *(student, teacher, gradient, labels, losses, statistics, sums, kept),
        *(p.soft_weight, p.hard_weight),
        *arguments(plan, labels, p),
        SMOOTHS=p.label_smoothing > 0,
        WHOLE=student.shape[p.dim] <= plan.tile["CLASSES"],
        **constants(plan, labels, loss.dtype, p),
    )
    if sums is not None:
        launch(
            conclude,
            1,
            loss,
            sums,
            loss if losses is None else None,
            None if statistics is None else statistics[-_PARTS:],
            *(p.soft_weight, p.hard_weight, size_of_row(plan, p), p.temperature * p.temperature),
            plan.programs,
            BY_ROWS=p.reduction in BY_ROWS,
            **ALONE,
        )


def soft_target_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    p: "Parameters",
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted.

    With `in_place` the student's holds its values for a `grad_output` of 1, and where it is 1
    nothing is read or written.
    """
    to = (to_student, student), (to_teacher, teacher)
    logits = student, teacher, *[x if gradient is None else gradient for gradient, x in to]
    upstream = grad_output.stride() if grad_output.ndim else (0,) * (student.ndim - 1)
    plan = plan_rows(
        student.shape, tuple([x.stride() for x in logits]), upstream, p.dim, statistics.dtype
    )
    labels = labels if labels is None else labels.contiguous()
    kept = statistics[-1:] if labels is not None and p.reduction in BY_ROWS else None
    launch(
        logits_backward,
        plan.programs,
        student,
        *(grad_output, student, teacher, to_student, to_teacher, labels, statistics, kept),
        *arguments(plan, labels, p),
        plan.upstream_strides,
        IN_PLACE=in_place,
        **constants(plan, labels, statistics.dtype, p),
    )


def size_of_row(plan: Plan, p: "Parameters") -> float:
    """What the reduction divides by, but for the number of rows."""
    return float(plan.units * plan.tile["UNIT"]) if p.reduction == "mean" else 1.0


def arguments(plan: Plan, labels: Tensor | None, p: "Parameters") -> tuple[Any, ...]:
    """What kernels take after the tensors."""
    divisor = size_of_row(plan, p)
    if labels is None and p.reduction in BY_ROWS:
        divisor *= max(plan.rows, 1)
    limits = torch.finfo(torch.float32)
    return (
        p.ignore_index,
        # Where all logits count the same, or the largest alone, 0 or infinity would make NaN.
        min(max(1 / math.log(2) / p.temperature / LOGIT_SCALE, limits.tiny), limits.max),
        p.soft_weight / p.temperature / divisor,
        p.hard_weight / divisor if labels is not None else 0.0,
        p.label_smoothing,
        *plan[1:6],
    )


def constants(
    plan: Plan, labels: Tensor | None, dtype: torch.dtype, p: "Parameters"
) -> dict[str, Any]:
    """What kernels are compiled for."""
    sharp = labels is not None and p.temperature != 1
    return {"COMPUTE": COMPUTE[dtype], "SHARP": sharp, **plan.tile}


def count_kept(labels: Tensor, kept: Tensor, ignore_index: int) -> Tensor:
    """The number of rows that count, into `kept`."""
    rows = labels.numel()
    programs = -(-rows // _LABELS)
    counts = kept if programs == 1 else kept.new_empty(programs, dtype=torch.float64)
    args = labels, counts, ignore_index, rows
    launch(count, programs, labels, *args, LABELS=_LABELS, num_warps=32)
    if programs > 1:
        launch(add_up, 1, labels, counts, kept, 1, programs, ROWS=1, **ALONE)
    return kept
