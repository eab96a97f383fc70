"""Losses whose teacher kept k classes of each row, in NumPy float64, row by row.

With P_j of the slots and Q_j of the same classes, each tail as its users write it, D is the sum of
the slots' terms; with the bucket, of all other classes' together as well. The chain from D to what
a call is given is written out: `by_log_q` and `by_log_p` are the derivatives of a term by the
logarithms of its two sides. Nothing here comes from fastkd.
"""

import numpy as np
from oracle_divergence import derivatives, terms, times

# What the documents say of the rest of a row: rounded probabilities may sum to more than 1.
LEAST_REST = 1e-7


def log_sum_exp(x):
    if len(x) == 0 or np.max(x) == -np.inf:
        return -np.inf
    top = np.max(x)
    return top + np.log(np.exp(x - top).sum())


def from_maximum(x):
    """Beside large logits a logarithm has no digits."""
    return x - x.max() if len(x) and np.isfinite(x.max()) else x


def compared(divergence, beta, log_p, log_q, magnitudes):
    """The terms of slots, and their derivatives by log q and log p."""
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    if divergence.startswith("skew_") and beta == 0:
        divergence = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}[divergence]
    p, q = np.exp(log_p), np.exp(log_q)
    nothing = (log_p == -np.inf) & (log_q == -np.inf)
    ratio = np.where(nothing, 0, log_p) - np.where(nothing, 0, log_q)
    size, one = (np.abs, 1.0) if magnitudes else (np.array, 0.0)
    if divergence == "forward_kl":
        phi = np.where((log_q == -np.inf) & ~nothing, np.inf, times(p, ratio))
        return phi, size(-p), times(p, size(ratio) + 1)
    if divergence == "reverse_kl":
        return times(q, -ratio), times(q, size(-ratio) + 1 + one), size(-q)
    by_q, by_p = derivatives(divergence, beta, ratio, magnitudes)
    return terms(divergence, beta, p, q, ratio), times(q, by_q), times(p, by_p)


def row(student, values, indices, lse, heat, tail, values_are, divergence, beta, magnitudes):
    """D of a row, and its derivatives by student/T, values/T_t and lse. `heat` is both."""
    minus = (lambda a, b: np.abs(a) + np.abs(b)) if magnitudes else (lambda a, b: a - b)
    slots = np.flatnonzero((indices >= 0) & (values != -np.inf))
    z, c = from_maximum(student) / heat[0], indices[slots]
    y = values[slots] / (heat[1] if values_are == "logits" else 1)
    if tail in ("renormalize", "renormalize_both"):
        y = from_maximum(values[slots]) / (heat[1] if values_are == "logits" else 1)
        log_p = y - log_sum_exp(y)
    else:
        log_p = y - (lse if lse is not None else 0)
    is_listed = np.zeros(len(z), dtype=bool)
    is_listed[c] = True
    total = log_sum_exp(z[c] if tail == "renormalize_both" else z)
    log_q = z[c] - total
    with_rest = tail == "bucket" and not is_listed.all()
    if with_rest:
        rest = max(1 - np.exp(log_p).sum(), LEAST_REST)
        of_rest = log_sum_exp(z[~is_listed])
        log_p, log_q = np.append(log_p, np.log(rest)), np.append(log_q, of_rest - total)
    phi, by_log_q, by_log_p = compared(divergence, beta, log_p, log_q, magnitudes)
    to_student, to_values = np.zeros_like(z), np.zeros_like(values)
    np.add.at(to_student, c, by_log_q[: len(c)])
    if with_rest:
        of_rest = 0 if of_rest == -np.inf else of_rest
        to_student[~is_listed] += by_log_q[-1] * np.exp(z[~is_listed] - of_rest)
    share = np.exp(z - total)
    if tail == "renormalize_both":
        share = np.zeros_like(z)
        np.add.at(share, c, np.exp(log_q))
    to_student = minus(to_student, times(share, by_log_q.sum()))
    by_y = by_log_p[: len(c)]
    if with_rest and rest > LEAST_REST:
        by_y = minus(by_y, np.exp(log_p[:-1]) * by_log_p[-1] / rest)
    if tail in ("renormalize", "renormalize_both"):
        by_y = minus(by_y, np.exp(log_p) * by_y.sum())
    to_values[slots] = by_y
    return phi.sum(), to_student, to_values, -by_y.sum()


def by_temperature(slope, x, temperature, magnitudes):
    """The derivative by T of what depends on x / T."""
    counted = (slope != 0) & np.isfinite(x)
    x = np.where(counted, x - (np.max(x) if counted.any() else 0), 0)
    products = slope * x / temperature**2
    return np.abs(products).sum() if magnitudes else -products.sum()


