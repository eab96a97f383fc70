"""The divergences between the softmaxes of two sides, each a few functions that a name selects.

Of a class they know `es` and `et`, the exponentials of student and teacher at the temperature,
relative to some maxima, and `apart`, what `log(et / es)` is made of. A row has sums of these, and
`log_ratio = log(s_sum / t_sum)`: then `log(p / q) = unit * apart + log_ratio`.
"""

import math

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))
INFINITY = tl.constexpr(math.inf)

# Logits are multiplied by this where their maximum is subtracted, as in csrc/soft_target.h: any two
# finite ones then have a finite difference, and differences have finite sums. So are the divergence
# and the cross-entropy of a row. A power of 2 rounds nothing.
LOGIT_SCALE = 2.0**-24
SCALE = tl.constexpr(LOGIT_SCALE)


@triton.jit
def weigher(of_student, of_teacher, DIVERGENCE: tl.constexpr):
    """Of the side whose exponentials weigh the mean of the terms."""
    if DIVERGENCE == "forward_kl":
        return of_teacher


@triton.jit
def term(es, et, apart, DIVERGENCE: tl.constexpr):
    """What a row adds up."""
    if DIVERGENCE == "forward_kl":
        return et * apart


@triton.jit
def of_row(mean, log_ratio, DIVERGENCE: tl.constexpr):
    """From that mean, times the unit."""
    if DIVERGENCE == "forward_kl":
        return mean + log_ratio


def needs_loss(divergence: str) -> bool:
    """Whether `factors` look at the row's loss, before which there is no gradient then."""
    return divergence != "forward_kl"


@triton.jit
def factors(weight, s_sum, t_sum, loss, log_ratio, unit, DIVERGENCE: tl.constexpr):
    """Of `es`, and for `with_teacher`, in the student's gradient times `weight`."""
    if DIVERGENCE == "forward_kl":  # q − p
        return weight / s_sum, -(weight / t_sum)


@triton.jit
def with_teacher(es, et, apart, factor, DIVERGENCE: tl.constexpr):
    """The part of a student's gradient in which the teacher has a say."""
    if DIVERGENCE == "forward_kl":
        return et * factor


@triton.jit
def to_teacher(es, et, of_student, of_teacher, surplus, DIVERGENCE: tl.constexpr):
    """The teacher's gradient, of factors `weight / sum` and `log(p / q) - loss`, scaled."""
    if DIVERGENCE == "forward_kl":
        return et * of_teacher * surplus / SCALE


@triton.jit
def terms(es, et, apart, s_excluded, t_excluded, DIVERGENCE: tl.constexpr):
    """The terms of classes that a side may exclude.

    One that the side which weighs excludes contributes 0, and one that the other side alone
    excludes is infinite, also where its exponential is 0: 0 · inf would be NaN.
    """
    infinite = weigher(t_excluded, s_excluded, DIVERGENCE)
    found = tl.where(infinite, INFINITY, term(es, et, apart, DIVERGENCE))
    return tl.where(weigher(s_excluded, t_excluded, DIVERGENCE), 0, found)
