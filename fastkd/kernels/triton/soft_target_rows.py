"""The losses of rows, and what those too long to be held are read for first."""

import triton
import triton.language as tl

from fastkd.kernels.triton import divergence
from fastkd.kernels.triton.divergence import LN_2, SCALE
from fastkd.kernels.triton.probabilities import probability_terms
from fastkd.kernels.triton.reduction import weighted
from fastkd.kernels.triton.rows import load
from fastkd.kernels.triton.soft_target_gradient import STATISTICS, last_pass
from fastkd.kernels.triton.softmax import (
    exponentials,
    in_blocks,
    normalisers,
    share_of,
    shift,
    target,
)
from fastkd.kernels.triton.stated import taken_off


@triton.jit
def divergence_of_rows(difference, s_sum, t_sum, unit, counts, DIVERGENCE: tl.constexpr):
    """Of rows, from their terms or parts of their sum; scaled, as the cross-entropy is."""
    mean = tl.sum(difference, 1, keep_dims=True)
    mean = mean / divergence.weigher(s_sum, t_sum, DIVERGENCE) * unit
    found = divergence.of_row(mean, tl.log2(s_sum / t_sum) * SCALE, DIVERGENCE)
    # Rounding may leave a tiny negative number.
    return tl.where(counts, tl.where(found < 0, 0, found * LN_2), 0)


@triton.jit
def terms_of_rows(es, et, s_sum, t_sum, mass, shares, counts, DIVERGENCE: tl.constexpr):
    """A divergence of probabilities, scaled as the others are, and Σψ; of rows that are here."""
    phi, psi = probability_terms(et * (1 / t_sum), es * (1 / s_sum), shares, DIVERGENCE)
    return finish_terms(phi, psi, mass, shares, counts, DIVERGENCE)


@triton.jit
def terms_in_blocks(
    s_at,
    t_ats,
    strides,
    counts,
    column,
    classes,
    s_max,
    maxima,
    weights,
    s_sum,
    t_sum,
    mass,
    rates,
    shares,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr,
):
    """The same of rows of any length, whose sums are known."""
    phi = tl.zeros([s_at.shape[0], column.shape[1]], rates[0].dtype)
    psi = phi
    # Backwards: what was read last may still be in the cache.
    for block in range(tl.cdiv(classes, column.shape[1]) - 1, -1, -1):
        k = block * column.shape[1] + column
        mask = counts & (k < classes)
        s = load(s_at, k, strides[0], mask, rates[0].dtype)
        et, _, _ = target(
            *(t_ats, k, strides, mask, maxima, weights, rates, None, DIVERGENCE, TEACHER_IS)
        )
        _, es, _ = exponentials(s, s_max, rates[0])
        found = probability_terms(et * (1 / t_sum), es * (1 / s_sum), shares, DIVERGENCE)
        phi += found[0]
        psi += found[1]
    return finish_terms(phi, psi, mass, shares, counts, DIVERGENCE)


@triton.jit
def finish_terms(phi, psi, mass, shares, counts, DIVERGENCE: tl.constexpr):
    """Sums over classes, scaled. Without a mass, a tiny negative number is one of rounding."""
    found = tl.sum(phi, 1, keep_dims=True)
    if mass is None:
        found = found * SCALE
        found = tl.where(found < 0, 0, found)
    else:
        found = ((found + taken_off(mass, shares, DIVERGENCE)) * SCALE).to(phi.dtype)
    return tl.where(counts, found, 0), tl.sum(psi, 1, keep_dims=True)


@triton.jit
def cross_entropy(
    logit, labelled, s_max, hard_sum, pivot, pivoted, classes, smoothing, SMOOTHS: tl.constexpr
):
    """Of rows, at temperature 1. `logit` is the label's, `pivoted` a sum of all."""
    _, counts, is_class = labelled
    log_sum = tl.log2(hard_sum) * LN_2 * SCALE
    ce = log_sum + (s_max * SCALE - logit * SCALE)
    if SMOOTHS:
        mean = log_sum + (s_max * SCALE - pivot) - tl.sum(pivoted, 1, keep_dims=True) / classes
        # At 1 the label's own term, which may be infinite, is left out.
        ce = tl.where(is_class & (smoothing == 1), 0, ce * (1 - smoothing))
        ce += mean * smoothing
    return tl.where(counts, ce, 0)


