"""The divergences other than forward KL as their papers state them, in NumPy float64.

P is the teacher's distribution, Q the student's: KL(Q‖P); the Jensen-Shannon divergence
`β KL(P‖M) + (1−β) KL(Q‖M)` with `M = βP + (1−β)Q` (Lin 1991; Agarwal et al. 2024); the total
variation; and the skew divergences KL(P‖βP+(1−β)Q) and KL(Q‖βQ+(1−β)P) (Ko et al. 2024). Nothing
here comes from fastkd.
"""

import numpy as np


def to_mixture(ratio, beta):
    """`log(p/m)` and `log(q/m)` with `m = βp + (1−β)q`, of `log(p/q)`."""
    ratio = np.clip(ratio, -1e4, 1e4)  # beyond that the smaller probability is 0
    near = np.abs(ratio) < 1
    close = np.where(near, ratio, 0)
    log_of, log_other = np.log(beta), np.log1p(-beta)
    of_p = -np.where(
        near, np.log1p((1 - beta) * np.expm1(-close)), np.logaddexp(log_other - ratio, log_of)
    )
    of_q = -np.where(
        near, np.log1p(beta * np.expm1(close)), np.logaddexp(log_of + ratio, log_other)
    )
    return of_p, of_q


def derivatives(name, beta, ratio, magnitudes):
    """By q and by p, of a divergence's terms; with `magnitudes` those of what they are made of.

    A logarithm counts with what rounding may do to its quotient.
    """
    one = float(magnitudes)
    size, sign = (np.abs, one) if magnitudes else (np.array, -1)
    if name == "jsd":
        of_p, of_q = to_mixture(ratio, beta)
        by_q = (1 - beta) * (size(of_q) + one * beta * np.exp(of_p))
        by_p = beta * (size(of_p) + one * (1 - beta) * np.exp(of_q))
    elif name == "tvd":
        by_q, by_p = size(-np.sign(ratio)) / 2, size(np.sign(ratio)) / 2
    elif name == "skew_kl":
        of_p, of_q = to_mixture(ratio, beta)
        by_q = sign * (1 - beta) * np.exp(of_p)
        by_p = size(of_p) + (1 + one) * (1 - beta) * np.exp(of_q)
    else:
        assert name == "skew_reverse_kl", name
        of_q, of_p = to_mixture(-ratio, beta)
        by_q = size(of_q) + (1 + one) * (1 - beta) * np.exp(of_p)
        by_p = sign * (1 - beta) * np.exp(of_q)
    return by_q, by_p


def times(probability, value):
    """0 where the probability is, also times infinity."""
    return np.where(probability == 0, 0 * probability, probability * value)


def terms(name, beta, p, q, ratio):
    """Of each class, what the divergence adds up."""
    if name == "tvd":
        return np.abs(p - q) / 2
    if name == "skew_reverse_kl":
        return times(q, to_mixture(-ratio, beta)[0])
    of_p, of_q = to_mixture(ratio, beta)
    if name == "skew_kl":
        return times(p, of_p)
    return beta * times(p, of_p) + (1 - beta) * times(q, of_q)


def bounded_rows(name, beta, log_p, logs, weights, log_q, magnitudes):
    """The divergence of each row, T times its derivative by the student, and by the teachers.

    The logarithms are of the target, of each teacher and of the student.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    both = (log_p == -np.inf) & (log_q == -np.inf)
    ratio = np.where(both, 0, log_p) - np.where(both, 0, log_q)
    by_q, by_p = derivatives(name, beta, ratio, magnitudes)

    def gradient(weight, share, slope):
        of_row = times(share, slope)
        mean = share * of_row.sum(-1, keepdims=True)
        return weight * (of_row + mean if magnitudes else of_row - mean)

    rows = terms(name, beta, p, q, ratio).sum(-1)
    to_teachers = [gradient(w, np.exp(log), by_p) for w, log in zip(weights, logs, strict=True)]
    return rows, gradient(1, q, by_q), to_teachers


def reverse_kl_rows(log_p, logs, weights, log_q, scale, magnitudes):
    """The same of KL(Q‖P). The logarithms and the results but the teachers' are times `scale`."""
    p, q = np.exp(log_p / scale), np.exp(log_q / scale)
    is_excluded = log_q == -np.inf
    ratio = np.where(is_excluded, 0, log_q) - np.where(is_excluded, 0, log_p)
    # A class that only the teacher excludes is infinite, even where q underflows.
    rows = np.where(ratio == np.inf, np.inf, np.where(q == 0, 0 * p, q * ratio)).sum(-1)
    of_row = np.where(q == 0, 0, q * ratio)
    if magnitudes:
        of_row = np.abs(of_row) + q * scale
        to_student = of_row + q * of_row.sum(-1, keepdims=True)
    else:
        to_student = of_row - q * of_row.sum(-1, keepdims=True)
    if len(logs) == 1:
        return rows, to_student, [p + q if magnitudes else p - q]
    to_teachers = []
    of_shares = [np.log(w) + log / scale for w, log in zip(weights, logs, strict=True)]
    total = np.logaddexp.reduce(of_shares)
    for log, of_share in zip(logs, of_shares, strict=True):
        # q times a teacher's part of the target, where both may underflow.
        part = times(q, np.exp(of_share - np.where(total == -np.inf, 0, total)))
        mean = np.exp(log / scale) * part.sum(-1, keepdims=True)
        to_teachers.append(mean + part if magnitudes else mean - part)
    return rows, to_student, to_teachers
