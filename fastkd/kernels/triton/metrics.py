"""Metrics of rows of logits: sums over blocks of classes, rescaled as a maximum grows.

The overlap takes probabilities, and so the row once more, backwards: what was read last may still
be in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import INFINITY, LN_2, SCALE, terms
from fastkd.kernels.triton.rows import WHOLE, load, locate, tile_of_rows
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.softmax import exponentials, shift
from fastkd.kernels.triton.temperatures import rate_of
from fastkd.kernels.triton.tiles import COMPUTE, launch
from fastkd.parameters import Metrics

# A whole row of twice as many would take registers that let one program run where two could.
_MOST_CLASSES = WHOLE // 2


@triton.jit
def largest(x, k, classes, maximum, at, nan_at):
    """The maximum of rows with a block's, its first class, and the first that is NaN."""
    is_nan = x != x
    numbers = tl.where(is_nan, -INFINITY, x)
    top = tl.max(numbers, 1, keep_dims=True)
    found = tl.min(tl.where(numbers == top, k, classes), 1, keep_dims=True)
    of_nan = tl.min(tl.where(is_nan, k, classes), 1, keep_dims=True)
    at = tl.where(top > maximum, found, at)
    return tl.maximum(maximum, top), at, tl.minimum(nan_at, of_nan)


@triton.jit
def moved(total, mass, more, by):
    """A sum of exponentials, whose own sum is `mass`, times what grows by `more`.

    An infinite one stays so, whatever becomes of the mass of its class.
    """
    grown = (total + tl.where(mass == 0, 0, mass * more)) * by
    return tl.where(tl.abs(total) == INFINITY, total, grown)


