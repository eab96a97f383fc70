"""The oracle's losses on logits, of padded logits and of rows that have weights."""

import numpy as np
import oracle


def _existing(arrays, num_classes, dim):
    """The classes that exist, and what makes their gradients those of all that are stored."""
    if num_classes is None:
        return arrays, lambda gradients: gradients
    parts = [x.take(range(num_classes), dim) for x in arrays]

    def padded(gradients):
        found = [np.zeros_like(x) for x in arrays]
        for to, gradient in zip(found, gradients, strict=True):
            np.moveaxis(to, dim, 0)[:num_classes] = np.moveaxis(gradient, dim, 0)
        return found

    return parts, padded


def _reduced(rows, reduction, count, classes):
    if reduction == "none":
        return rows, 1
    divisor = {"sum": 1, "batchmean": max(count, 1), "mean": max(count, 1) * classes}[reduction]
    return rows.sum() / divisor, divisor


def soft_target(
    student, teachers, grad_output=1.0, *, dim=-1, num_classes=None, row_weight=None,
    reduction="batchmean", mask=None, **keywords,
):  # fmt: skip
    """As `oracle.soft_target`."""
    keywords = {"dim": dim, "mask": mask, **keywords}
    (student, *teachers), padded = _existing([student, *teachers], num_classes, dim)
    if row_weight is None:
        keywords["reduction"] = reduction
        loss, gradients = oracle.soft_target(student, teachers, grad_output, **keywords)
        return loss, padded(gradients)
    weight, of_rows = np.asarray(row_weight, dtype=float), {**keywords, "reduction": "none"}
    kept = np.ones(weight.shape, dtype=bool) if mask is None else np.asarray(mask)
    count = int(kept.sum())
    of_rows["mask"] = kept & (weight != 0)
    rows, _ = oracle.soft_target(student, teachers, **of_rows)
    loss, divisor = _reduced(rows * weight, reduction, count, student.shape[dim])
    upstream = grad_output * weight / divisor
    if keywords.get("magnitudes"):
        upstream = np.abs(upstream)
    return loss, padded(oracle.soft_target(student, teachers, upstream, **of_rows)[1])


def distillation(
    student, teachers, labels, grad_output=1.0, *, dim=-1, num_classes=None, row_weight=None,
    reduction="batchmean", ignore_index=-100, **keywords,
):  # fmt: skip
    """As `oracle.distillation`."""
    keywords = {"dim": dim, "ignore_index": ignore_index, **keywords}
    teachers = teachers if isinstance(teachers, list) else [teachers]
    (student, *teachers), padded = _existing([student, *teachers], num_classes, dim)
    if row_weight is None:
        parts, gradients = oracle.distillation(
            student, teachers, labels, grad_output, reduction=reduction, **keywords
        )
        return parts, padded(gradients)
    weight, of_rows = np.asarray(row_weight, dtype=float), {**keywords, "reduction": "none"}
    count = int((labels != ignore_index).sum())
    inputs = student, teachers, np.where(weight == 0, ignore_index, labels)
    rows, _ = oracle.distillation(*inputs, **of_rows)
    found = [_reduced(part * weight, reduction, count, 1) for part in rows]
    upstream = grad_output * weight / found[0][1]
    if keywords.get("magnitudes"):
        upstream = np.abs(upstream)
    gradients = oracle.distillation(*inputs, upstream, **of_rows)[1]
    return tuple(part for part, _ in found), padded(gradients)
