"""The softmaxes of rows of logits, and what gradients are made of."""

import math

import triton
import triton.language as tl

from fastkd.kernels.triton.rows import load

LN_2 = tl.constexpr(math.log(2))
INFINITY = tl.constexpr(math.inf)

# Logits are multiplied by this where their maximum is subtracted, as in csrc/soft_target.h: any two
# finite ones then have a finite difference, and differences have finite sums. So are the divergence
# and the cross-entropy of a row. A power of 2 rounds nothing.
LOGIT_SCALE = 2.0**-24
SCALE = tl.constexpr(LOGIT_SCALE)
SHARP_RATE = tl.constexpr(1 / math.log(2) / LOGIT_SCALE)  # of exponentials at temperature 1


@triton.jit
def shift(maximum):
    """What to subtract, scaled: where every class is excluded, 0 leaves exp(-inf) = 0."""
    return tl.where(maximum == -INFINITY, 0, maximum * SCALE)


@triton.jit
def exponentials(s, t, s_max, t_max, rate, SHARP: tl.constexpr):
    """Both sides relative to their maxima, scaled; their exponentials at T, the student's at 1."""
    x = s * SCALE - shift(s_max)
    y = t * SCALE - shift(t_max)
    es = tl.exp2(x * rate)
    eh = es
    if SHARP:
        eh = tl.exp2(x * SHARP_RATE)
    return x, y, es, tl.exp2(y * rate), eh


@triton.jit
def differences(s, t, x, y, et):
    """The terms of the divergence.

    A class that the teacher excludes contributes 0, and one that only the student excludes is
    infinite, also where its exponential is 0: 0 · inf would be NaN.
    """
    return tl.where(t == -INFINITY, 0, tl.where(s == -INFINITY, INFINITY, et * (y - x)))


@triton.jit
def whole(s, t, column, classes, rate, SHARP: tl.constexpr):
    """Maxima, sums and exponentials of rows that are here as a whole.

    The pivot, near the student's logits, is what is subtracted from them before they are added up.
    It is scaled, as those are.
    """
    s_max = tl.max(s, 1, keep_dims=True)
    t_max = tl.max(t, 1, keep_dims=True)
    x, y, es, et, eh = exponentials(s, t, s_max, t_max, rate, SHARP)
    difference = differences(s, t, x, y, et)
    return s_max, t_max, shift(s_max), es, et, eh, difference, tl.where(column < classes, x, 0)


@triton.jit
def in_blocks(
    s_at,
    t_at,
    strides,
    counts,
    column,
    classes,
    rate,
    COMPUTE: tl.constexpr,
    SHARP: tl.constexpr,
    SMOOTHS: tl.constexpr,
):
    """Maxima and sums of rows of any length, the sums still in as many parts as a block has."""
    pivot = shift(tl.load(s_at, mask=counts, other=0).to(COMPUTE))
    s_max = tl.full(s_at.shape, -INFINITY, COMPUTE)
    t_max = s_max
    s_sum = tl.zeros([s_at.shape[0], column.shape[1]], COMPUTE)
    t_sum, hard_sum, difference, pivoted = s_sum, s_sum, s_sum, s_sum
    for first in range(0, classes, column.shape[1]):
        k = first + column
        s = load(s_at, k, strides[0], counts & (k < classes), COMPUTE)
        t = load(t_at, k, strides[1], counts & (k < classes), COMPUTE)
        s_next = tl.maximum(s_max, tl.max(s, 1, keep_dims=True))
        t_next = tl.maximum(t_max, tl.max(t, 1, keep_dims=True))
        x, y, es, et, eh = exponentials(s, t, s_next, t_next, rate, SHARP)
        s_fading = s_max * SCALE - shift(s_next)
        s_sum = s_sum * tl.exp2(s_fading * rate) + es
        if SHARP:
            hard_sum = hard_sum * tl.exp2(s_fading * SHARP_RATE) + eh
        # Differences are relative to the maxima, and move with them. An infinite one stays so,
        # whatever becomes of its class's mass.
        fading = tl.exp2((t_max * SCALE - shift(t_next)) * rate)
        by = (shift(t_max) - shift(t_next)) - (shift(s_max) - shift(s_next))
        t_sum *= fading
        moved = tl.where(difference == INFINITY, INFINITY, difference * fading + t_sum * by)
        difference = moved + differences(s, t, x, y, et)
        t_sum += et
        if SMOOTHS:
            pivoted += tl.where(k < classes, s * SCALE - pivot, 0)
        s_max, t_max = s_next, t_next
    if not SHARP:
        hard_sum = s_sum
    return s_max, t_max, pivot, s_sum, t_sum, hard_sum, difference, pivoted


@triton.jit
def factors(soft, hard, smoothing, classes, s_sum, t_sum, hard_sum, is_class, SHARP: tl.constexpr):
    """Of what a student's gradient is made of: es, et, eh, every class and the label's."""
    # A label that is no class leaves nothing right but the divergence's gradient.
    hard = tl.where(is_class | (hard == 0), hard, float("nan"))
    of_student = soft / s_sum
    of_hard = hard / hard_sum
    if not SHARP:
        of_student += of_hard
    return of_student, soft / t_sum, of_hard, hard * smoothing / classes, hard * (1 - smoothing)


@triton.jit
def student_gradient(es, et, eh, column, label, factors, softens, SHARP: tl.constexpr):
    """Of the student's logits; where the soft term is off nothing shows that the teacher holds."""
    gradient = es * factors[0] - tl.where(softens, et * factors[1], 0)
    if SHARP:
        gradient += eh * factors[2]
    return gradient - factors[3] - tl.where(column == label, factors[4], 0)


@triton.jit
def weighted(term, weight):
    """A weight of 0 switches its term off, also where the term is infinite or NaN."""
    return tl.where(weight == 0, 0, weight * term)
