"""What `distillation_metrics` returns, from the formulas, in NumPy float64."""

import numpy as np
from oracle import SCALE, log_softmax

FIELDS = (
    "student_log_sum_exp",
    "teacher_log_sum_exp",
    "student_entropy",
    "teacher_entropy",
    "student_argmax",
    "teacher_argmax",
    "forward_kl",
    "reverse_kl",
    "overlap",
)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def distillation_metrics(
    student, teacher, *, temperature=1.0, teacher_temperature=None, mask=None, num_classes=None,
    dim=-1,
):  # fmt: skip
    """A dictionary from the names of the fields to arrays, and what KLs are rounded against."""
    sides = [np.moveaxis(x, dim, -1)[..., :num_classes] for x in (student, teacher)]
    temperatures = temperature, temperature if teacher_temperature is None else teacher_temperature
    rows = sides[0].shape[:-1]
    kept = np.ones(rows, dtype=bool) if mask is None else np.asarray(mask)
    # NumPy adds up pairs of neighbours only where classes lie side by side.
    sides = [np.ascontiguousarray(x[kept]) for x in sides]
    log_q, log_p = (
        log_softmax(x, t) / (t * SCALE) for x, t in zip(sides, temperatures, strict=True)
    )
    q, p = np.exp(log_q), np.exp(log_p)
    values = (
        *(log_sum_exp(x, t) for x, t in zip(sides, temperatures, strict=True)),
        entropy(q, log_q),
        entropy(p, log_p),
        *(x.argmax(-1) for x in sides),
        kl(p, log_p, log_q),
        kl(q, log_q, log_p),
        np.minimum(p, q).sum(-1),
    )
    found = {}
    for name, of_kept in zip(FIELDS, values, strict=True):
        found[name] = np.full(rows, -1) if "argmax" in name else np.zeros(rows)
        found[name][kept] = of_kept
    sizes = {"forward_kl": np.ones(rows), "reverse_kl": np.ones(rows)}
    sizes["forward_kl"][kept] = size_of_kl(p, log_p, log_q)
    sizes["reverse_kl"][kept] = size_of_kl(q, log_q, log_p)
    return found, sizes


def log_sum_exp(x, temperature):
    top = x.max(-1)
    total = np.exp((x * SCALE - top[..., None] * SCALE) / (temperature * SCALE)).sum(-1)
    return np.where(top == -np.inf, top, top / temperature + np.log(total))


def entropy(p, log_p):
    return -np.where(log_p == -np.inf, 0, p * log_p).sum(-1)


def kl(p, log_p, log_q):
    """A class that p excludes contributes 0; one that only q excludes is infinite."""
    terms = p * (log_p - log_q)
    terms = np.where((log_q == -np.inf) & (log_p > -np.inf), np.inf, terms)
    # What is left of NaN here is one that the rows have.
    return np.where(log_p == -np.inf, 0 * log_q.max(-1, keepdims=True), terms).sum(-1)


def size_of_kl(p, log_p, log_q):
    """Where a mask of the other side makes much of a small p, whose error grows with its logarithm.

    In float32 the exponential of -62 is up to 62 roundings off, 4e-6 of it.
    """
    terms = np.abs(p * (log_p - log_q)) * np.maximum(1, -log_p / 16)
    return np.maximum(1, np.where(np.isfinite(terms), terms, 0).sum(-1))
