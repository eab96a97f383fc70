"""Rows whose teacher kept k classes: the sums of classes, and what gradients are made of.

Classes that no slot lists have a maximum and sums of their own: beside the others they may all
underflow, and what the others lack of 1 has no digits.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import INFINITY, SCALE
from fastkd.kernels.triton.rows import load
from fastkd.kernels.triton.softmax import HARD_RATE, grow, shift
from fastkd.kernels.triton.top_k_slots import first_cursor, in_all, listed_in
from fastkd.parameters import SoftTarget

# Of slots in a block on the average: looking at one more costs each thread of a program some
# instructions for each of its classes, and bisection takes as many as some 20 slots.
_MOST_IN_TURN = 20

# Of a row whose classes are split over ranks: a maximum and two sums of exponentials as
# `first_pass` has them, and the sum of logits.
SUMS = tl.constexpr(4)


def are_many(slots: int, block: int, student: Tensor, p: SoftTarget) -> bool:
    """Whether each class of a block looks for its slots by itself."""
    return slots * block > _MOST_IN_TURN * (p.all_classes or student.shape[p.dim])


@triton.jit
def first_pass(
    held,  # rows that are here as a whole, or nothing
    s_at,
    stride,
    counts,
    column,
    classes,
    pivot,
    slots_at,
    slots,
    first_class,  # of a shard, or None
    rate,
    HAS_HARD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    LISTED_ONLY: tl.constexpr,
    ARE_MANY: tl.constexpr,
):
    """Maximum and sums of the classes that no slot lists, or of all; and parts of the latter's sum.

    That sum is of logits less the pivot.
    """
    maximum = tl.full(s_at.shape, -INFINITY, rate.dtype)
    total = tl.zeros([s_at.shape[0], column.shape[1]], rate.dtype)
    hard, pivoted = total, total
    cursor = first_cursor(slots_at, slots, counts, first_class)
    for first in range(0, classes, column.shape[1]):
        k = first + column
        if len(held) == 0:
            s = load(s_at, k, stride, counts & (k < classes), rate.dtype)
        else:
            s = held[0]
        if SMOOTHS:
            pivoted += tl.where(k < classes, s * SCALE - pivot, 0)
        if not LISTED_ONLY:
            last = tl.minimum(first + column.shape[1], classes)
            ends = in_all(k, first_class), in_all(last, first_class)
            listed, cursor = listed_in(*ends, cursor, slots_at, slots, counts, ARE_MANY)
            s = tl.where(listed, -INFINITY, s)
        higher = tl.maximum(maximum, tl.max(s, 1, keep_dims=True))
        total, hard, _, _, _ = grow(total, hard, s, maximum, higher, rate, HAS_HARD)
        maximum = higher
    total = tl.sum(total, 1, keep_dims=True)
    hard = tl.sum(hard, 1, keep_dims=True) if HAS_HARD else total
    return (maximum, total, hard), pivoted


@triton.jit
def load_sums(sums, row, counts, COMPUTE: tl.constexpr):
    """What `first_pass` finds, of all shards together; the sum of logits is in float64."""
    at = sums + row.to(tl.int64) * SUMS
    maximum = tl.load(at, mask=counts, other=-INFINITY).to(COMPUTE)
    total = tl.load(at + 1, mask=counts, other=0).to(COMPUTE)
    hard = tl.load(at + 2, mask=counts, other=0).to(COMPUTE)
    return (maximum, total, hard), tl.load(at + 3, mask=counts, other=0)


@triton.jit
def with_rest(listed, rest, rate, HAS_HARD: tl.constexpr):
    """Maximum and sums of all classes, and what brings exponentials of the rest to that maximum."""
    top = tl.maximum(listed[0], rest[0])
    apart = rest[0] * SCALE - shift(top)
    to_listed, to_rest = tl.exp2((listed[0] * SCALE - shift(top)) * rate), tl.exp2(apart * rate)
    total = listed[1] * to_listed + rest[1] * to_rest
    if HAS_HARD:
        hard_to_rest = tl.exp2(apart * HARD_RATE)
        hard = listed[2] * tl.exp2((listed[0] * SCALE - shift(top)) * HARD_RATE)
        return (top, total, hard + rest[2] * hard_to_rest), to_rest, hard_to_rest
    else:
        return (top, total, total), to_rest, to_rest


@triton.jit
def factors_of_classes(
    every,
    rest,
    moves,
    soft,
    hard,
    psi,
    HAS_HARD: tl.constexpr,
    LISTED_ONLY: tl.constexpr,
):
    """Of a class's exponentials, at T and at 1; and the shift of these.

    First those of a class that a slot lists, then those of another one.
    """
    of_hard = tl.where(hard == 0, 0, hard / every[2])
    none = tl.zeros_like(of_hard)
    at_t, at_1 = (none, of_hard) if HAS_HARD else (of_hard, none)
    of_all = shift(every[0]), at_t, at_1
    if LISTED_ONLY:
        return of_all, of_all
    else:
        to_rest, hard_to_rest, psi_rest = moves
        of_listed = shift(every[0]), at_t + tl.where(soft == 0, 0, -soft * psi / every[1]), at_1
        of_rest = psi_rest - rest[1] * to_rest / every[1] * psi
        of_rest = tl.where((soft == 0) | (rest[1] == 0), 0, soft * of_rest / rest[1])
        return of_listed, (shift(rest[0]), of_rest + at_t * to_rest, at_1 * hard_to_rest)
