"""Divergences that are sums of terms φ of probabilities p and q.

With `ψ = q ∂φ/∂q` the student's gradient is `ψ − q Σψ`. `shares` are those of the sides in a
mixture: beta, and 1 less beta.
"""

import math

import triton
import triton.language as tl

_LN_2 = tl.constexpr(math.log(2))
# Normal numbers: below, both sides underflow.
_LEAST_32 = tl.constexpr(2.0**-126)
_LEAST_64 = tl.constexpr(2.0**-1022)


@triton.jit
def inverse(mixture):
    """1 over a mixture; 0 where both sides underflow."""
    least = _LEAST_64 if mixture.dtype == tl.float64 else _LEAST_32
    return tl.where(mixture < least, 0, 1 / mixture)


@triton.jit
def log_of(x, more):
    """`log(x)` of an x that is 1 + more, which has the digits near 1; 0 of 0."""
    s = more / (2 + more)
    z = s * s
    series = tl.full(x.shape, 1 / 21, x.dtype)
    for i in tl.static_range(9, -1, -1):
        series = series * z + 1 / (2 * i + 1)
    far = tl.log2(tl.where(x == 0, 1, x)) * _LN_2
    return tl.where(tl.abs(more) < 0.25, 2 * s * series, far)


@triton.jit
def probability_terms(p, q, shares, DIVERGENCE: tl.constexpr):
    """φ and ψ of classes."""
    if DIVERGENCE == "tvd":
        # The larger and the smaller: a difference that is fused with the products which p and q
        # are would not be 0 where they are equal.
        larger, smaller = tl.where(p < q, q, p), tl.where(p < q, p, q)
        slope = tl.where(p < q, 0.5, tl.where(p > q, -0.5, 0 * p))
        return (larger - smaller) * 0.5, q * slope
    elif DIVERGENCE == "jsd":
        beta, rest = shares
        by_m = inverse(p * beta + q * rest)
        u = (p - q) * by_m
        of_q = q * log_of(q * by_m, -(u * beta)) * rest
        return p * log_of(p * by_m, u * rest) * beta + of_q, of_q
    elif DIVERGENCE == "skew_kl":
        beta, rest = shares
        by_m = inverse(p * beta + q * rest)
        more, part = (p - q) * rest, p * by_m
        return p * log_of(part, more * by_m) - more, -(q * rest * part)
    else:
        tl.static_assert(DIVERGENCE == "skew_reverse_kl")
        beta, rest = shares
        by_m = inverse(q * beta + p * rest)
        more = (q - p) * rest
        of_q = q * log_of(q * by_m, more * by_m)
        return of_q - more, of_q + p * rest * (q * by_m)
