"""Teachers that kept k classes of each row: loss and gradient from one read of the student.

A slot is one of the k. Rows that fit are held in registers, longer ones are read in blocks, and
once more for the gradient. Slots are read one by one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import INFINITY, LN_2, SCALE
from fastkd.kernels.triton.reduction import BY_ROWS, arguments, constants, count_kept, reduce
from fastkd.kernels.triton.rows import (
    SEVERAL,
    load,
    locate,
    look_up,
    store,
    tile_of_rows,
    upstream_of,
)
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.soft_target_rows import cross_entropy, store_losses
from fastkd.kernels.triton.softcap import slope
from fastkd.kernels.triton.softmax import HARD_RATE, shift
from fastkd.kernels.triton.temperatures import temperatures_of
from fastkd.kernels.triton.tiles import launch, power_of_2
from fastkd.kernels.triton.top_k_rows import factors_of_classes, first_pass, with_rest
from fastkd.kernels.triton.top_k_slots import (
    gradients_of_slots,
    rest_of,
    slot_terms,
    sums_of_slots,
    terms_of_slots,
)
from fastkd.parameters import SoftTarget

# Of slots in a block on the average: looking at one more costs each thread of a program some
# instructions for each of its classes, and bisection takes as many as some 20 slots.
_MOST_IN_TURN = 20


@triton.jit(
    do_not_specialize=["ignore_index", "rows", "slots"],
    do_not_specialize_on_alignment=[
        *("indices", "log_p", "log_rest", "log_q", "labels", "losses", "parts", "sums", "kept"),
        "grad_output",
    ],
)
def top_k(
    student,
    gradient,  # or None
    indices,  # of slots' classes, ascending in each row; those of padding are negative
    log_p,  # of slots
    log_rest,  # of all other classes together, one a row, or None
    log_q,  # of slots and, last, of all other classes
    labels,  # one a row, or None
    temperatures,  # of rows, or nothing
    losses,  # one a row, or None
    parts,  # of these, or None
    sums,  # of cross-entropies, divergences and rows that count, one a program each; or None
    kept,  # the number by which the gradient is divided, or None
    grad_output,  # or None
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    t2: tl.float64,
    beta: tl.float64,  # of a divergence of mixtures
    softcap: tl.float64,  # of the student's logits
    slots,  # of a row
    ignore_index,
    rate: tl.float64,  # log₂(e) / T, of scaled logits
    soft: tl.float64,  # the factor of the divergence's gradient
    hard: tl.float64,  # the factor of q at temperature 1 less the target
    smoothing: tl.float64,
    rows,
    units,  # of classes
    sizes,
    row_strides,  # in units: of student, gradient
    class_strides,
    upstream_strides,
    COMPUTE: tl.constexpr,
    HAS_CLASSES: tl.constexpr,  # whether labels are classes
    HAS_HARD: tl.constexpr,  # whether temperature 1 takes exponentials of its own
    DIVERGENCE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    LISTED_ONLY: tl.constexpr,  # whether the student's softmax is one of the slots, too
    ARE_MANY: tl.constexpr,  # whether the slots of a block are
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Loss, log q and gradient of a tile of rows."""
    READS: tl.constexpr = HAS_CLASSES or not LISTED_ONLY
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    hard, smoothing = tl.full([1, 1], hard, COMPUTE), tl.full([1, 1], smoothing, COMPUTE)
    labelled = look_up(labels, row, is_row, ignore_index, classes)
    label, counts, is_class = labelled
    rates, soft, root = temperatures_of(rate, soft, temperatures, row, counts, COMPUTE)
    rate = rates[0]
    lives = counts & ((soft != 0) | (hard != 0))
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    stride = class_strides[0]
    of_row = row.to(tl.int64)
    slots_at, log_p_at = indices + of_row * slots, log_p + of_row * slots
    log_q_at = log_q + of_row * (slots + 1)
    shares = tl.full([1, 1], beta, COMPUTE), tl.full([1, 1], 1 - beta, COMPUTE)
    if HAS_CLASSES:
        # Before the barrier behind which the gradient may take the logits' place.
        at = s_at + label.to(tl.int64) * stride
        logit = tl.load(at, mask=counts & is_class, other=float("nan")).to(COMPUTE)

    every = sums_of_slots(
        *(slots_at, s_at, stride, slots, counts, classes, rate, HAS_HARD, LISTED_ONLY, SLOTS)
    )
    softmax, rest, to_rest, hard_to_rest = every, every, every[1], every[1]
    held = ()
    if READS:
        if WHOLE:
            held = (load(s_at, column, stride, counts & (column < classes), COMPUTE),)  # type: ignore[assignment]
        pivot = shift(tl.load(s_at, mask=counts, other=0).to(COMPUTE))
        rest, pivoted = first_pass(
            *(held, s_at, stride, counts, column, classes, pivot, slots_at, slots, rate),
            *(HAS_HARD, SMOOTHS, LISTED_ONLY, ARE_MANY),
        )
        if LISTED_ONLY:
            every = rest
        else:
            every, to_rest, hard_to_rest = with_rest(every, rest, rate, HAS_HARD)
            softmax = every
    softmax = softmax[0], tl.log2(softmax[1]) * (LN_2 * SCALE), rate * (SCALE * LN_2)
    kl, psi = terms_of_slots(
        *(slots_at, log_p_at, log_q_at, s_at, stride, slots, is_row, counts, classes),
        *(softmax, shares, DIVERGENCE, SLOTS),
    )
    log_q_rest, psi_rest = tl.zeros_like(kl) - INFINITY, tl.zeros_like(kl)
    if not LISTED_ONLY:
        log_q_rest = rest_of(rest, softmax)
    if log_rest is not None:
        of_teacher = tl.load(log_rest + of_row, mask=counts, other=-INFINITY) * SCALE
        phi, psi_rest = slot_terms(of_teacher, log_q_rest, shares, DIVERGENCE)
        kl += phi
        psi += psi_rest
    tl.store(log_q_at + slots, tl.where(counts, log_q_rest / SCALE, -INFINITY), mask=is_row)
    kl, ce = tl.where(counts, kl, 0), tl.zeros_like(kl)
    if HAS_CLASSES:
        ce = cross_entropy(
            logit, labelled, every[0], every[2], pivot, pivoted, classes, smoothing, SMOOTHS
        )
    store_losses(
        *(losses, parts, sums, rows, row, is_row, counts, root, kl, ce),
        *(soft_weight, hard_weight, t2),
    )
    if gradient is not None:
        by = tl.full([1, 1], 1, COMPUTE)
        if kept is not None:
            by /= tl.maximum(tl.load(kept), 1)
        if grad_output is not None:
            at = grad_output + locate(inner, outer, sizes, upstream_strides, 1)
            by *= tl.load(at, mask=lives, other=0).to(COMPUTE)
        soft, hard = soft * by, hard * by
        # A label that is no class leaves nothing right.
        hard = tl.where(is_class | (hard == 0), hard, float("nan"))
        of_class = hard * smoothing / classes
        moves = to_rest, hard_to_rest, psi_rest
        of_listed, of_rest = factors_of_classes(
            every, rest, moves, soft, hard, psi, HAS_HARD, LISTED_ONLY
        )
        g_at = gradient + locate(inner, outer, sizes, row_strides[1], UNIT)
        cursor = tl.zeros(s_at.shape, tl.int32)
        # A class that does not exist makes its row NaN. The last slot has the largest.
        largest = tl.load(slots_at + slots - 1, mask=lives, other=0)
        nothing = tl.where((largest >= classes) & (soft != 0), float("nan"), 0)
        # All threads have read the slots' logits, and see what was written of log q.
        tl.debug_barrier()
        for first in range(0, classes, CLASSES):
            k = first + column
            listed, g, cursor = gradients_of_slots(
                *(k, tl.minimum(first + CLASSES, classes), cursor, slots_at, log_p_at, log_q_at),
                *(slots, lives, soft, psi, shares, DIVERGENCE, LISTED_ONLY, ARE_MANY),
            )
            g += nothing
            if READS or IS_CAPPED:
                if len(held) == 0:
                    s = load(s_at, k, stride, lives & (k < classes), COMPUTE)
                else:
                    s = held[0]
            if READS:
                x = s * SCALE - tl.where(listed, of_listed[0], of_rest[0])
                g += tl.exp2(x * rate) * tl.where(listed, of_listed[1], of_rest[1]) - of_class
                if HAS_HARD:
                    g += tl.exp2(x * HARD_RATE) * tl.where(listed, of_listed[2], of_rest[2])
            if HAS_CLASSES:
                g -= tl.where(k == label, hard * (1 - smoothing), 0)
            if IS_CAPPED:
                g *= slope(s, tl.full([1, 1], softcap, COMPUTE))
            store(g_at, k, class_strides[1], is_row & (k < classes), tl.where(lives, g, 0))


