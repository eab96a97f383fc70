"""Soft targets and hard labels: the softmaxes of both sides, the loss and the gradient in one pass.

Rows that fit are held in registers, several to a program where they are short: each logit is read
once, and of several teachers only their mean is kept. Longer rows are read in blocks, with sums
that are rescaled as a maximum grows, and once more for the gradient. Several teachers have no mean
of a class before their sums are known: of these the second time finds the divergence, too.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton import divergence
from fastkd.kernels.triton.divergence import INFINITY, SCALE
from fastkd.kernels.triton.reduction import (
    BY_ROWS,
    arguments,
    constants,
    count_kept,
    mean_of_teachers,
    reduce,
    tile_of,
)
from fastkd.kernels.triton.rows import locate, look_up, store, tile_of_rows, upstream_of
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.soft_target_gradient import (
    factors,
    last_pass,
    logits_backward,
    student_gradient,
)
from fastkd.kernels.triton.soft_target_rows import (
    cross_entropy,
    divergence_of_rows,
    first_pass,
    store_losses,
    store_statistics,
    terms_in_blocks,
    terms_of_rows,
)
from fastkd.kernels.triton.softcap import slope
from fastkd.kernels.triton.softmax import between, exponentials, locate_all, mean_of, shift, whole
from fastkd.kernels.triton.stated import mass_and_sum, with_mass
from fastkd.kernels.triton.temperatures import operand, temperatures_of
from fastkd.kernels.triton.tiles import launch
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=[
        *("labels", "losses", "parts", "statistics", "sums", "kept", "grad_output"),
        "in_place",
    ],
)
def logits_forward(
    student,
    teachers,
    gradient,  # or None
    labels,  # one a row, or None
    temperatures,  # of rows, a number of the teacher's, or nothing
    losses,  # one a row, or None
    parts,  # of these, or None
    statistics,  # of rows with one teacher, or None
    sums,  # of cross-entropies, divergences and rows that count, one a program each; or None
    kept,  # the number by which the gradient is divided, or None
    grad_output,  # or None
    in_place,  # or None
    mean,  # of several teachers: weights, a power of 2 and its inverse; or None
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    t2: tl.float64,
    beta: tl.float64,  # of a divergence of mixtures
    softcap: tl.float64,  # of the student's logits
    ignore_index,
    rate: tl.float64,  # log₂(e) / T, of scaled logits
    soft: tl.float64,  # the factor of the divergence's gradient
    hard: tl.float64,  # the factor of q at temperature 1 less the target
    smoothing: tl.float64,
    rows,
    units,  # of classes
    sizes,
    row_strides,  # in units: of student, gradient, teachers
    class_strides,
    upstream_strides,
    COMPUTE: tl.constexpr,
    HAS_HARD: tl.constexpr,  # whether temperature 1 takes exponentials of its own
    DIVERGENCE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    AT_ONCE: tl.constexpr,  # whether the last pass finds the divergence along with the gradient
    NORMALIZES: tl.constexpr,  # whether the divergence is one of probabilities
    TEACHER_IS: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Loss, statistics and gradient of a tile of rows.

    Where `in_place` is 1 the gradient is there already.
    """
    if in_place is not None and tl.load(in_place) == 1:
        return
    SEVERAL: tl.constexpr = len(teachers) > 1
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    labelled = look_up(labels, row, is_row, ignore_index, classes)
    label, counts, is_class = labelled
    rates, soft, root = temperatures_of(rate, soft, temperatures, row, counts, COMPUTE)
    if SEVERAL:
        mean = mean_of(mean, rates[0], root)
    # Makes log₂(p / q), scaled, of what is between the sides.
    unit = mean[2] if SEVERAL else rates[0] * SCALE
    lives = counts & ((soft != 0) | (hard != 0))
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_ats = locate_all(teachers, inner, outer, sizes, row_strides, UNIT)
    if labels is not None:
        # Before the barriers of the sums, behind which the gradient may take the logits' place.
        at = s_at + label.to(tl.int64) * class_strides[0]
        logit = tl.load(at, mask=counts & is_class, other=float("nan")).to(COMPUTE)
    if WHOLE:
        s, s_max, t_max, et, y, t_excluded = whole(
            *(s_at, t_ats, column, class_strides, counts & (column < classes), mean, rates),
            *(DIVERGENCE, TEACHER_IS),
        )
        pivot = shift(s_max)
        x, es, eh = exponentials(s, s_max, rates[0], HAS_HARD)
        apart = between(et, y, x, rates, mean, DIVERGENCE)
        difference = divergence.terms(es, et, apart, s == -INFINITY, t_excluded, DIVERGENCE)
        s_sum, t_sum, hard_sum, pivoted = es, et, eh, tl.where(column < classes, x, 0)
    else:
        pivot, s_max, s_sum, hard_sum, pivoted, t_max, weights, t_sum, difference = first_pass(
            *(s_at, t_ats, class_strides, counts, column, classes, mean, rates),
            *(HAS_HARD, SMOOTHS, AT_ONCE, NORMALIZES, DIVERGENCE, TEACHER_IS),
        )
    s_sum = tl.sum(s_sum, 1, keep_dims=True)
    hard_sum = tl.sum(hard_sum, 1, keep_dims=True) if HAS_HARD else s_sum
    outputs = losses, parts, sums, rows, row, is_row, counts, root
    kl, ce = tl.zeros_like(s_sum), tl.zeros_like(s_sum)
    shares = tl.full([1, 1], beta, COMPUTE), tl.full([1, 1], 1 - beta, COMPUTE)
    one = tl.full([1, 1], 1, COMPUTE)  # the sum of the probabilities of several teachers
    outcome = kl  # what the gradient takes: the loss, or Σψ of a divergence of probabilities
    if NORMALIZES:
        t_sum = one if SEVERAL else tl.sum(t_sum, 1, keep_dims=True)
        mass, t_sum = mass_and_sum(t_max, t_sum, TEACHER_IS)
        if WHOLE:
            kl, outcome = terms_of_rows(es, et, s_sum, t_sum, mass, shares, counts, DIVERGENCE)
        else:
            kl, outcome = terms_in_blocks(
                *(s_at, t_ats, class_strides, counts, column, classes, s_max, t_max),
                *(weights, s_sum, t_sum, mass, rates, shares, DIVERGENCE, TEACHER_IS),
            )
    elif not AT_ONCE:
        t_sum = one if SEVERAL and DIVERGENCE == "reverse_kl" else tl.sum(t_sum, 1, keep_dims=True)
        kl = divergence_of_rows(difference, s_sum, t_sum, unit, counts, DIVERGENCE)
        outcome = kl / SCALE
        if TEACHER_IS != "logits":
            kl, soft = with_mass(kl, soft, t_max[0], t_sum, counts, DIVERGENCE)
    if labels is not None:
        ce = cross_entropy(
            logit, labelled, s_max, hard_sum, pivot, pivoted, classes, smoothing, SMOOTHS
        )
    if not AT_ONCE:
        store_losses(*outputs, kl, ce, soft_weight, hard_weight, t2)
    if statistics is not None:
        found = s_max, s_sum, t_max[0], t_sum, hard_sum, kl, ce
        store_statistics(statistics, row, is_row, counts, found)
    if gradient is not None:
        by = tl.full((), 1, COMPUTE)
        if kept is not None:
            by /= tl.maximum(tl.load(kept), 1)
        if grad_output is not None:
            at = grad_output + locate(inner, outer, sizes, upstream_strides, 1)
            by *= tl.load(at, mask=lives, other=0).to(COMPUTE)
        t_sum = one if SEVERAL else t_sum
        of = factors(
            *(soft, hard, by, smoothing, classes, is_class, s_sum, t_sum, hard_sum, outcome),
            *(unit, shares, HAS_HARD, DIVERGENCE),
        )
        g_at = gradient + locate(inner, outer, sizes, row_strides[1], UNIT)
        cap = tl.full([1, 1], softcap, COMPUTE)
        if WHOLE:
            g = student_gradient(es, et, eh, apart, column, label, of, HAS_HARD, DIVERGENCE)
            if IS_CAPPED:
                g *= slope(s, cap)
            mask = is_row & (column < classes)
            store(g_at, column, class_strides[1], mask, tl.where(lives, g, 0))
        else:
            seen = counts if SEVERAL else lives
            t_sum, difference = last_pass(
                *(s_at, t_ats, class_strides, seen, column, classes, s_max, t_max),
                *(weights, rates, mean, g_at, label, is_row, lives, of, cap),
                *(IS_CAPPED, HAS_HARD, DIVERGENCE, TEACHER_IS),
            )
    if AT_ONCE:
        t_sum = tl.sum(t_sum, 1, keep_dims=True)
        kl = divergence_of_rows(difference, s_sum, t_sum, unit, counts, DIVERGENCE)
        store_losses(*outputs, kl, ce, soft_weight, hard_weight, t2)


