"""Soft targets and hard labels together (Hinton et al. 2014)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.precision import compute_dtype
from fastkd.reference.soft_target import (
    LOGIT_SCALE,
    divergence_rows,
    largest,
    lift_for,
    log_sum,
    shifted,
    zero,
)
from fastkd.tensors import unshard


def cross_entropy_rows(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with `(1 - label_smoothing) * one_hot + label_smoothing / K`, scaled."""
    maximum = largest(logits)
    x = shifted(logits, maximum)
    log_total = log_sum((logits - maximum).exp())[..., 0] * LOGIT_SCALE
    # A part of weight 0 is left out, because a logit may be infinite.
    if label_smoothing == 1:
        return log_total - x.mean(-1)
    rows = log_total - x.gather(-1, labels[:, None]).squeeze(-1)
    if label_smoothing == 0:
        return rows
    return (1 - label_smoothing) * rows + label_smoothing * (log_total - x.mean(-1))


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
    divergence: str,
    reduction: str,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, soft)`: cross-entropy at temperature 1, and `T^2 * D`, of kept rows."""
    dtype = compute_dtype(student, *teachers)
    classes = student.shape[dim]
    kept = (labels != ignore_index).reshape(-1)
    # Filled rather than multiplied by 0 afterwards: an ignored row may hold NaN or infinity.
    student, *teachers = (
        x.to(dtype).movedim(dim, -1).reshape(-1, classes).masked_fill(~kept[:, None], 0)
        for x in (student, *teachers)
    )
    count = kept.sum().clamp(min=1) if reduction == "batchmean" else kept.new_ones(())
    count = count.to(dtype)
    # A weight of 0 switches its term off, also where the term is infinite or NaN.
    with torch.set_grad_enabled(torch.is_grad_enabled() if hard_weight else False):
        classes_kept = labels.reshape(-1).masked_fill(~kept, 0)
        rows = cross_entropy_rows(unshard(student, -1), classes_kept, label_smoothing)
        hard = rows.masked_fill(~kept, 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() if soft_weight else False):
        factor = temperature / count
        lift = lift_for(soft_weight * factor)
        soft = divergence_rows(student, teachers, weights, temperature, lift, divergence)

    def reduced(rows: Tensor) -> Tensor:
        return rows.reshape(labels.shape) if reduction == "none" else rows.sum()

    loss = sum(map(zero, teachers), zero(student))
    if reduction == "none":
        loss = loss.expand(labels.shape).contiguous()
    # A weighted term may be representable where the term itself is not.
    of_hard, of_soft = 1 / LOGIT_SCALE / count, factor / lift / LOGIT_SCALE
    if hard_weight:
        loss = loss + reduced(hard * (hard_weight * of_hard))
    if soft_weight:
        loss = loss + reduced(soft * (soft_weight * of_soft))
    return loss, reduced(hard * of_hard), reduced(soft * of_soft)
