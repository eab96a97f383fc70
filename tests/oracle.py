"""The equations as the papers state them, in NumPy float64, with derivatives worked out by hand.

Nothing here comes from fastkd. Every function takes arrays and the `grad_output` of the loss and
returns `(loss, gradients)`, the gradients in the order of the array arguments.
"""

import numpy as np
import oracle_divergence
import oracle_probabilities
import oracle_temperatures
from oracle_features import attention_map, attention_transfer, hint, pooling
from oracle_relations import fsp, rkd_angle, rkd_distance, similarities, similarity

__all__ = [
    "attention_map",
    "attention_transfer",
    "distillation",
    "fsp",
    "hint",
    "pooling",
    "rkd_angle",
    "rkd_distance",
    "similarities",
    "similarity",
    "soft_target",
]

# Logits are multiplied by this first, so that any two finite ones have a finite difference. A power
# of 2 rounds nothing.
SCALE = 2.0**-70


def log_softmax(x, temperature=1.0):
    """`T log softmax(x/T)`, times SCALE. Huge logits lose nothing to the division by T."""
    shifted = x * SCALE - x.max(-1, keepdims=True) * SCALE
    exponentials = np.exp(shifted / (temperature * SCALE))
    return shifted - temperature * SCALE * np.log(exponentials.sum(-1, keepdims=True))


def divergence_rows(
    student, teachers, weights, temperatures, magnitudes=False, divergence="forward_kl", beta=0.5,
    teacher_is="logits",
):  # fmt: skip
    """T D(p, q) of each row, and D's derivatives by s/T and by each teacher's t/T_t.

    `temperatures` are T and T_t, one for each row. All are times SCALE. p is the weighted mean of
    the teachers' probabilities; those of weight 0 are not there. With `magnitudes` the terms of a
    derivative are added up where they are subtracted: what rounding errors are measured against.
    A teacher that is no logits states p, or its logarithm; the derivative is by what it states.
    """
    temperature, teacher_temperature = temperatures
    if divergence == "jsd" and beta in (0, 1):  # a convention, and no limit
        divergence = "reverse_kl" if beta else "forward_kl"
    if divergence.startswith("skew_") and beta == 0:
        divergence = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}[divergence]
    if teacher_is != "logits":
        rows, to_student, to_teacher = oracle_probabilities.divergence_rows(
            student, teachers[0], temperature, divergence, beta, teacher_is, magnitudes
        )
        rows = rows * temperature[..., 0] * SCALE
        return rows, to_student * SCALE, [to_teacher * SCALE]
    log_q = log_softmax(student, temperature)
    ratio = temperature / teacher_temperature
    logs = [log_softmax(x, teacher_temperature) * ratio for x in teachers]
    scale = temperature * SCALE
    counted = [i for i, weight in enumerate(weights) if weight]
    log_p = logs[counted[0]]
    if len(counted) > 1:
        log_p = scale * np.logaddexp.reduce([np.log(weights[i]) + logs[i] / scale for i in counted])
    of_counted = log_p, [logs[i] for i in counted], [weights[i] for i in counted], log_q
    if divergence == "forward_kl":
        rows, to_student, found = forward_kl_rows(*of_counted, scale, magnitudes)
    elif divergence == "reverse_kl":
        rows, to_student, found = oracle_divergence.reverse_kl_rows(*of_counted, scale, magnitudes)
        to_student = to_student / temperature
        found = [x * SCALE for x in found]
    else:
        log_p, logs, of_them, log_q = of_counted
        logarithms = log_p / scale, [x / scale for x in logs], of_them, log_q / scale
        rows, to_student, found = oracle_divergence.bounded_rows(
            divergence, beta, *logarithms, magnitudes
        )
        rows, to_student, found = (
            rows * scale[..., 0],
            to_student * SCALE,
            [x * SCALE for x in found],
        )
    to_teachers = [np.zeros_like(x) for x in teachers]
    for i, gradient in zip(counted, found, strict=True):
        to_teachers[i] = gradient
    return rows, to_student, to_teachers


