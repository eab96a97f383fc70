"""The divergences between the softmaxes of two sides, each a few functions that a name selects.

Of a class they know `es` and `et`, the exponentials of student and teacher at the temperature,
relative to some maxima, and `apart`, what `log(et / es)` is made of. A row has sums of these, and
`log_ratio = log(s_sum / t_sum)`: then `log(p / q) = unit * apart + log_ratio`.

The Kullback-Leibler divergences follow from such sums. The others are sums of terms of the
probabilities p and q (`probabilities.py`), for which the sums must be known.
"""

import math

import triton
import triton.language as tl

from fastkd.kernels.triton.probabilities import probability_terms

LN_2 = tl.constexpr(math.log(2))
INFINITY = tl.constexpr(math.inf)

# Logits are multiplied by this where their maximum is subtracted, as in csrc/soft_target.h: any two
# finite ones then have a finite difference, and differences have finite sums. So are the divergence
# and the cross-entropy of a row. A power of 2 rounds nothing.
LOGIT_SCALE = 2.0**-24
SCALE = tl.constexpr(LOGIT_SCALE)


# Those of p and q.
OF_PROBABILITIES = frozenset({"jsd", "tvd", "skew_kl", "skew_reverse_kl"})


@triton.jit
def weigher(of_student, of_teacher, DIVERGENCE: tl.constexpr):
    """Of the side whose exponentials weigh the mean of the terms."""
    if DIVERGENCE == "reverse_kl":
        return of_student
    else:
        return of_teacher


@triton.jit
def term(es, et, apart, DIVERGENCE: tl.constexpr):
    """What a row adds up."""
    if DIVERGENCE == "forward_kl":
        return et * apart
    elif DIVERGENCE == "reverse_kl":
        return es * apart
    else:
        return tl.zeros_like(es)


@triton.jit
def of_row(mean, log_ratio, DIVERGENCE: tl.constexpr):
    """From that mean, times the unit."""
    if DIVERGENCE == "reverse_kl":
        return -(mean + log_ratio)
    else:
        return mean + log_ratio


def needs_loss(divergence: str) -> bool:
    """Whether `factors` look at the row's loss, before which there is no gradient then."""
    return divergence != "forward_kl"


@triton.jit
def factors(weight, s_sum, t_sum, found, log_ratio, unit, shares, DIVERGENCE: tl.constexpr):
    """Of `es`, and for `with_teacher`, in the student's gradient times `weight`.

    `found` is the row's loss, or Σψ of a divergence of probabilities.
    """
    if DIVERGENCE == "forward_kl":  # q − p
        return weight / s_sum, -(weight / t_sum)
    elif DIVERGENCE == "reverse_kl":  # −q (log(p / q) + the loss)
        by = weight / s_sum
        return tl.where(weight == 0, 0, -by * (log_ratio + found)), -by * unit
    else:  # ψ − q Σψ
        of_student = tl.where(weight == 0, 0, -(weight / s_sum) * found)
        return of_student, (weight, 1 / s_sum, 1 / t_sum, shares)


@triton.jit
def with_teacher(es, et, apart, factor, DIVERGENCE: tl.constexpr):
    """The part of a student's gradient in which the teacher has a say."""
    if DIVERGENCE == "forward_kl":
        return et * factor
    elif DIVERGENCE == "reverse_kl":
        return tl.where(es == 0, 0, es * apart) * factor
    else:
        psi = probability_terms(et * factor[2], es * factor[1], factor[3], DIVERGENCE)[1]
        return psi * factor[0]


@triton.jit
def to_teacher(es, et, of_student, of_teacher, surplus, excluded, DIVERGENCE: tl.constexpr):
    """The teacher's gradient, of factors `weight / sum` and `log(p / q) - loss`, scaled."""
    if DIVERGENCE == "forward_kl":
        return tl.where(excluded, 0, et * of_teacher * surplus / SCALE)
    else:  # p − q
        return et * of_teacher - es * of_student


@triton.jit
def terms(es, et, apart, s_excluded, t_excluded, DIVERGENCE: tl.constexpr):
    """The terms of classes that a side may exclude.

    One that the side which weighs excludes contributes 0, and one that the other side alone
    excludes is infinite, also where its exponential is 0: 0 · inf would be NaN.
    """
    infinite = weigher(t_excluded, s_excluded, DIVERGENCE)
    far = -INFINITY if DIVERGENCE == "reverse_kl" else INFINITY
    found = tl.where(infinite, far, term(es, et, apart, DIVERGENCE))
    return tl.where(weigher(s_excluded, t_excluded, DIVERGENCE), 0, found)