def cross_entropy(student, label, smoothing, magnitudes):
    log_q = student - log_sum_exp(student)
    target = np.full(len(student), smoothing / len(student))
    target[label] += 1 - smoothing
    loss = -np.where(target > 0, target * log_q, 0).sum()
    return loss, np.exp(log_q) + (target if magnitudes else -target)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def top_k(
    student, values, indices, lse=None, grad_output=1.0, *, temperature=1.0,
    teacher_temperature=None, tail="renormalize", values_are="logits", divergence="forward_kl",
    beta=0.5, scale_t2=True, reduction="batchmean", dim=-1, num_classes=None, mask=None,
    row_weight=None, normalizer=None, labels=None, ignore_index=-100, label_smoothing=0.0,
    soft_weight=1.0, hard_weight=0.0, magnitudes=False,
):  # fmt: skip
    """`(loss, hard, soft)` reduced, and the gradients: of the student, the values and lse.

    After these come those of temperatures that are arrays.
    """
    s = np.moveaxis(student, dim, -1)
    shape, classes = s.shape[:-1], s.shape[-1] if num_classes is None else num_classes
    kept = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask)
    if labels is not None:
        kept = kept & (labels != ignore_index)
    count = max(kept.sum(), 1) if normalizer is None else normalizer
    of_classes = classes if reduction == "mean" else 1
    divisor = count * of_classes if reduction in ("mean", "batchmean") else 1
    of_student = np.broadcast_to(temperature, shape)
    of_teacher = of_student if teacher_temperature is None else teacher_temperature
    of_teacher = np.broadcast_to(of_teacher, shape)
    weight = np.ones(shape) if row_weight is None else np.asarray(row_weight, dtype=float)
    upstream = np.broadcast_to(grad_output, shape) * weight / divisor
    upstream = np.abs(upstream) if magnitudes else upstream
    found = {name: np.zeros(shape) for name in ("hard", "soft", "student", "teacher", "lse")}
    to_student, to_values = np.zeros_like(s), np.zeros_like(values)
    for at in np.ndindex(*shape):
        if not kept[at] or (row_weight is not None and weight[at] == 0):
            continue
        heat, x = (of_student[at], of_teacher[at]), s[at][:classes]
        square = heat[0] ** 2 if scale_t2 else 1.0
        d, by_z, by_y, by_lse = row(
            x, values[at], indices[at], None if lse is None else lse[at], heat, tail, values_are,
            divergence, beta, magnitudes,
        )  # fmt: skip
        found["soft"][at] = square * d
        if soft_weight:
            by = upstream[at] * soft_weight * square
            of_y = heat[1] if values_are == "logits" else 1
            to_student[at][:classes] += by * by_z / heat[0]
            to_values[at] = by * by_y / of_y
            found["lse"][at] = by * by_lse
            found["student"][at] = by * by_temperature(by_z, x, heat[0], magnitudes)
            if scale_t2:
                found["student"][at] += by * 2 * d / heat[0]
            if values_are == "logits":
                v = np.where(by_y == 0, -np.inf, values[at])
                if tail in ("renormalize", "renormalize_both"):
                    found["teacher"][at] = by * by_temperature(by_y, v, heat[1], magnitudes)
                else:  # their sum is not 0
                    products = by * times(by_y, values[at]) / heat[1] ** 2
                    found["teacher"][at] = -products.sum()
                    if magnitudes:
                        found["teacher"][at] = np.abs(products).sum()
        if labels is not None:
            ce, by_x = cross_entropy(x, labels[at], label_smoothing, magnitudes)
            found["hard"][at] = ce
            if hard_weight:
                to_student[at][:classes] += upstream[at] * hard_weight * by_x
    parts = [found["hard"] * weight / divisor, found["soft"] * weight / divisor]
    loss = np.zeros(shape)
    for by, part in zip((hard_weight, soft_weight), parts, strict=True):
        loss = loss + by * part if by else loss
    losses = [loss, *parts]
    if reduction != "none":
        losses = [x.sum() for x in losses]
    gradients = [np.moveaxis(to_student, -1, dim), to_values]
    gradients += [] if lse is None else [found["lse"]]
    heat = found["student"], found["teacher"]
    if teacher_temperature is None:
        heat = (heat[0] + heat[1],)
    for given, gradient in zip((temperature, teacher_temperature), heat, strict=False):
        if isinstance(given, np.ndarray):
            gradients.append(gradient.sum() if given.ndim == 0 else gradient)
    return losses, gradients
