"""Teachers whose probabilities are used as they are.

To the loops over classes they are logits log p at temperature 1, whose softmax is p / S with
S = Σp. What S changes is put right for a row as a whole, in float64: a row's S may be far from 1.
"""

import math

import triton
import triton.language as tl

from fastkd.kernels.triton.divergence import INFINITY, SCALE
from fastkd.kernels.triton.rows import load

_LEAST_32 = tl.constexpr(2.0**-126)
_LEAST_64 = tl.constexpr(2.0**-1022)
_RAISE = tl.constexpr(2.0**64)
_LOG_OF_RAISE = tl.constexpr(64 * math.log(2))


@triton.jit
def log_of_probability(p):
    """log(p): -inf of 0, NaN of negative numbers.

    What is subnormal, and 0 to a GPU's logarithm, is raised first.
    """
    is_low = p < (_LEAST_64 if p.dtype == tl.float64 else _LEAST_32)
    found = tl.log(tl.where(is_low, p * _RAISE, p))
    return tl.where(is_low, found - _LOG_OF_RAISE, found)


@triton.jit
def load_teacher(at, column, stride, mask, COMPUTE: tl.constexpr, TEACHER_IS: tl.constexpr):
    """A teacher's logits, or what stands in their place."""
    logits = load(at, column, stride, mask, COMPUTE)
    if TEACHER_IS == "probabilities":
        logits = tl.where(mask, log_of_probability(logits), -INFINITY)
    return logits


@triton.jit
def mass_of(t_max, t_sum):
    """S of rows, and its logarithm, scaled."""
    top, total = t_max.to(tl.float64), t_sum.to(tl.float64)
    return total * tl.exp(top), (tl.log(total) + top) * SCALE


@triton.jit
def mass_and_sum(t_max, t_sum, TEACHER_IS: tl.constexpr):
    """S of rows, or None of logits, and what the teacher's exponentials are divided by for p."""
    if TEACHER_IS == "logits":
        return None, t_sum
    else:
        by = tl.exp(-t_max[0].to(tl.float64)).to(t_sum.dtype)
        return mass_of(t_max[0], t_sum)[0], by


@triton.jit
def with_mass(found, soft, t_max, t_sum, counts, DIVERGENCE: tl.constexpr):
    """A KL divergence of p from that of p / S, scaled, and the weight of its gradient.

    KL(p‖q) is S KL(p/S ‖ q) + S log S: of no mass 0, unless a class is infinite. KL(q‖p) is
    KL(q ‖ p/S) − log S.
    """
    mass, log_mass = mass_of(t_max, t_sum)
    if DIVERGENCE == "reverse_kl":
        of_p = tl.where(log_mass == -INFINITY, INFINITY, found - log_mass)
    else:
        of_none = tl.where(found == INFINITY, found, 0)
        of_p = tl.where(mass == 0, of_none, mass * (found + log_mass))
        soft = tl.where(soft == 0, 0, soft * mass).to(t_sum.dtype)
    return tl.where(counts, of_p, 0).to(found.dtype), soft


@triton.jit
def taken_off(mass, shares, DIVERGENCE: tl.constexpr):
    """What the terms of the skew divergences lack: it sums to 0 where S is 1."""
    if DIVERGENCE == "skew_kl":
        return (mass - 1) * shares[1]
    elif DIVERGENCE == "skew_reverse_kl":
        return (1 - mass) * shares[1]
    else:
        return tl.zeros_like(mass)
