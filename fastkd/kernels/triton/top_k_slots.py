"""The slots of rows, each one of the k classes that a teacher kept: sums, terms, and gradients."""

import math

import triton
import triton.language as tl

from fastkd.kernels.triton.divergence import INFINITY, LN_2, SCALE
from fastkd.kernels.triton.probabilities import probability_terms
from fastkd.kernels.triton.softmax import grow, shift
from fastkd.kernels.triton.temperatures import at_student

_RATE = tl.constexpr(1 / math.log(2) / SCALE.value)  # of exponentials of scaled logarithms
_BEYOND_ALL = tl.constexpr(2**31 - 1)  # comes after every class


@triton.jit
def slot_terms(log_p, log_q, shares, DIVERGENCE: tl.constexpr):
    """φ, scaled, and ψ of classes whose logarithms, scaled, are known. What is -inf is excluded."""
    p, q = tl.exp2(log_p * _RATE), tl.exp2(log_q * _RATE)
    if DIVERGENCE == "forward_kl":
        # A class that only the student excludes is infinite, even where p underflows.
        phi = tl.where(log_q == -INFINITY, INFINITY, p * (log_p - log_q))
        return tl.where(log_p == -INFINITY, 0, phi), -p
    elif DIVERGENCE == "reverse_kl":
        phi = tl.where(q == 0, 0 * p, q * (log_q - log_p))  # NaN of NaN
        return phi, q + phi / SCALE
    else:
        phi, psi = probability_terms(p, q, shares, DIVERGENCE)
        # What is taken off a class sums to 0 where both sides sum to 1. Slots may not.
        if DIVERGENCE == "skew_kl":
            phi += (p - q) * shares[1]
        elif DIVERGENCE == "skew_reverse_kl":
            phi += (q - p) * shares[1]
        return phi * SCALE, psi


@triton.jit
def load_slots(slots_at, s_at, stride, j, slots, counts, classes, COMPUTE: tl.constexpr):
    """Logits of slots, which of these are no padding, and which list a class first.

    A class that does not exist has NaN. Without a stride there are logits of slots in the place of
    those of classes.
    """
    of_row = counts & (j < slots)
    index = tl.load(slots_at + j, mask=of_row, other=-1)
    before = tl.load(slots_at + j - 1, mask=of_row & (j > 0), other=-1)
    is_slot = index >= 0
    if stride is None:
        at, exists = s_at + j, is_slot
    else:
        at, exists = s_at + index.to(tl.int64) * stride, is_slot & (index < classes)
    s = tl.load(at, mask=exists, other=float("nan")).to(COMPUTE)
    return tl.where(is_slot, s, -INFINITY), is_slot, is_slot & (index != before)


