"""Soft targets (Hinton et al. 2014), alone and with the hard labels.

`teachers` are one or several; `weights`, which sum to 1, belong to them in turn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.reference.precision import compute_dtype
from fastkd.tensors import unshard


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits/T)` along the last dimension.

    The maximum goes first, because dividing large logits would round away their differences. The
    sum is `torch.sum`, which pairs its terms; that of `F.log_softmax` loses digits on the CPU
    where there are very many.
    """
    shifted = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def cross_entropy_rows(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with `(1 - label_smoothing) * one_hot + label_smoothing / K`."""
    log_q = log_softmax(logits)
    # A part of weight 0 is left out, because log_q may be infinite.
    if label_smoothing == 1:
        return -log_q.mean(-1)
    rows = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    if label_smoothing == 0:
        return rows
    return (1 - label_smoothing) * rows - label_smoothing * log_q.mean(-1)


def target(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float
) -> tuple[Tensor, Tensor]:
    """The mean of the teachers' probabilities, not of their logits; and its logarithm."""
    logs = [log_softmax(t, temperature) for t in teachers]
    if len(logs) == 1:
        return logs[0].exp(), logs[0]
    p = torch.stack([w * log.exp() for w, log in zip(weights, logs, strict=True)]).sum(0)
    # Where p underflows its logarithm is multiplied by 0, and must be finite.
    return p, p.masked_fill(p == 0, 1).log()


def kl_rows(
    student: Tensor, teachers: Sequence[Tensor], weights: Sequence[float], temperature: float
) -> Tensor:
    """`KL(sum(w * softmax(teacher/T)) || softmax(student/T))` along the last dimension."""
    p, log_p = target(teachers, weights, temperature)
    log_q = log_softmax(student, temperature)
    # A class that every teacher excludes contributes 0, and (-inf) - (-inf) would be NaN.
    excluded = torch.stack([t == -torch.inf for t in teachers]).all(0)
    difference = log_p.masked_fill(excluded, 0) - log_q.masked_fill(excluded, 0)
    # One that only the student excludes is infinite, even where p underflows and 0 * inf is NaN.
    infinite = (student == -torch.inf) & ~excluded & (p == 0)
    return (p * difference).masked_fill(infinite, torch.inf).sum(-1)


def soft_target_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    *,
    temperature: float,
    scale_t2: bool,
    reduction: str,
    dim: int,
) -> Tensor:
    """`T^2 * KL(p || q)` of each row, reduced."""
    dtype = compute_dtype(student, *teachers)
    student, *teachers = (x.to(dtype).movedim(dim, -1) for x in (student, *teachers))
    rows = kl_rows(student, teachers, weights, temperature)
    if scale_t2:
        rows = rows * temperature**2
    if reduction == "none":
        return rows
    divisor = {"sum": 1, "batchmean": rows.numel(), "mean": student.numel()}[reduction]
    return rows.sum() / max(divisor, 1)


def distillation_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    ignore_index: int,
    label_smoothing: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, soft)`: cross-entropy at temperature 1, and `T^2 * KL`, over kept rows."""
    dtype = compute_dtype(student, *teachers)
    classes = student.shape[dim]
    kept = (labels != ignore_index).reshape(-1)
    # Filled rather than multiplied by 0 afterwards: an ignored row may hold NaN or infinity.
    student, *teachers = (
        x.to(dtype).movedim(dim, -1).reshape(-1, classes).masked_fill(~kept[:, None], 0)
        for x in (student, *teachers)
    )
    count = kept.sum().clamp(min=1)
    # A weight of 0 switches its term off, also where the term is infinite or NaN.
    with torch.set_grad_enabled(torch.is_grad_enabled() if hard_weight else False):
        classes_kept = labels.reshape(-1).masked_fill(~kept, 0)
        rows = cross_entropy_rows(unshard(student, -1), classes_kept, label_smoothing)
        hard = rows.masked_fill(~kept, 0).sum() / count
    with torch.set_grad_enabled(torch.is_grad_enabled() if soft_weight else False):
        soft = kl_rows(student, teachers, weights, temperature).sum() * temperature**2 / count
    loss = sum(map(zero, teachers), zero(student))
    if hard_weight:
        loss = loss + hard_weight * hard
    if soft_weight:
        loss = loss + soft_weight * soft
    return loss, hard, soft


def zero(x: Tensor) -> Tensor:
    """0, with a gradient of 0, whatever `x` holds."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0).sum()
