"""|x|^p and its derivative. Exponents that most maps have are products and square roots."""

import triton
import triton.language as tl

# A float's power of anything larger is the same 0, 1 or infinity.
MOST = 3e38

_PRODUCTS = frozenset({1.0, 1.5, 2.0, 3.0, 4.0})


def known(p: float) -> float | None:
    """An exponent that kernels are compiled for; None is any other, which they are passed."""
    return p if p in _PRODUCTS else None


@triton.jit
def raised(a, exponent, KNOWN: tl.constexpr):
    """The power of a number that is not negative."""
    if KNOWN is None:
        return tl.exp2(tl.log2(a) * tl.full((), exponent, a.dtype))
    elif KNOWN == 0:
        return tl.full(a.shape, 1, a.dtype)
    elif KNOWN == 0.5:
        return tl.sqrt(a)
    elif KNOWN == 1:
        return a
    elif KNOWN == 1.5:
        return a * tl.sqrt(a)
    elif KNOWN == 2:
        return a * a
    elif KNOWN == 3:
        return a * a * a
    else:
        tl.static_assert(KNOWN == 4)
        return (a * a) * (a * a)


@triton.jit
def power(x, p, P: tl.constexpr):
    """The power |x|^p."""
    return raised(tl.abs(x), p, P)


@triton.jit
def derivative(x, p, P: tl.constexpr):
    """That of the power, p · |x|^(p−1) · sign(x), and 0 at 0."""
    if P == 2:
        return x + x
    else:
        slope = raised(tl.abs(x), p - 1, None if P is None else P - 1)
        slope *= tl.full((), p, x.dtype)
        return tl.where(x > 0, slope, tl.where(x < 0, -slope, x))
