"""Soft targets from several teachers and hard labels: the loss and the gradient in one kernel.

Rows that fit are held in registers: each logit is read once, and of the teachers only their mean is
kept. Longer rows are read in blocks, first for the normalisers of each tensor, and then for the
loss and the gradient.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.rows import load, locate, look_up, store, tile_of_rows
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.soft_target import (
    ALONE,
    BY_ROWS,
    arguments,
    conclude,
    constants,
    count_kept,
    size_of_row,
)
from fastkd.kernels.triton.softmax import (
    INFINITY,
    LN_2,
    LOGIT_SCALE,
    SCALE,
    SHARP_RATE,
    factors,
    shift,
    student_gradient,
    weighted,
)
from fastkd.kernels.triton.tiles import launch
from fastkd.reference.precision import compute_dtype

if TYPE_CHECKING:
    from fastkd.ops.soft_target import Parameters

# What a probability that underflows is taken for, so that 0 means that every teacher excludes it.
_LEAST_32 = tl.constexpr(2.0**-126)
_LEAST_64 = tl.constexpr(2.0**-1022)
# More than as many of these as there can be teachers: what is below has underflowed.
_MOST_OF_LEAST = tl.constexpr(128)


@triton.jit
def probabilities(t, t_max, by, rate):
    """A teacher's share in the target."""
    least = _LEAST_64 if t.dtype == tl.float64 else _LEAST_32
    share = tl.exp2((t * SCALE - shift(t_max)) * rate) * by
    return tl.where((t != -INFINITY) & (share < least), least, share)


@triton.jit
def differences(p, x, of_logarithm, of_logit):
    """The terms of the divergence, scaled.

    One that every teacher excludes is 0. One whose probability underflows is 0 as well, whatever
    the student has there, unless the student excludes it.
    """
    least = _LEAST_64 if p.dtype == tl.float64 else _LEAST_32
    x = tl.where((p < _MOST_OF_LEAST * least) & (x > -INFINITY), 0, x)
    return tl.where(p == 0, 0, p * (tl.log2(p) * of_logarithm - x * of_logit))


