"""The divergences from probabilities that are used as they are, in NumPy float64.

P is what the teacher states, whatever it sums to, and Q the student's distribution: Σ p log(p/q),
as torch.nn.KLDivLoss has it; Σ q log(q/p); and of the others what oracle_divergence adds up, with p
as it is. Nothing here comes from fastkd.
"""

import numpy as np
from oracle_divergence import derivatives, terms, times


def log_softmax(x, temperature):
    """`log softmax(x/T)`."""
    shifted = (x - x.max(-1, keepdims=True)) / temperature
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_rows(weigher, ratio, is_excluded):
    """`sum(w * log(w / other))`, where what w excludes contributes 0."""
    ratio = np.where(is_excluded, 0, ratio)
    return np.where(ratio == np.inf, np.inf, times(weigher, ratio)).sum(-1)


def divergence_rows(student, teacher, temperature, divergence, beta, teacher_is, magnitudes):
    """D of each row, and its derivatives by s/T and by what the teacher states.

    With `magnitudes` the terms of a derivative are added up where they are subtracted.
    """
    log_q = log_softmax(student, temperature)
    is_log = teacher_is == "log_probabilities"
    p, log_p = (np.exp(teacher), teacher) if is_log else (teacher, np.log(teacher))
    q, is_excluded = np.exp(log_q), log_p == -np.inf
    both = is_excluded & (log_q == -np.inf)
    ratio = np.where(both, 0, log_p) - np.where(both, 0, log_q)
    size, one = (np.abs, 1.0) if magnitudes else (np.array, 0.0)
    if divergence == "forward_kl":
        rows = kl_rows(p, ratio, is_excluded)
        by_logit, by_p = size(-p), size(ratio) + 1
    elif divergence == "reverse_kl":
        rows = kl_rows(q, -ratio, log_q == -np.inf)
        # A constant that all classes share has no part in the student's gradient.
        by_logit, by_p = times(q, size(-ratio) + one), size(-q / p)
    else:
        rows = terms(divergence, beta, p, q, ratio).sum(-1)
        by_q, by_p = derivatives(divergence, beta, ratio, magnitudes)
        by_logit = times(q, by_q)
    total = q * by_logit.sum(-1, keepdims=True)
    to_teacher = p * by_p if is_log else by_p
    to_teacher = np.where(is_excluded, 0, to_teacher)
    return rows, by_logit + total if magnitudes else by_logit - total, to_teacher