@triton.jit
def store_losses(
    losses, parts, sums, rows, row, is_row, counts, root, kl, ce, soft_weight, hard_weight, t2
):
    """The losses of rows, and their parts where they are wanted: all of one, then of the other.

    Or the sums of a program's rows. `root` is what the divergences of rows are multiplied by twice.
    """
    if root is not None:
        kl = kl * root * root
    if losses is not None:
        loss = weighted(kl, tl.full((), soft_weight, kl.dtype))
        loss += weighted(ce, tl.full((), hard_weight, kl.dtype))
        tl.store(losses + row, loss / SCALE, mask=is_row)
        if parts is not None:
            at = parts + row.to(tl.int64)
            tl.store(at, ce / SCALE, mask=is_row)
            tl.store(at + rows, weighted(kl, tl.full((), t2, kl.dtype)) / SCALE, mask=is_row)
    if sums is not None:
        at = sums + tl.program_id(0)
        tl.store(at, tl.sum(ce).to(tl.float64))
        tl.store(at + tl.num_programs(0), tl.sum(kl).to(tl.float64))
        tl.store(at + 2 * tl.num_programs(0), tl.sum(counts.to(tl.int32)).to(tl.float64))


@triton.jit
def store_statistics(statistics, row, is_row, counts, found):
    """All that backward needs of rows; those that do not count have none."""
    at = statistics + row.to(tl.int64) * STATISTICS
    for i in tl.static_range(STATISTICS):
        tl.store(at + i, tl.where(counts, found[i], 0), mask=is_row)


@triton.jit
def first_pass(
    s_at,
    t_ats,
    strides,
    counts,
    column,
    classes,
    mean,
    rates,
    HAS_HARD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NORMALIZES: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEACHER_IS: tl.constexpr,
):
    """Of rows of any length the pivot, the student's normalisers, and what is of the teachers.

    That is maxima, shares, and what the divergence is made of: the target's sum and its terms. Of
    several teachers the latter take another pass, which AT_ONCE leaves to that of the gradient.
    """
    pivot = shift(tl.load(s_at, mask=counts, other=0).to(rates[0].dtype))
    if len(t_ats) == 1:
        s_max, s_sum, hard_sum, pivoted, t_max, t_sum, difference = in_blocks(
            *(s_at, t_ats[0], strides, counts, column, classes, pivot, rates),
            *(HAS_HARD, SMOOTHS, DIVERGENCE, TEACHER_IS),
        )
        maxima, shares = (t_max,), ()
    else:
        maxima, shares = (), ()  # type: ignore[assignment]
        for m in tl.static_range(len(t_ats)):
            t_max, t_sum, _, _ = normalisers(
                t_ats[m], strides[2 + m], counts, column, classes, rates[1], rates[1]
            )
            share = share_of(mean[0][m], tl.sum(t_sum, 1, keep_dims=True))
            maxima = maxima + (t_max,)  # type: ignore[assignment]  # noqa: RUF005
            shares = shares + (share,)  # type: ignore[assignment]  # noqa: RUF005
        s_max, s_sum, hard_sum, pivoted = normalisers(
            s_at, strides[0], counts, column, classes, pivot, rates[0], HAS_HARD, SMOOTHS
        )
        t_sum, difference = s_sum, s_sum
        if not AT_ONCE and not NORMALIZES:
            t_sum, difference = last_pass(
                *(s_at, t_ats, strides, counts, column, classes, s_max, maxima, shares, rates),
                *(mean, None, None, None, None, None, None, False, False, DIVERGENCE, TEACHER_IS),
            )
    return pivot, s_max, s_sum, hard_sum, pivoted, maxima, shares, t_sum, difference
