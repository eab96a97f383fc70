"""The gradients of rows: what both kernels write, and the kernel that writes nothing else."""

import triton
import triton.language as tl

from fastkd.kernels.triton import divergence
from fastkd.kernels.triton.divergence import INFINITY, LN_2, SCALE
from fastkd.kernels.triton.rows import load, locate, look_up, store, tile_of_rows
from fastkd.kernels.triton.softcap import slope
from fastkd.kernels.triton.softmax import between, exponentials, locate_all, target
from fastkd.kernels.triton.temperatures import product, store_gradients, temperatures_of

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
    rates,
    mean,
    g_at,  # or None
    label,
    is_row,
    lives,
    of,
    cap,  # of the student's logits where IS_CAPPED
    IS_CAPPED: tl.constexpr,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr,
):
    """The gradient of rows of any length; of several teachers the target's sum and the terms."""
    mass = tl.zeros([s_at.shape[0], column.shape[1]], rates[0].dtype)
    difference = mass
    # Backwards: what was read last may still be in the cache.
    for block in range(tl.cdiv(classes, column.shape[1]) - 1, -1, -1):
        k = block * column.shape[1] + column
        mask = seen & (k < classes)
        s = load(s_at, k, strides[0], mask, rates[0].dtype)
        et, y, t_excluded = target(
            *(t_ats, k, strides, mask, maxima, shares, rates, mean, DIVERGENCE, TEACHER_IS)
        )
        x, es, eh = exponentials(s, s_max, rates[0], HAS_HARD)
        apart = between(et, y, x, rates, mean, DIVERGENCE)
        if len(t_ats) > 1:
            mass += et
            difference += divergence.terms(es, et, apart, s == -INFINITY, t_excluded, DIVERGENCE)
        if g_at is not None:
            g = student_gradient(es, et, eh, apart, k, label, of, HAS_HARD, DIVERGENCE)
            if IS_CAPPED:
                g *= slope(s, cap)
            store(g_at, k, strides[1], is_row & (k < classes), tl.where(lives, g, 0))
    return mass, difference


@triton.jit(
    do_not_specialize=["ignore_index", "rows", "all_classes"],
    do_not_specialize_on_alignment=["grad_output", "in_place", "labels", "statistics", "kept"],
)
def logits_backward(
    grad_output,
    in_place,  # or None
    student,
    teacher,
    to_student,  # or None
    to_teacher,  # or None
    to_temperatures,  # of one kind after another, or None
    labels,  # one a row, or None
    temperatures,  # of rows, a number of the teacher's, or nothing
    statistics,
    kept,  # the number by which the gradients are divided, or None
    all_classes,  # where these are a shard of them, or None
    beta: tl.float64,  # of a divergence of mixtures
    softcap: tl.float64,  # of the student's logits, and of the teacher's
    teacher_softcap: tl.float64,
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
    IS_CAPPED: tl.constexpr,
    TEACHER_IS_CAPPED: tl.constexpr,
):
    """Gradients of a tile of rows, a block at a time.

    Where `in_place` is 1 those of students are there already.
    """
    if in_place is not None and tl.load(in_place) == 1:
        return
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    label, counts, is_class = look_up(labels, row, is_row, ignore_index, classes, all_classes)
    rates, soft, _ = temperatures_of(rate, soft, temperatures, row, counts, COMPUTE)
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
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
    unit = rates[0] * SCALE
    # Of a divergence of probabilities statistics have Σψ in the place of the divergence.
    shares = tl.full([1, 1], beta, COMPUTE), tl.full([1, 1], 1 - beta, COMPUTE)
    found = kl / SCALE if DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl" else kl
    smoothed = classes if all_classes is None else all_classes
    of = factors(
        *(soft, hard, by, smoothing, smoothed, is_class, s_sum, t_sum, hard_sum, found),
        *(unit, shares, HAS_HARD, DIVERGENCE),
    )
    # The sums that the temperatures' gradients take.
    by_student = tl.zeros([ROWS, CLASSES], COMPUTE)
    by_teacher = by_student
    for first in range(0, classes, CLASSES):
        k = first + column
        mask = is_row & (k < classes)
        s = load(s_at, k, class_strides[0], lives & mask, COMPUTE)
        et, y, excluded = target(
            *(t_ats, k, class_strides, lives & mask, (t_max,), (), rates, None, DIVERGENCE)
        )
        x, es, eh = exponentials(s, s_max, rates[0], HAS_HARD)
        apart = between(et, y, x, rates, None, DIVERGENCE)
        if to_student is not None:
            g = student_gradient(es, et, eh, apart, k, label, of, HAS_HARD, DIVERGENCE)
            if IS_CAPPED:
                g *= slope(s, tl.full([1, 1], softcap, COMPUTE))
            g_at = to_student + locate(inner, outer, sizes, row_strides[1], UNIT)
            store(g_at, k, class_strides[1], mask, tl.where(lives, g, 0))
        if to_temperatures is not None:
            g = es * of[0] + divergence.with_teacher(es, et, apart, of[1], DIVERGENCE)
            by_student += product(g, x)
        if to_teacher is not None or to_temperatures is not None:
            surplus = (apart * unit + tl.log2(s_sum / t_sum) * SCALE) * LN_2 - kl
            weight = soft * by if rates[2] is None else soft * by * rates[2]
            g = divergence.to_teacher(
                *(es, et, weight / s_sum, weight / t_sum, surplus, excluded, DIVERGENCE)
            )
            if to_temperatures is not None:
                by_teacher += product(g, y)
            if to_teacher is not None:
                g_at = to_teacher + locate(inner, outer, sizes, row_strides[3], UNIT)
                if TEACHER_IS_CAPPED:
                    t = load(t_ats[0], k, class_strides[2], lives & mask, COMPUTE)
                    g *= slope(t, tl.full([1, 1], teacher_softcap, COMPUTE))
                g = tl.where((soft == 0) | ~lives, 0, g)
                store(g_at, k, class_strides[3], mask, g)
    if to_temperatures is not None:
        store_gradients(
            *(to_temperatures, rows, row, is_row, lives, temperatures, soft * by),
            *(tl.sum(by_student, 1, keep_dims=True), tl.sum(by_teacher, 1, keep_dims=True), kl),
        )
