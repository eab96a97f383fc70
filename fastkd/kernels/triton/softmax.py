"""The softmaxes of rows of logits: maxima, and sums of exponentials relative to them.

The target is one teacher's softmax or the mean of several. A class of it has, of one teacher, the
exponential and the logit, relative to the maximum; of several, the probability twice, or its
logarithm twice where that counts however small the probability is.
"""

import math

import torch
import triton
import triton.language as tl

from fastkd.kernels.triton import divergence
from fastkd.kernels.triton.divergence import INFINITY, LOGIT_SCALE, SCALE
from fastkd.kernels.triton.rows import load, locate
from fastkd.kernels.triton.stated import load_teacher
from fastkd.kernels.triton.temperatures import at_student

HARD_RATE = tl.constexpr(1 / math.log(2) / LOGIT_SCALE)  # of exponentials at temperature 1

# What a probability that underflows is taken for, so that 0 means that every teacher excludes it.
_LEAST_32 = tl.constexpr(2.0**-126)
_LEAST_64 = tl.constexpr(2.0**-1022)
# More than as many of these as there can be teachers: what is below has underflowed.
_MOST_OF_LEAST = tl.constexpr(128)
_MOST_32, _MOST_64 = (tl.constexpr(torch.finfo(x).max) for x in (torch.float32, torch.float64))


@triton.jit
def shift(maximum):
    """What to subtract, scaled: where every class is excluded, 0 leaves exp(-inf) = 0."""
    return tl.where(maximum == -INFINITY, 0, maximum * SCALE)


@triton.jit
def exponentials(logits, maximum, rate, HAS_HARD: tl.constexpr = False):
    """Logits relative to their maximum, scaled; their exponentials at T, and at 1."""
    x = logits * SCALE - shift(maximum)
    e = tl.exp2(x * rate)
    eh = e
    if HAS_HARD:
        eh = tl.exp2(x * HARD_RATE)
    return x, e, eh


@triton.jit
def locate_all(teachers, inner, outer, sizes, strides, UNIT: tl.constexpr):
    """Where rows start in each teacher."""
    ats = ()
    for m in tl.static_range(len(teachers)):
        at = teachers[m] + locate(inner, outer, sizes, strides[2 + m], UNIT)
        ats = ats + (at,)  # type: ignore[assignment]  # noqa: RUF005
    return ats


@triton.jit
def mean_of(mean, rate, root):
    """The mean of several teachers, with its power and the inverse of rows."""
    if root is None:
        power = tl.full([1, 1], mean[1], rate.dtype)
        return (mean[0], power, tl.full([1, 1], mean[2], rate.dtype))
    else:
        power = tl.exp2(-tl.maximum(tl.ceil(tl.log2(rate * SCALE)), 0))
        return (mean[0], power, 1 / power)


@triton.jit
def share_of(weight, total):
    """What an exponential of a teacher is multiplied by for its share in the mean."""
    high, low = tl.full([1, 1], weight[0], total.dtype), tl.full([1, 1], weight[1], total.dtype)
    return (high + low) / total


@triton.jit
def share(t, t_max, by, rate):
    """A teacher's share in the mean."""
    least = _LEAST_64 if t.dtype == tl.float64 else _LEAST_32
    p = exponentials(t, t_max, rate)[1] * by
    return tl.where((t != -INFINITY) & (p < least), least, p)


@triton.jit
def add_logarithm(highest, total, t, t_max, by, rates, mean):
    """A sum of shares as `highest + log₂(total)`, times the mean's power, with a teacher's.

    Each is finite however small the share is, which a sum of probabilities would not have.
    """
    power = mean[1] * SCALE
    y = at_student(exponentials(t, t_max, rates[1])[0], rates[2])
    y = y * (rates[0] * power) + tl.log2(by) * power
    higher = y - highest
    e = tl.exp2(-tl.abs(higher) * mean[2] / SCALE)
    total = tl.where(higher > 0, total * e + 1, total + e)
    return tl.where(higher > 0, y, highest), total


