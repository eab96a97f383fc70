"""Soft targets and hard labels together (Hinton et al. 2014)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.parameters import SoftTarget
from fastkd.reference.classes import HERE, Classes
from fastkd.reference.scaled import LOGIT_SCALE, log_sum, shifted
from fastkd.reference.soft_target import divergence_rows, lift_for, prepared, zero
from fastkd.reference.temperatures import of_rows, temperatures_of
from fastkd.tensors import unshard


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, label_smoothing: float, classes: Classes = HERE
) -> Tensor:
    """Cross-entropy with `(1 - label_smoothing) * one_hot + label_smoothing / K`, scaled."""
    maximum = classes.largest(logits)
    x = shifted(logits, maximum)
    log_total = log_sum((logits - maximum).exp(), classes)[..., 0] * LOGIT_SCALE
    # A part of weight 0 is left out, because a logit may be infinite.
    if label_smoothing == 1:
        return log_total - classes.mean(x)
    rows = log_total - classes.at(x, labels)
    if label_smoothing == 0:
        return rows
    return (1 - label_smoothing) * rows + label_smoothing * (log_total - classes.mean(x))


def distillation_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    classes: Classes = HERE,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, soft)`: cross-entropy at temperature 1, and `T^2 * D`, of kept rows.

    The parts are detached, and not weighted.
    """
    student, teachers, divisor = prepared(student, teachers, labels, p, classes)
    by = temperatures_of(temperatures, labels, p)
    weight, squared = of_rows(by.weight), of_rows(by.squared)
    ignored = labels == p.ignore_index
    # A weight of 0 switches its term off, also where the term is infinite or NaN.
    with torch.set_grad_enabled(torch.is_grad_enabled() if p.hard_weight else False):
        labels = labels.masked_fill(ignored, 0)
        rows = cross_entropy_rows(unshard(student, -1), labels, p.label_smoothing, classes)
        hard = rows.masked_fill(ignored, 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() if p.soft_weight else False):
        lift = lift_for(weight / divisor)
        soft = divergence_rows(student, teachers, ignored, lift, p, by, classes)

    def reduced(rows: Tensor) -> Tensor:
        return rows if p.reduction == "none" else rows.sum()

    loss = sum(map(zero, (*teachers, *temperatures)), zero(student))
    if p.reduction == "none":
        loss = loss.expand(labels.shape).contiguous()
    # A weighted term may be representable where the term itself is not.
    of_hard, of_soft = 1 / LOGIT_SCALE / divisor, 1 / lift / LOGIT_SCALE / divisor
    if p.hard_weight:
        loss = loss + reduced(hard * (p.hard_weight * of_hard))
    if p.soft_weight:
        loss = loss + reduced(soft * (weight * of_soft))
    parts = reduced(hard * of_hard), reduced(soft * (squared * of_soft))
    return loss, parts[0].detach(), parts[1].detach()