def soft_target_forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    statistics: Tensor | None,
    gradient: Tensor | None,
    p: SoftTarget,
    grad_output: Tensor | None = None,
    in_place: Tensor | None = None,
    temperatures: Sequence[Tensor] = (),
) -> None:
    """Fill those that are wanted of the loss, its parts, the statistics and the gradient.

    There are statistics of one teacher alone. The gradient is that for `grad_output`, one number or
    one a row. Where the number `in_place` is 1 it is there already, and nothing is read or written.
    """
    dtype = compute_dtype(student, *teachers) if loss is None else loss.dtype
    logits = student, student if gradient is None else gradient, *teachers
    strides, upstream = tuple([x.stride() for x in logits]), upstream_of(grad_output, student)
    plan = plan_rows(student.shape, strides, upstream, p.dim, dtype)
    labels = labels if labels is None else labels.contiguous()
    by_row = p.reduction == "none"
    sums = kept = None
    if loss is not None and not by_row:
        sums = student.new_empty(3 * plan.programs, dtype=torch.float64)
    if labels is not None and gradient is not None and p.reduction in BY_ROWS:
        kept = count_kept(labels, student.new_empty(1, dtype=dtype), p.ignore_index)
    ignore_index, rate, *others = arguments(plan, labels, p)
    of_rows = (loss, parts) if by_row else (None, None)
    whole = student.shape[p.dim] <= tile_of(plan, dtype, p)["CLASSES"]
    in_blocks = len(teachers) > 1 and not whole
    launch(
        logits_forward,
        plan.programs,
        student,
        *(student, tuple(teachers), gradient, labels, operand(temperatures, p)),
        *(*of_rows, statistics, sums, kept),
        *(grad_output, in_place, mean_of_teachers(p.weights, rate)),
        *(p.soft_weight, p.hard_weight, p.temperature * p.temperature, p.beta, p.softcap),
        *(ignore_index, rate, *others),
        () if grad_output is None else plan.upstream_strides,
        SMOOTHS=p.label_smoothing > 0,
        WHOLE=whole,
        NORMALIZES=p.divergence in divergence.OF_PROBABILITIES,
        TEACHER_IS=p.teacher_is,
        IS_CAPPED=p.softcap != 0,
        AT_ONCE=in_blocks and gradient is not None and not divergence.needs_loss(p.divergence),
        **constants(plan, labels, temperatures, dtype, p),
    )
    if sums is not None and loss is not None:
        reduce(plan, sums, loss, parts, None if statistics is None else statistics[-1:], p)