@triton.jit
def logarithm(highest, total, mean):
    """Of that sum, times the power, twice; and whether there is nothing in it."""
    y = highest + tl.log2(total) * (mean[1] * SCALE)
    return y, y, total == 0


@triton.jit
def nothing_yet(like):
    """The sum of no shares."""
    least = -_MOST_64 if like.dtype == tl.float64 else -_MOST_32
    return tl.full(like.shape, least, like.dtype), tl.zeros_like(like)


@triton.jit
def between(et, y, x, rates, mean, DIVERGENCE: tl.constexpr):
    """What is between the sides of a class; of several teachers log₂(p / q), times their power.

    Where their mean underflows it is the same whatever the student has there, unless the student
    excludes the class.
    """
    if mean is None:
        return at_student(y, rates[2]) - x
    elif DIVERGENCE == "reverse_kl":
        return y - x * (rates[0] * (mean[1] * SCALE))
    else:
        least = _LEAST_64 if et.dtype == tl.float64 else _LEAST_32
        x = tl.where((et < _MOST_OF_LEAST * least) & (x > -INFINITY), 0, x)
        power = mean[1] * SCALE
        return tl.log2(y) * power - x * (rates[0] * power)


@triton.jit
def target(
    t_ats,
    k,
    strides,
    mask,
    maxima,
    shares,
    rates,
    mean,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr = "logits",
):
    """A block of classes of the target, and which of them are excluded."""
    rate = rates[1]
    if len(t_ats) == 1:
        t = load_teacher(t_ats[0], k, strides[2], mask, rate.dtype, TEACHER_IS)
        y, et, _ = exponentials(t, maxima[0], rate)
        return et, y, t == -INFINITY
    elif DIVERGENCE == "reverse_kl":
        highest, total = nothing_yet(tl.zeros(mask.shape, rate.dtype))
        for m in tl.static_range(len(t_ats)):
            t = load(t_ats[m], k, strides[2 + m], mask, rate.dtype)
            highest, total = add_logarithm(highest, total, t, maxima[m], shares[m], rates, mean)
        return logarithm(highest, total, mean)
    else:
        p = tl.zeros(mask.shape, rate.dtype)
        for m in tl.static_range(len(t_ats)):
            t = load(t_ats[m], k, strides[2 + m], mask, rate.dtype)
            p += share(t, maxima[m], shares[m], rate)
        return p, p, p == 0


@triton.jit
def whole(
    s_at,
    t_ats,
    column,
    strides,
    mask,
    mean,
    rates,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr,
):
    """The student's logits, the maxima, and `target`, of rows that are here as a whole."""
    rate = rates[1]
    if len(t_ats) == 1:
        s = load(s_at, column, strides[0], mask, rate.dtype)
        t = load_teacher(t_ats[0], column, strides[2], mask, rate.dtype, TEACHER_IS)
        s_max, t_max = tl.max(s, 1, keep_dims=True), tl.max(t, 1, keep_dims=True)
        y, et, _ = exponentials(t, t_max, rate)
        return s, s_max, (t_max,), et, y, t == -INFINITY
    else:
        p = tl.zeros(mask.shape, rate.dtype)
        highest, total = nothing_yet(p)
        for m in tl.static_range(len(t_ats)):
            t = load(t_ats[m], column, strides[2 + m], mask, rate.dtype)
            t_max = tl.max(t, 1, keep_dims=True)
            by = tl.sum(exponentials(t, t_max, rate)[1], 1, keep_dims=True)
            by = share_of(mean[0][m], by)
            if DIVERGENCE == "reverse_kl":
                highest, total = add_logarithm(highest, total, t, t_max, by, rates, mean)
            else:
                p += share(t, t_max, by, rate)
        s = load(s_at, column, strides[0], mask, rate.dtype)
        s_max = tl.max(s, 1, keep_dims=True)
        if DIVERGENCE == "reverse_kl":
            et, y, excluded = logarithm(highest, total, mean)
        else:
            et, y, excluded = p, p, p == 0
        return s, s_max, None, et, y, excluded