@triton.jit
def entropy_of(logits, total, nats):
    """Of rows, from their exponentials and these times the logits; not negative by rounding."""
    found = tl.log2(total) * LN_2 - logits / total * nats
    return tl.where(found < 0, 0, found)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["rows_kept", "values", "argmax"],
)
def metrics(
    student,
    teacher,
    rows_kept,  # a byte a row, or None
    values,  # of all rows, one after another
    argmax,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    rate: tl.float64,  # log₂(e) / T, of scaled logits
    teacher_rate: tl.float64,
    rows,
    units,  # of classes
    sizes,
    row_strides,  # in units: of student and teacher
    class_strides,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Those of a tile of rows."""
    classes = tl.full((), units * UNIT, tl.int32)
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    rate, t_rate = tl.full([1, 1], rate, COMPUTE), tl.full([1, 1], teacher_rate, COMPUTE)
    # Brings the teacher's logits to the student's temperature.
    ratio, nats, t_nats = t_rate / rate, rate * LN_2, t_rate * LN_2
    counts = is_row
    if rows_kept is not None:
        counts = is_row & (tl.load(rows_kept + row, mask=is_row, other=0) != 0)
    s_from = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_from = teacher + locate(inner, outer, sizes, row_strides[1], UNIT)

    nothing = tl.zeros([ROWS, 1], COMPUTE)
    s_max, t_max = nothing - INFINITY, nothing - INFINITY
    s_sum, t_sum, s_logits, t_logits, forward, reverse = (nothing,) * 6
    s_at, t_at = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
    s_nan, t_nan = s_at + classes, t_at + classes
    for first in range(0, classes, CLASSES):
        k = first + column
        s = load(s_from, k, class_strides[0], counts & (k < classes), COMPUTE)
        t = load(t_from, k, class_strides[1], counts & (k < classes), COMPUTE)
        s_next, s_at, s_nan = largest(s, k, classes, s_max, s_at, s_nan)
        t_next, t_at, t_nan = largest(t, k, classes, t_max, t_at, t_nan)
        # What there is of the row, relative to the maxima that it has now.
        s_by = tl.exp2((s_max * SCALE - shift(s_next)) * rate)
        t_by = tl.exp2((t_max * SCALE - shift(t_next)) * t_rate)
        s_more, t_more = shift(s_max) - shift(s_next), shift(t_max) - shift(t_next)
        s_logits, t_logits = (
            moved(s_logits, s_sum, s_more, s_by),
            moved(t_logits, t_sum, t_more, t_by),
        )
        apart = t_more * ratio - s_more
        forward, reverse = moved(forward, t_sum, apart, t_by), moved(reverse, s_sum, apart, s_by)
        # And the block.
        x, es, _ = exponentials(s, s_next, rate)
        y, et, _ = exponentials(t, t_next, t_rate)
        apart, no_s, no_t = y * ratio - x, s == -INFINITY, t == -INFINITY
        s_sum = s_sum * s_by + tl.sum(es, 1, keep_dims=True)
        t_sum = t_sum * t_by + tl.sum(et, 1, keep_dims=True)
        s_logits += tl.sum(tl.where(no_s, 0, es * x), 1, keep_dims=True)
        t_logits += tl.sum(tl.where(no_t, 0, et * y), 1, keep_dims=True)
        forward += tl.sum(terms(es, et, apart, no_s, no_t, "forward_kl"), 1, keep_dims=True)
        reverse += tl.sum(terms(es, et, apart, no_s, no_t, "reverse_kl"), 1, keep_dims=True)
        s_max, t_max = s_next, t_next

    overlap = nothing
    for block in range(tl.cdiv(classes, CLASSES) - 1, -1, -1):
        k = block * CLASSES + column
        s = load(s_from, k, class_strides[0], counts & (k < classes), COMPUTE)
        t = load(t_from, k, class_strides[1], counts & (k < classes), COMPUTE)
        q = exponentials(s, s_max, rate)[1] * (1 / s_sum)
        p = exponentials(t, t_max, t_rate)[1] * (1 / t_sum)
        overlap += tl.sum(tl.where(p < q, p, q), 1, keep_dims=True)
    # The smaller one has not seen what makes a sum NaN or 0.
    overlap = tl.where((s_sum > 0) & (t_sum > 0), tl.where(overlap > 1, 1, overlap), float("nan"))

    log_ratio = tl.log2(s_sum / t_sum) * LN_2
    forward = forward / t_sum * nats + log_ratio
    reverse = -(reverse / s_sum * nats + log_ratio)
    found = (
        s_max / tl.full([1, 1], temperature, COMPUTE) + tl.log2(s_sum) * LN_2,
        t_max / tl.full([1, 1], teacher_temperature, COMPUTE) + tl.log2(t_sum) * LN_2,
        entropy_of(s_logits, s_sum, nats),
        entropy_of(t_logits, t_sum, t_nats),
        tl.where(forward < 0, 0, forward),
        tl.where(reverse < 0, 0, reverse),
        overlap,
    )
    of_row = tl.cast(row, tl.int64)
    for i in tl.static_range(len(found)):
        tl.store(
            values + i * tl.cast(rows, tl.int64) + of_row,
            tl.where(counts, found[i], 0),
            mask=is_row,
        )
    s_at, t_at = tl.where(s_nan < classes, s_nan, s_at), tl.where(t_nan < classes, t_nan, t_at)
    tl.store(argmax + of_row, tl.where(counts, s_at, -1).to(tl.int64), mask=is_row)
    tl.store(argmax + rows + of_row, tl.where(counts, t_at, -1).to(tl.int64), mask=is_row)


def distillation_metrics(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    values: Tensor,
    argmax: Tensor,
    p: Metrics,
) -> None:
    """Fill the values of rows, one after another, and both arg-maxima."""
    strides = student.stride(), teacher.stride()
    nothing = (0,) * (student.ndim - 1)
    plan = plan_rows(student.shape, strides, nothing, p.dim, values.dtype)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    launch(
        metrics,
        plan.programs,
        student,
        *(student, teacher, mask, values, argmax, p.temperature, p.teacher_temperature),
        *(rate_of(p.temperature), rate_of(p.teacher_temperature)),
        *(plan.rows, plan.units, plan.sizes, plan.row_strides, plan.class_strides),
        COMPUTE=COMPUTE[values.dtype],
        **{**plan.tile, "CLASSES": min(plan.tile["CLASSES"], _MOST_CLASSES)},
    )