def forward_kl_rows(log_p, logs, weights, log_q, scale, magnitudes):
    """The same of KL(p‖q); the logarithms are times `scale`."""
    p, q = np.exp(log_p / scale), np.exp(log_q / scale)
    is_excluded = log_p == -np.inf
    ratio = np.where(is_excluded, 0, log_p) - np.where(is_excluded, 0, log_q)
    # Where p underflows its logarithm may be -inf. A class that only the student excludes still is
    # infinite then.
    rows = np.where(ratio == np.inf, np.inf, np.where(p == 0, 0 * q, p * ratio)).sum(-1)
    to_teachers = []
    for w, log in zip(weights, logs, strict=True):
        share = np.exp(log / scale)
        of_row = np.where(share == 0, 0, share * ratio)
        if magnitudes:
            of_row = np.abs(of_row) + share * scale
            slope = of_row + share * of_row.sum(-1, keepdims=True)
        else:
            slope = of_row - share * of_row.sum(-1, keepdims=True)
        to_teachers.append(w * slope / (scale / SCALE))
    return rows, SCALE * (q + p if magnitudes else q - p), to_teachers


def _ensemble(student, teachers, weights, dim):
    """Arrays with the classes last, a list of teachers, and weights that sum to 1."""
    teachers = teachers if isinstance(teachers, list) else [teachers]
    weights = np.ones(len(teachers)) if weights is None else np.array(weights, dtype=float)
    # NumPy adds up pairs of neighbours only where classes lie side by side.
    student, *teachers = (
        np.ascontiguousarray(np.moveaxis(x, dim, -1)) for x in (student, *teachers)
    )
    weights = weights / weights.max()
    return student, teachers, weights / weights.sum()


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def soft_target(
    student, teachers, grad_output=1.0, *, temperature=1.0, teacher_temperature=None,
    scale_t2=True, reduction="batchmean", dim=-1, divergence="forward_kl", beta=0.5, mask=None,
    teacher_weights=None, magnitudes=False, teacher_is="logits",
):  # fmt: skip
    """Takes a teacher or a list of them; the gradients are the student's, then all teachers'.

    After these come the gradients of temperatures that are arrays.
    """
    student, teachers, weights = _ensemble(student, teachers, teacher_weights, dim)
    kept = np.ones(student.shape[:-1], dtype=bool) if mask is None else np.asarray(mask)
    of_rows = oracle_temperatures.of_rows(temperature, teacher_temperature, kept.shape)
    of_rows = [t[kept] for t in of_rows]
    of_kept = [x[kept] for x in (student, *teachers)]
    rows, *found = divergence_rows(
        of_kept[0], of_kept[1:], weights, of_rows, magnitudes, divergence, beta, teacher_is
    )
    slopes = [found[0], *found[1]]
    weight = of_rows[0] if scale_t2 else 1 / of_rows[0]
    count = kept.sum()
    divisor = {"none": 1, "sum": 1, "batchmean": count, "mean": count * student.shape[-1]}
    weight = weight / max(divisor[reduction], 1)
    losses = np.zeros(kept.shape)
    losses[kept] = rows * weight[..., 0]
    loss = losses / SCALE if reduction == "none" else np.sum(losses) / SCALE
    weight = np.broadcast_to(grad_output, kept.shape)[kept][..., None] * weight
    gradients = [np.zeros_like(x) for x in (student, *teachers)]
    for i, (gradient, slope) in enumerate(zip(gradients, slopes, strict=True)):
        gradient[kept] = (weight * of_rows[0] / of_rows[1] if i else weight) * slope / SCALE
    by_temperatures = [np.zeros(kept.shape), np.zeros(kept.shape)]
    found = oracle_temperatures.derivatives(
        rows / SCALE, [x / SCALE for x in slopes], of_kept, of_rows, weight[..., 0], scale_t2,
        magnitudes,
    )  # fmt: skip
    for gradient, of_row in zip(by_temperatures, found, strict=True):
        gradient[kept] = of_row
    gradients = [np.moveaxis(g, -1, dim) for g in gradients]
    of_arguments = oracle_temperatures.of_arguments
    return loss, [*gradients, *of_arguments(by_temperatures, temperature, teacher_temperature)]


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def distillation(
    student, teachers, labels, grad_output=1.0, *, temperature=4.0, teacher_temperature=None,
    soft_weight=0.9, hard_weight=0.1, ignore_index=-100, label_smoothing=0.0,
    reduction="batchmean", dim=-1, divergence="forward_kl", beta=0.5, teacher_weights=None,
    magnitudes=False, teacher_is="logits",
):  # fmt: skip
    """As the others; the loss is `(loss, hard, soft)`, each reduced."""
    student, teachers, weights = _ensemble(student, teachers, teacher_weights, dim)
    kept = labels != ignore_index
    classes = student.shape[-1]
    count = max(kept.sum(), 1) if reduction == "batchmean" else 1
    gradients = [np.zeros_like(x) for x in (student, *teachers)]
    s = student[kept]

    log_q = log_softmax(s)
    target = np.full(s.shape, label_smoothing / classes)
    target[np.arange(len(s)), labels[kept]] += 1 - label_smoothing
    hard = -np.where(target > 0, target * log_q, 0).sum(-1) / count
    of_rows = oracle_temperatures.of_rows(temperature, teacher_temperature, kept.shape)
    of_rows = [t[kept] for t in of_rows]
    of_kept = [s, *(t[kept] for t in teachers)]
    rows, soft_to_student, soft_to_teachers = divergence_rows(
        s, of_kept[1:], weights, of_rows, magnitudes, divergence, beta, teacher_is
    )
    soft = of_rows[0][..., 0] * rows / count

    def reduced(rows):
        if reduction != "none":
            return rows.sum()
        of_all = np.zeros(labels.shape)
        of_all[kept] = rows
        return of_all

    hard, soft = reduced(hard), reduced(soft)
    # A term of weight 0 is not there, also where it is infinite.
    loss = sum(w * part for w, part in ((hard_weight, hard), (soft_weight, soft)) if w)
    loss = loss + np.zeros(labels.shape if reduction == "none" else ())
    if hard_weight:
        q = np.exp(log_q / SCALE)
        gradients[0][kept] += hard_weight * (q + target if magnitudes else q - target)
    by_temperatures = [np.zeros(kept.shape), np.zeros(kept.shape)]
    if soft_weight:
        weight = soft_weight * of_rows[0]
        gradients[0][kept] += weight * soft_to_student / SCALE
        for gradient, soft_gradient in zip(gradients[1:], soft_to_teachers, strict=True):
            gradient[kept] += weight * of_rows[0] / of_rows[1] * soft_gradient
        slopes = [x / SCALE for x in (soft_to_student, *soft_to_teachers)]
        found = oracle_temperatures.derivatives(
            rows / SCALE, slopes, of_kept, of_rows, weight[..., 0], True, magnitudes
        )
        for gradient, of_row in zip(by_temperatures, found, strict=True):
            gradient[kept] = of_row
    upstream = np.broadcast_to(grad_output, labels.shape)[..., None] / count
    by_temperatures = [g * upstream[..., 0] for g in by_temperatures]
    gradients = [g * upstream for g in gradients]
    gradients[1:] = [g / SCALE for g in gradients[1:]]
    gradients = [np.moveaxis(g, -1, dim) for g in gradients]
    of_arguments = oracle_temperatures.of_arguments
    gradients += of_arguments(by_temperatures, temperature, teacher_temperature)
    return (loss / SCALE, hard / SCALE, soft / SCALE), gradients
