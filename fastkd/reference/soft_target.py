"""Soft targets (Hinton et al. 2014), alone and with the hard labels.

`teachers` are one or several; `weights`, which sum to 1, belong to them in turn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.reference.precision import compute_dtype
from fastkd.reference.symbols import as_tensor
from fastkd.tensors import unshard

# Logits are multiplied by this where their maximum is subtracted, as in the kernels. Any two finite
# logits then have a finite difference, and a probability of 0 is never multiplied by infinity. A
# power of 2 rounds nothing.
LOGIT_SCALE = 2.0**-24


def shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """`logits - max`, scaled."""
    return logits * LOGIT_SCALE - maximum * LOGIT_SCALE


def largest(logits: Tensor) -> Tensor:
    """The maximum of each row, which no gradient goes through."""
    return logits.detach().amax(-1, keepdim=True)


def exp(x: Tensor) -> Tensor:
    """`exp(x)`; what is 0 has a gradient of 0, and not of 0 times infinity."""
    e = x.exp()
    return e.masked_fill(e == 0, 0)


def log_sum(exponentials: Tensor) -> Tensor:
    """Of each row, by `torch.sum`, which pairs its terms.

    The sum of `F.log_softmax` loses digits on the CPU where terms are very many.
    """
    return exponentials.sum(-1, keepdim=True).log()


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


def log_ratio(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    log_lift: Tensor | float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """`T (log p - log q)`, scaled, and each teacher's share in `exp(log_lift) * p`.

    p is the mean of the teachers' probabilities, not of their logits.
    """
    scale = temperature * LOGIT_SCALE
    maxima = [largest(t) for t in teachers]
    # The maximum goes first, because dividing large logits would round away their differences.
    exponents = [(t - top) / temperature for t, top in zip(teachers, maxima, strict=True)]
    totals = [log_sum(exp(z)) for z in exponents]
    shares = [exp(z - total + log_lift) for z, total in zip(exponents, totals, strict=True)]
    top = largest(student)
    x, of_student = shifted(student, top), log_sum(((student - top) / temperature).exp())
    if len(teachers) == 1:
        # The difference of logits comes first: at a large T it is the smaller part of both.
        ratio = (shifted(teachers[0], maxima[0]) - x) + scale * (of_student - totals[0])
    else:
        shares = [weight * share for weight, share in zip(weights, shares, strict=True)]
        mean = torch.stack(shares).sum(0)
        # Where p underflows its logarithm is multiplied by 0, and must be finite.
        log_p = mean.masked_fill(mean == 0, 1).log() - log_lift
        ratio = scale * (log_p + of_student) - x
    # A class that every teacher excludes contributes 0, and (-inf) - (-inf) would be NaN.
    excluded = torch.stack([t == -torch.inf for t in teachers]).all(0)
    return ratio.masked_fill(excluded, 0), shares


def kl_rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    lift: Tensor,
) -> Tensor:
    """`lift * T * KL(sum(w * softmax(teacher/T)) || softmax(student/T))` of rows, scaled.

    `lift` is a factor of the loss that multiplies within the exponential. In backward it would come
    to p with the difference of two logits, and their product overflow, before p makes it small.
    """
    ratio, shares = log_ratio(student, teachers, weights, temperature, lift.log())
    p = shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)
    # A class that only the student excludes is infinite, even where p underflows: 0 * inf is NaN.
    infinite = (ratio == torch.inf) & (p == 0)
    rows = torch.zeros_like(p).masked_fill(infinite, torch.inf).sum(-1)
    for share, weight in zip(shares, weights, strict=True):
        counted = ratio.masked_fill(share == 0, 0)
        # The sum of a teacher's share is constant, so its mean may be taken off the ratio: what is
        # left in backward are the differences that its gradient consists of, and no larger terms
        # that cancel.
        with torch.no_grad():
            mean = (share * counted).sum(-1, keepdim=True) / (weight * lift)
            mean = mean.masked_fill(~mean.isfinite(), 0)
        rows = rows + (share * (counted - mean)).sum(-1) + weight * lift * mean.squeeze(-1)
    return rows


def lift_for(factor: Tensor) -> Tensor:
    """What `kl_rows` takes where the loss is the sum of `T KL` times `factor`.

    The gradient of p is then no larger than a float can be.
    """
    return (8 * factor.abs()).clamp(min=1)


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
    rows = student[..., 0].numel()
    divisor = {"batchmean": rows, "mean": student.numel()}.get(reduction, 1)
    of_row = temperature if scale_t2 else 1 / temperature
    factor = as_tensor(of_row / max(divisor, 1), dtype, student.device)
    lift = lift_for(factor)
    kl = kl_rows(student, teachers, weights, temperature, lift)
    # Divided before they are added up, because only the mean may be representable.
    kl = kl * (factor / lift / LOGIT_SCALE)
    return kl if reduction == "none" else kl.sum()


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
    reduction: str,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, soft)`: cross-entropy at temperature 1, and `T^2 * KL`, of kept rows."""
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
        soft = kl_rows(student, teachers, weights, temperature, lift)

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


def zero(x: Tensor) -> Tensor:
    """0, with a gradient of 0, whatever `x` holds."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0).sum()