@triton.jit
def normalisers(
    at,
    stride,
    counts,
    column,
    classes,
    pivot,
    rate,
    COMPUTE: tl.constexpr,
    SHARP: tl.constexpr,
    SMOOTHS: tl.constexpr,
):
    """The maximum of rows of any length, and sums relative to it: at T, at 1, of the logits."""
    maximum = tl.full(at.shape, -INFINITY, COMPUTE)
    soft = tl.zeros([at.shape[0], column.shape[1]], COMPUTE)
    sharp, pivoted = soft, soft
    for first in range(0, classes, column.shape[1]):
        k = first + column
        x = load(at, k, stride, counts & (k < classes), COMPUTE)
        higher = tl.maximum(maximum, tl.max(x, 1, keep_dims=True))
        fading = maximum * SCALE - shift(higher)
        below = x * SCALE - shift(higher)
        soft = soft * tl.exp2(fading * rate) + tl.exp2(below * rate)
        if SHARP:
            sharp = sharp * tl.exp2(fading * SHARP_RATE) + tl.exp2(below * SHARP_RATE)
        if SMOOTHS:
            pivoted += tl.where(k < classes, x * SCALE - pivot, 0)
        maximum = higher
    soft = tl.sum(soft, 1, keep_dims=True)
    sharp = tl.sum(sharp, 1, keep_dims=True) if SHARP else soft
    return maximum, soft, sharp, tl.sum(pivoted, 1, keep_dims=True)


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["labels", "losses", "sums", "kept", "grad_output"],
)
def logits_ensemble(
    student,
    teachers,
    gradient,  # or None
    labels,  # one a row, or None
    losses,  # one a row, or None
    sums,  # of cross-entropies, divergences and rows that count, one a program each; or None
    kept,  # the number by which the gradient is divided, or None
    grad_output,  # or None
    weights,  # of the teachers, each as the sum of two float32
    rests,
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    # SCALE and log₂(e) / T, times a power of 2 by which neither is large.
    of_logarithm: tl.float64,
    of_logit: tl.float64,
    scale: tl.float64,  # one over that power
    ignore_index,
    rate: tl.float64,  # log₂(e) / T, of scaled logits
    soft: tl.float64,  # the factor of q − p
    hard: tl.float64,  # the factor of q at temperature 1 less the target
    smoothing: tl.float64,
    rows,
    units,  # of classes
    sizes,
    row_strides,  # in units: of student, gradient, teachers
    class_strides,
    upstream_strides,
    COMPUTE: tl.constexpr,
    SHARP: tl.constexpr,  # whether temperature 1 takes exponentials of its own
    SMOOTHS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Loss and gradient of a tile of rows.

    With IN_PLACE the gradient is there, for a `grad_output` of 1.
    """
    if IN_PLACE and tl.load(grad_output).to(COMPUTE) == 1:
        return
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    rate, soft = tl.full([1, 1], rate, COMPUTE), tl.full([1, 1], soft, COMPUTE)
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    of_logarithm = tl.full([1, 1], of_logarithm, COMPUTE)
    of_logit = tl.full([1, 1], of_logit, COMPUTE)
    label, counts, is_class = look_up(labels, row, is_row, ignore_index, classes)
    lives = counts & ((soft != 0) | (hard != 0))
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)

    if WHOLE:
        mask = counts & (column < classes)
        p = tl.zeros([ROWS, CLASSES], COMPUTE)
        for m in tl.static_range(len(teachers)):
            t_at = teachers[m] + locate(inner, outer, sizes, row_strides[2 + m], UNIT)
            t = load(t_at, column, class_strides[2 + m], mask, COMPUTE)
            t_max = tl.max(t, 1, keep_dims=True)
            t_sum = tl.sum(tl.exp2((t * SCALE - shift(t_max)) * rate), 1, keep_dims=True)
            weight = tl.full([1, 1], weights[m], COMPUTE) + tl.full([1, 1], rests[m], COMPUTE)
            p += probabilities(t, t_max, weight / t_sum, rate)
        s = load(s_at, column, class_strides[0], mask, COMPUTE)
        s_max = tl.max(s, 1, keep_dims=True)
        pivot = shift(s_max)
        x = s * SCALE - pivot
        es = tl.exp2(x * rate)
        eh = tl.exp2(x * SHARP_RATE) if SHARP else es
        s_sum = tl.sum(es, 1, keep_dims=True)
        hard_sum = tl.sum(eh, 1, keep_dims=True) if SHARP else s_sum
        pivoted = tl.sum(tl.where(column < classes, x, 0), 1, keep_dims=True)
    else:
        of_teachers = ()
        for m in tl.static_range(len(teachers)):
            t_at = teachers[m] + locate(inner, outer, sizes, row_strides[2 + m], UNIT)
            t_max, t_sum, _, _ = normalisers(
                *(t_at, class_strides[2 + m], counts, column, classes, rate, rate),
                *(COMPUTE, False, False),
            )
            weight = tl.full([1, 1], weights[m], COMPUTE) + tl.full([1, 1], rests[m], COMPUTE)
            found = t_at, t_max, weight / t_sum
            of_teachers = of_teachers + (found,)  # type: ignore[assignment]  # noqa: RUF005
        pivot = shift(tl.load(s_at, mask=counts, other=0).to(COMPUTE))
        s_max, s_sum, hard_sum, pivoted = normalisers(
            *(s_at, class_strides[0], counts, column, classes, pivot, rate),
            *(COMPUTE, SHARP, SMOOTHS),
        )

    if gradient is not None:
        share = tl.full((), 1, COMPUTE)
        if kept is not None:
            share /= tl.maximum(tl.load(kept), 1)
        if grad_output is not None:
            at = grad_output + locate(inner, outer, sizes, upstream_strides, 1)
            share *= tl.load(at, mask=lives, other=0).to(COMPUTE)
        of = factors(
            soft * share,
            hard * share,
            smoothing,
            classes,
            s_sum,
            tl.full([1, 1], 1, COMPUTE),
            hard_sum,
            is_class,
            SHARP,
        )
        g_at = gradient + locate(inner, outer, sizes, row_strides[1], UNIT)

    if WHOLE:
        mass, difference = p, differences(p, x, of_logarithm, of_logit)
        if gradient is not None:
            g = student_gradient(es, p, eh, column, label, of, soft != 0, SHARP)
            mask = is_row & (column < classes)
            store(g_at, column, class_strides[1], mask, tl.where(lives, g, 0))
    else:
        mass = tl.zeros([ROWS, CLASSES], COMPUTE)
        difference = mass
        # Backwards: what was read last may still be in the cache.
        for block in range(tl.cdiv(classes, CLASSES) - 1, -1, -1):
            k = block * CLASSES + column
            mask = counts & (k < classes)
            p = tl.zeros([ROWS, CLASSES], COMPUTE)
            for m in tl.static_range(len(teachers)):
                t_at, t_max, by = of_teachers[m]  # type: ignore[var-annotated]
                t = load(t_at, k, class_strides[2 + m], mask, COMPUTE)
                p += probabilities(t, t_max, by, rate)
            x = load(s_at, k, class_strides[0], mask, COMPUTE) * SCALE - shift(s_max)
            mass += p
            difference += differences(p, x, of_logarithm, of_logit)
            if gradient is not None:
                es = tl.exp2(x * rate)
                eh = tl.exp2(x * SHARP_RATE) if SHARP else es
                g = student_gradient(es, p, eh, k, label, of, soft != 0, SHARP)
                mask = is_row & (k < classes)
                store(g_at, k, class_strides[1], mask, tl.where(lives, g, 0))

    if (losses is not None) or (sums is not None):
        mass = tl.sum(mass, 1, keep_dims=True)
        kl = tl.sum(difference, 1, keep_dims=True) / mass * tl.full([1, 1], scale, COMPUTE)
        kl += tl.log2(s_sum / mass) * SCALE
        # Rounding may leave a tiny negative number.
        kl = tl.where(counts, tl.where(kl < 0, 0, kl * LN_2), 0)
        ce = tl.zeros_like(kl)
        if labels is not None:
            at = s_at + label.to(tl.int64) * class_strides[0]
            logit = tl.load(at, mask=counts & is_class, other=float("nan")).to(COMPUTE)
            log_sum = tl.log2(hard_sum) * LN_2 * SCALE
            ce = log_sum + (s_max * SCALE - logit * SCALE)
            if SMOOTHS:
                mean = log_sum + (s_max * SCALE - pivot) - pivoted / classes
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


def soft_target_ensemble(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: tuple[float, ...],
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    gradient: Tensor | None,
    grad_output: Tensor | None,
    p: "Parameters",
    in_place: bool = False,
) -> None:
    """Fill those that are wanted of the loss, its parts, and the student's gradient.

    With `in_place` the gradient holds its values for a `grad_output` of 1, and where it is 1
    nothing is read or written.
    """
    dtype = compute_dtype(student, *teachers)
    logits = student, student if gradient is None else gradient, *teachers
    upstream = (0,) * (student.ndim - 1)
    if grad_output is not None and grad_output.ndim:
        upstream = grad_output.stride()
    plan = plan_rows(student.shape, tuple([x.stride() for x in logits]), upstream, p.dim, dtype)
    labels = labels if labels is None else labels.contiguous()
    losses = loss if p.reduction == "none" else None
    total = loss if losses is None else None
    sums = kept = None
    if total is not None or parts is not None:
        sums = student.new_empty(3 * plan.programs, dtype=torch.float64)
    if labels is not None and gradient is not None and p.reduction in BY_ROWS:
        kept = count_kept(labels, student.new_empty(1, dtype=dtype), p.ignore_index)
    halves = [_in_halves(weight) for weight in weights]
    ignore_index, rate, *others = arguments(plan, labels, p)
    of_logits = rate * LOGIT_SCALE
    power = 2.0 ** -max(math.frexp(of_logits)[1], 0)
    launch(
        logits_ensemble,
        plan.programs,
        student,
        *(student, tuple(teachers), gradient, labels, losses, sums, kept, grad_output),
        *(tuple([high for high, _ in halves]), tuple([low for _, low in halves])),
        *(p.soft_weight, p.hard_weight, power * LOGIT_SCALE, power * of_logits, 1 / power),
        *(ignore_index, rate, *others),
        plan.upstream_strides,
        SMOOTHS=p.label_smoothing > 0,
        IN_PLACE=in_place,
        WHOLE=student.shape[p.dim] <= plan.tile["CLASSES"],
        **constants(plan, labels, dtype, p),
    )
    if sums is not None:
        launch(
            conclude,
            1,
            student,
            *(sums, total, parts),
            *(p.soft_weight, p.hard_weight, size_of_row(plan, p), p.temperature * p.temperature),
            plan.programs,
            BY_ROWS=p.reduction in BY_ROWS,
            **ALONE,
        )


def _in_halves(weight: float) -> tuple[float, float]:
    """As the sum of two float32, because Triton takes no float64 in a tuple."""
    high = float(torch.tensor(weight, dtype=torch.float32))
    return high, weight - high
