"""The gradients of rows: what both kernels write, and the kernel that writes nothing else."""

import triton
import triton.language as tl

from fastkd.kernels.triton import divergence
from fastkd.kernels.triton.divergence import INFINITY, LN_2, SCALE
from fastkd.kernels.triton.rows import load, locate, look_up, store, tile_of_rows
from fastkd.kernels.triton.softmax import between, exponentials, locate_all, target

# Statistics of a row, in the order in which all backends have them.
STATISTICS = tl.constexpr(7)


@triton.jit
def factors(
    soft,
    hard,
    by,
    smoothing,
    classes,
    is_class,
    s_sum,
    t_sum,
    hard_sum,
    found,
    unit,
    shares,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Of what a student's gradient times `by` is made of, and whether the teacher has a say.

    These are of es, the teacher's part, eh, every class and the label's.
    """
    # A label that is no class leaves nothing right but the divergence's gradient.
    of_label = tl.where(is_class | (hard * by == 0), hard * by, float("nan"))
    log_ratio, unit = tl.log2(s_sum / t_sum) * LN_2, unit * LN_2 / SCALE
    of_student, of_teacher = divergence.factors(
        soft * by, s_sum, t_sum, found, log_ratio, unit, shares, DIVERGENCE
    )
    of_hard = of_label / hard_sum
    if not HAS_HARD:
        of_student += of_hard
    of_class, of_label = of_label * smoothing / classes, of_label * (1 - smoothing)
    return of_student, of_teacher, of_hard, of_class, of_label, soft != 0


@triton.jit
def student_gradient(
    es, et, eh, apart, k, label, of, HAS_HARD: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """Of the student's logits; where the soft term is off nothing shows that the teacher holds."""
    with_teacher = divergence.with_teacher(es, et, apart, of[1], DIVERGENCE)
    gradient = es * of[0] + tl.where(of[5], with_teacher, 0)
    if HAS_HARD:
        gradient += eh * of[2]
    return gradient - of[3] - tl.where(k == label, of[4], 0)


@triton.jit
def last_pass(
    s_at,
    t_ats,
    strides,
    seen,  # the rows that are read
    column,
    classes,
    s_max,
    maxima,
    shares,
    rate,
    mean,
    g_at,  # or None
    label,
    is_row,
    lives,
    of,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The gradient of rows of any length; of several teachers the target's sum and the terms."""
    mass = tl.zeros([s_at.shape[0], column.shape[1]], rate.dtype)
    difference = mass
    # Backwards: what was read last may still be in the cache.
    for block in range(tl.cdiv(classes, column.shape[1]) - 1, -1, -1):
        k = block * column.shape[1] + column
        s = load(s_at, k, strides[0], seen & (k < classes), rate.dtype)
        et, y, t_excluded = target(t_ats, k, strides, seen & (k < classes), maxima, shares, rate)
        x, es, eh = exponentials(s, s_max, rate, HAS_HARD)
        apart = between(et, y, x, rate, mean)
        if len(t_ats) > 1:
            mass += et
            difference += divergence.terms(es, et, apart, s == -INFINITY, t_excluded, DIVERGENCE)
        if g_at is not None:
            g = student_gradient(es, et, eh, apart, k, label, of, HAS_HARD, DIVERGENCE)
            store(g_at, k, strides[1], is_row & (k < classes), tl.where(lives, g, 0))
    return mass, difference


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["grad_output", "in_place", "labels", "statistics", "kept"],
)
def logits_backward(
    grad_output,
    in_place,  # or None
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
    row_strides,  # of student, its gradient, teacher, its gradient
    class_strides,
    upstream_strides,
    COMPUTE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Gradients of a tile of rows, a block at a time.

    Where `in_place` is 1 those of students are there already.
    """
    if in_place is not None and tl.load(in_place) == 1:
        return
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    rate, soft = tl.full([1, 1], rate, COMPUTE), tl.full([1, 1], soft, COMPUTE)
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    label, counts, is_class = look_up(labels, row, is_row, ignore_index, classes)
    lives = counts & ((soft != 0) | (hard != 0))
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_ats = locate_all((teacher,), inner, outer, sizes, row_strides, UNIT)

    at = statistics + row.to(tl.int64) * STATISTICS
    s_max = tl.load(at, mask=lives, other=0)
    s_sum = tl.load(at + 1, mask=lives, other=1)
    t_max = tl.load(at + 2, mask=lives, other=0)
    t_sum = tl.load(at + 3, mask=lives, other=1)
    hard_sum = tl.load(at + 4, mask=lives, other=1)
    kl = tl.load(at + 5, mask=lives, other=0)
    at = grad_output + locate(inner, outer, sizes, upstream_strides, 1)
    by = tl.load(at, mask=lives, other=0).to(COMPUTE)
    if kept is not None:
        by /= tl.maximum(tl.load(kept), 1)
    unit = rate * SCALE
    of = factors(
        *(soft, hard, by, smoothing, classes, is_class, s_sum, t_sum, hard_sum, kl / SCALE),
        *(unit, None, HAS_HARD, DIVERGENCE),
    )
    for first in range(0, classes, CLASSES):
        k = first + column
        mask = is_row & (k < classes)
        s = load(s_at, k, class_strides[0], lives & mask, COMPUTE)
        et, y, excluded = target(t_ats, k, class_strides, lives & mask, (t_max,), (), rate)
        x, es, eh = exponentials(s, s_max, rate, HAS_HARD)
        if to_student is not None:
            g = student_gradient(es, et, eh, y - x, k, label, of, HAS_HARD, DIVERGENCE)
            g_at = to_student + locate(inner, outer, sizes, row_strides[1], UNIT)
            store(g_at, k, class_strides[1], mask, tl.where(lives, g, 0))
        if to_teacher is not None:
            surplus = ((y - x) * unit + tl.log2(s_sum / t_sum) * SCALE) * LN_2 - kl
            of_student, of_teacher = soft * by / s_sum, soft * by / t_sum
            g = divergence.to_teacher(
                *(es, et, of_student, of_teacher, surplus, excluded, DIVERGENCE)
            )
            g_at = to_teacher + locate(inner, outer, sizes, row_strides[3], UNIT)
            g = tl.where((soft == 0) | ~lives, 0, g)
            store(g_at, k, class_strides[3], mask, g)