def soft_target_backward(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    p: SoftTarget,
    in_place: Tensor | None = None,
    temperatures: Sequence[Tensor] = (),
    to_temperatures: Tensor | None = None,
) -> None:
    """Fill the gradients that are wanted, for one teacher from the statistics.

    Where the number `in_place` is 1 the student's is there already, and nothing is read or written.
    """
    if statistics is None:
        outputs = None, None, None, to_student
        return soft_target_forward(
            student, teachers, labels, *outputs, p, grad_output, in_place, temperatures
        )
    (teacher,) = teachers
    to = [
        student if to_student is None else to_student,
        teacher if to_teacher is None else to_teacher,
    ]
    strides = student.stride(), to[0].stride(), teacher.stride(), to[1].stride()
    plan = plan_rows(
        student.shape, strides, upstream_of(grad_output, student), p.dim, statistics.dtype
    )
    labels = labels if labels is None else labels.contiguous()
    kept = statistics[-1:] if labels is not None and p.reduction in BY_ROWS else None
    launch(
        logits_backward,
        plan.programs,
        student,
        *(grad_output, in_place, student, teacher, to_student, to_teacher, to_temperatures),
        *(labels, operand(temperatures, p), statistics, kept, p.all_classes or None, p.beta),
        *(p.softcap, p.teacher_softcap),
        *arguments(plan, labels, p),
        plan.upstream_strides,
        IS_CAPPED=p.softcap != 0,
        TEACHER_IS_CAPPED=p.teacher_softcap != 0,
        **constants(plan, labels, temperatures, statistics.dtype, p),
    )