@triton.jit
def sums_of_slots(
    slots_at,
    s_at,
    stride,
    slots,
    counts,
    classes,
    rate,
    HAS_HARD: tl.constexpr,
    LISTED_ONLY: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Maximum and sums of the slots' softmax; or of the classes that slots list, each once."""
    maximum = tl.full(s_at.shape, -INFINITY, rate.dtype)
    total = tl.zeros([s_at.shape[0], SLOTS], rate.dtype)
    hard = total
    for first in range(0, slots, SLOTS):
        j = first + tl.arange(0, SLOTS)[None, :]
        s, _, is_first = load_slots(slots_at, s_at, stride, j, slots, counts, classes, rate.dtype)
        if not LISTED_ONLY:
            s = tl.where(is_first, s, -INFINITY)
        higher = tl.maximum(maximum, tl.max(s, 1, keep_dims=True))
        total, hard, _, _, _ = grow(total, hard, s, maximum, higher, rate, HAS_HARD)
        maximum = higher
    total = tl.sum(total, 1, keep_dims=True)
    return maximum, total, tl.sum(hard, 1, keep_dims=True) if HAS_HARD else total


@triton.jit
def terms_of_slots(
    slots_at,
    log_p_at,
    log_q_at,
    s_at,
    stride,
    slots,
    is_row,
    counts,
    classes,
    softmax,  # its maximum, the scaled logarithm of its sum, and 1 / T
    shares,
    DIVERGENCE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The sums of φ, scaled, and of ψ; log q of each slot goes to memory."""
    maximum, log_sum, unit = softmax
    phi = tl.zeros([s_at.shape[0], SLOTS], log_sum.dtype)
    psi = phi
    for first in range(0, slots, SLOTS):
        j = first + tl.arange(0, SLOTS)[None, :]
        s, is_slot, _ = load_slots(slots_at, s_at, stride, j, slots, counts, classes, log_sum.dtype)
        log_p = tl.load(log_p_at + j, mask=is_slot, other=-INFINITY) * SCALE
        log_q = at_student(s * SCALE - shift(maximum), unit) - log_sum
        log_q = tl.where(is_slot, log_q, -INFINITY)
        found = slot_terms(log_p, log_q, shares, DIVERGENCE)
        phi += tl.where(is_slot, found[0], 0)
        psi += tl.where(is_slot, found[1], 0)
        tl.store(
            log_q_at + j, tl.where(counts, log_q / SCALE, -INFINITY), mask=is_row & (j < slots)
        )
    return tl.sum(phi, 1, keep_dims=True), tl.sum(psi, 1, keep_dims=True)


@triton.jit
def rest_of(rest, softmax):
    """The scaled log q of all classes that no slot lists together, from their maximum and sum."""
    apart = at_student(shift(rest[0]) - shift(softmax[0]), softmax[2])
    return apart + (tl.log2(rest[1]) * (LN_2 * SCALE) - softmax[1])


@triton.jit
def class_of(slots_at, slot, slots, counts):
    """The class of a row's slot, or one that comes after all."""
    return tl.load(slots_at + slot, mask=counts & (slot < slots), other=_BEYOND_ALL)


@triton.jit
def first_slots(k, slots_at, slots, counts):
    """For each class the first slot of it or of a later one, by bisection."""
    first = tl.zeros([counts.shape[0], k.shape[1]], tl.int32)
    left = tl.cast(slots, tl.int32)
    while left > 0:
        half = (left + 1) // 2
        before = class_of(slots_at, first + (half - 1), slots, counts) < k
        first = tl.where(before, first + half, first)
        left -= half
    return first


@triton.jit
def in_all(k, first_class):
    """The number that a class has among those of all shards, of which slots are."""
    if first_class is None:
        return k
    else:
        return k + first_class


@triton.jit
def first_cursor(slots_at, slots, counts, first_class):
    """The slot from which those of the first block's classes are looked for."""
    if first_class is None:
        return tl.zeros(counts.shape, tl.int32)
    else:
        return first_slots(tl.full([1, 1], first_class, tl.int32), slots_at, slots, counts)


@triton.jit
def begin(k, last, cursor, slots_at, slots, counts, ARE_MANY: tl.constexpr):
    """The slot from which those of a block's classes are looked for, and the class that ends it.

    Few slots are looked at in turn by all classes of a block, many by each class for itself.
    """
    if ARE_MANY:
        return first_slots(k, slots_at, slots, counts), k + 1
    else:
        return cursor, last


@triton.jit
def listed_in(k, last, cursor, slots_at, slots, counts, ARE_MANY: tl.constexpr):
    """Which of the classes k, all before `last`, a slot lists; and the first slot of a later one.

    Slots ascend: a block looks at them from where the one before it has ended.
    """
    found = tl.zeros([cursor.shape[0], k.shape[1]], tl.int1)
    slot, end = begin(k, last, cursor, slots_at, slots, counts, ARE_MANY)
    at = class_of(slots_at, slot, slots, counts)
    while tl.max((at < end).to(tl.int32)) > 0:
        found = found | (k == at)
        slot += (at < end).to(tl.int32)
        at = class_of(slots_at, slot, slots, counts)
    return found, cursor if ARE_MANY else slot


@triton.jit
def gradients_of_slots(
    k,
    last,
    cursor,
    slots_at,
    log_p_at,
    log_q_at,
    slots,
    counts,
    soft,  # the factor of ψ
    psi,  # its sum
    shares,
    DIVERGENCE: tl.constexpr,
    LISTED_ONLY: tl.constexpr,
    ARE_MANY: tl.constexpr,
):
    """The same, and what the terms of slots add to the gradients of their classes."""
    found = tl.zeros([cursor.shape[0], k.shape[1]], tl.int1)
    total = tl.zeros([cursor.shape[0], k.shape[1]], soft.dtype)
    slot, end = begin(k, last, cursor, slots_at, slots, counts, ARE_MANY)
    at = class_of(slots_at, slot, slots, counts)
    while tl.max((at < end).to(tl.int32)) > 0:
        is_slot = counts & (at >= 0) & (at < end)
        log_p = tl.load(log_p_at + slot, mask=is_slot, other=-INFINITY) * SCALE
        log_q = tl.load(log_q_at + slot, mask=is_slot, other=-INFINITY) * SCALE
        of_slot = slot_terms(log_p, log_q, shares, DIVERGENCE)[1]
        if LISTED_ONLY:
            of_slot -= tl.exp2(log_q * _RATE) * psi
        of_slot = tl.where(soft == 0, 0, of_slot * soft)
        found = found | (k == at)
        total += tl.where(k == at, of_slot, 0)
        slot += (at < end).to(tl.int32)
        at = class_of(slots_at, slot, slots, counts)
    return found, total, cursor if ARE_MANY else slot