@triton.jit
def grow(total, hard, logits, maximum, higher, rate, HAS_HARD: tl.constexpr = False):
    """Sums of exponentials, with a block's, relative to a maximum that is no lower.

    Also the block's logits and exponentials, and what brings an exponential to that maximum.
    """
    x, e, eh = exponentials(logits, higher, rate, HAS_HARD)
    fading = maximum * SCALE - shift(higher)
    by = tl.exp2(fading * rate)
    if HAS_HARD:
        hard = hard * tl.exp2(fading * HARD_RATE) + eh
    return total * by + e, hard, x, e, by


@triton.jit
def normalisers(
    at,
    stride,
    counts,
    column,
    classes,
    pivot,
    rate,
    HAS_HARD: tl.constexpr = False,
    SMOOTHS: tl.constexpr = False,
):
    """The maximum of rows of any length, and sums in as many parts as a block has.

    They are of exponentials at T, of those at 1, and of logits less the pivot.
    """
    maximum = tl.full(at.shape, -INFINITY, rate.dtype)
    soft = tl.zeros([at.shape[0], column.shape[1]], rate.dtype)
    hard, pivoted = soft, soft
    for first in range(0, classes, column.shape[1]):
        k = first + column
        x = load(at, k, stride, counts & (k < classes), rate.dtype)
        higher = tl.maximum(maximum, tl.max(x, 1, keep_dims=True))
        soft, hard, _, _, _ = grow(soft, hard, x, maximum, higher, rate, HAS_HARD)
        if SMOOTHS:
            pivoted += tl.where(k < classes, x * SCALE - pivot, 0)
        maximum = higher
    return maximum, soft, hard, pivoted


@triton.jit
def in_blocks(
    s_at,
    t_at,
    strides,
    counts,
    column,
    classes,
    pivot,
    rates,
    HAS_HARD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr,
):
    """The student's normalisers, those of one teacher, and the sums of the divergence's terms."""
    s_rate, t_rate = rates[0], rates[1]
    s_max = tl.full(s_at.shape, -INFINITY, s_rate.dtype)
    t_max = s_max
    s_sum = tl.zeros([s_at.shape[0], column.shape[1]], s_rate.dtype)
    t_sum, hard_sum, difference, pivoted = s_sum, s_sum, s_sum, s_sum
    for first in range(0, classes, column.shape[1]):
        k = first + column
        s = load(s_at, k, strides[0], counts & (k < classes), s_rate.dtype)
        t = load_teacher(t_at, k, strides[2], counts & (k < classes), s_rate.dtype, TEACHER_IS)
        s_next = tl.maximum(s_max, tl.max(s, 1, keep_dims=True))
        t_next = tl.maximum(t_max, tl.max(t, 1, keep_dims=True))
        mass = divergence.weigher(s_sum, t_sum, DIVERGENCE)
        s_sum, hard_sum, x, es, s_by = grow(s_sum, hard_sum, s, s_max, s_next, s_rate, HAS_HARD)
        t_sum, _, y, et, t_by = grow(t_sum, t_sum, t, t_max, t_next, t_rate)
        # Differences are relative to the maxima, and move with them. An infinite one stays so,
        # whatever becomes of its class's mass.
        by = divergence.weigher(s_by, t_by, DIVERGENCE)
        mass *= by
        t_apart = at_student(shift(t_max) - shift(t_next), rates[2])
        apart = t_apart - (shift(s_max) - shift(s_next))
        moved = difference * by + divergence.term(mass, mass, apart, DIVERGENCE)
        difference = tl.where(tl.abs(difference) == INFINITY, difference, moved)
        excluded = s == -INFINITY, t == -INFINITY
        difference += divergence.terms(es, et, at_student(y, rates[2]) - x, *excluded, DIVERGENCE)
        if SMOOTHS:
            pivoted += tl.where(k < classes, s * SCALE - pivot, 0)
        s_max, t_max = s_next, t_next
    return s_max, s_sum, hard_sum, pivoted, t_max, t_sum, difference