def top_k_forward(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    log_q: Tensor | None,
    gradient: Tensor | None,
    listed_only: bool,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    grad_output: Tensor | None = None,
) -> None:
    """Fill those that are wanted of the loss, its parts, log q of slots and rest, and the gradient.

    The gradient is that for `grad_output`, one number or one a row; it may be the student itself.
    """
    dtype = log_p.dtype
    strides = student.stride(), (student if gradient is None else gradient).stride()
    upstream = upstream_of(grad_output, student)
    plan = plan_rows(student.shape, strides, upstream, p.dim, dtype)
    labels = labels if labels is None else labels.contiguous()
    by_row = p.reduction == "none"
    sums = kept = None
    if loss is not None and not by_row:
        sums = student.new_empty(3 * plan.programs, dtype=torch.float64)
    if labels is not None and gradient is not None and p.reduction in BY_ROWS:
        kept = count_kept(labels, student.new_empty(1, dtype=dtype), p.ignore_index)
    slots = indices.shape[1]
    if log_q is None:  # through which the threads of a program tell one another of slots
        log_q = log_p.new_empty(len(log_p), slots + 1)
    of_rows = (loss, parts) if by_row else (None, None)
    most = SEVERAL * 4 // dtype.itemsize // plan.tile["ROWS"]
    has_classes = labels is not None and p.labels_are_classes
    has_classes = has_classes and (p.hard_weight != 0 or parts is not None)
    known = constants(plan, labels, temperatures, dtype, p)
    launch(
        top_k,
        plan.programs,
        student,
        *(student, gradient, indices, log_p, log_rest, log_q, labels, tuple(temperatures)),
        *(*of_rows, sums, kept, grad_output),
        *(p.soft_weight, p.hard_weight, p.temperature * p.temperature, p.beta, p.softcap, slots),
        *arguments(plan, labels, p),
        () if grad_output is None else plan.upstream_strides,
        HAS_CLASSES=has_classes,
        SMOOTHS=p.label_smoothing > 0,
        LISTED_ONLY=listed_only,
        ARE_MANY=slots * known["CLASSES"] > _MOST_IN_TURN * student.shape[p.dim],
        WHOLE=student.shape[p.dim] <= known["CLASSES"],
        SLOTS=max(min(power_of_2(slots), most), 1),
        IS_CAPPED=p.softcap != 0,
        **{**known, "HAS_HARD": known["HAS_HARD"] and has_classes},
    )
    if sums is not None and loss is not None:
        reduce(plan, sums, loss, parts, None, p)
