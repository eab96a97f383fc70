"""The distance between two maps of one sample, and what it is to each position of both: slopes."""

import triton
import triton.language as tl

from fastkd.kernels.triton.power import derivative, power, raised

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def values(at, mask, p, P: tl.constexpr, IS_MAX: tl.constexpr):
    """What is kept of a map, and the unnormalised map: of `max_pow` the features that won."""
    kept = tl.load(at, mask=mask, other=0)
    if IS_MAX:
        return kept, power(kept, p, P)
    else:
        return kept, kept


@triton.jit
def normaliser(squares, eps, dtype: tl.constexpr):
    """What a map is multiplied with, and whether it is a constant."""
    norm = tl.sqrt(squares)
    clamped = norm < eps
    # A map of zeros stays zeros, however small eps is.
    inverse = tl.where(norm == 0, 0, 1 / tl.where(clamped, eps, norm))
    return inverse.to(dtype), clamped


@triton.jit
def terms(d, largest, order, ORDER: tl.constexpr):
    """What is summed for a norm, and its derivative but for a factor that all positions share.

    Terms of orders other than 1 and 2 are relative to the largest |d|: no power leaves the range.
    """
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if ORDER == 2:
        return d * d, d
    elif ORDER == 1:
        return tl.abs(d), sign
    elif ORDER == INFINITY:
        attains = (tl.abs(d) == largest).to(d.dtype)
        return attains, sign * attains
    else:
        ratio = tl.abs(d) / tl.where(largest == 0, 1, largest)
        slope = raised(ratio, order - 1, None)
        return slope * ratio, sign * slope


@triton.jit
def weighed(total, largest, weight, order, IS_MSE: tl.constexpr, ORDER: tl.constexpr):
    """The loss, and the factor of slopes; the derivative of a norm at 0 is 0."""
    weight = tl.full(total.shape, weight, tl.float64)
    if IS_MSE:
        return weight * total, 2 * weight
    elif ORDER == 2:
        norm = tl.sqrt(total)
        return weight * norm, tl.where(norm == 0, 0, weight / norm)
    elif ORDER == 1:
        return weight * total, weight
    elif ORDER == INFINITY:
        return weight * largest, tl.where(largest == 0, 0, weight / total)
    else:
        root = tl.exp2(tl.log2(total) / order)
        loss = tl.where(largest == 0, 0, weight * largest * root)
        return loss, tl.where(largest == 0, 0, weight * root / total)


@triton.jit(do_not_specialize=["samples"], do_not_specialize_on_alignment=["losses"])
def distance(
    student,  # maps of samples, one after another; of max_pow the features that won
    teacher,
    to_student,  # slopes, which may take the place of the maps
    to_teacher,  # or None
    losses,  # one a sample
    weight: tl.float64,  # of a sample's norm, or of its sum of squares
    order: tl.float64,
    eps: tl.float64,
    p: tl.float64,
    samples,
    positions,
    IS_MAX: tl.constexpr,
    IS_MSE: tl.constexpr,
    ORDER: tl.constexpr,  # 1, 2, infinity, or None for others
    P: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses and slopes of some samples, a block of positions at a time."""
    dtype: tl.constexpr = student.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    first_of = sample * positions

    # In float64: the squares of a map leave float32's range.
    s_squares = tl.zeros([SAMPLES, 1], tl.float64)
    t_squares, total, s_inner, t_inner = s_squares, s_squares, s_squares, s_squares
    for first in range(0, positions, BLOCK):
        at = first_of + first + column
        mask = (sample < samples) & (first + column < positions)
        s = values(student + at, mask, p, P, IS_MAX)[1].to(tl.float64)
        t = values(teacher + at, mask, p, P, IS_MAX)[1].to(tl.float64)
        s_squares += tl.sum(s * s, 1, keep_dims=True)
        t_squares += tl.sum(t * t, 1, keep_dims=True)
    s_inverse, s_clamped = normaliser(s_squares, eps, dtype)
    t_inverse, t_clamped = normaliser(t_squares, eps, dtype)

    largest = tl.zeros([SAMPLES, 1], dtype)
    if ORDER is None or ORDER == INFINITY:
        for first in range(0, positions, BLOCK):
            at = first_of + first + column
            mask = (sample < samples) & (first + column < positions)
            s = values(student + at, mask, p, P, IS_MAX)[1]
            t = values(teacher + at, mask, p, P, IS_MAX)[1]
            d = s * s_inverse - t * t_inverse
            # Maxima pass over NaN.
            d = tl.where(d == d, tl.abs(d), INFINITY)
            largest = tl.maximum(largest, tl.max(d, 1, keep_dims=True))
        largest = tl.where(largest == INFINITY, float("nan"), largest)

    for first in range(0, positions, BLOCK):
        at = first_of + first + column
        mask = (sample < samples) & (first + column < positions)
        s = values(student + at, mask, p, P, IS_MAX)[1] * s_inverse
        t = values(teacher + at, mask, p, P, IS_MAX)[1] * t_inverse
        term, slope = terms(s - t, largest, order, ORDER)
        total += tl.sum(term, 1, keep_dims=True)
        s_inner += tl.sum(s * slope, 1, keep_dims=True)
        t_inner += tl.sum(t * slope, 1, keep_dims=True)
    # Q = F / ‖F‖ turns a slope of Q into (slope − Q · ⟨Q, slope⟩) / ‖F‖.
    s_inner = tl.where(s_clamped, 0, s_inner).to(dtype)
    t_inner = tl.where(t_clamped, 0, t_inner).to(dtype)
    loss, factor = weighed(total, largest, weight, order, IS_MSE, ORDER)
    tl.store(losses + sample, loss.to(losses.dtype.element_ty), mask=sample < samples)

    factor = factor.to(dtype)
    for first in range(0, positions, BLOCK):
        at = first_of + first + column
        mask = (sample < samples) & (first + column < positions)
        s_kept, s = values(student + at, mask, p, P, IS_MAX)
        t_kept, t = values(teacher + at, mask, p, P, IS_MAX)
        s *= s_inverse
        t *= t_inverse
        _, slope = terms(s - t, largest, order, ORDER)
        s_slope = factor * (slope - s * s_inner) * s_inverse
        if IS_MAX:
            s_slope *= derivative(s_kept, p, P)
        tl.store(to_student + at, s_slope, mask=mask)
        if to_teacher is not None:
            t_slope = factor * (t * t_inner - slope) * t_inverse
            if IS_MAX:
                t_slope *= derivative(t_kept, p, P)
            tl.store(to_teacher + at, t_slope, mask=mask)
