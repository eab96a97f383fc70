"""Soft targets (Hinton et al. 2014), alone and with the hard labels.

`teachers` are one or several; `weights`, which sum to 1, belong to them in turn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype
from fastkd.reference.classes import HERE, Classes
from fastkd.reference.divergence import DIVERGENCES, Sides
from fastkd.reference.scaled import LOGIT_SCALE, exp, log_sum, shifted
from fastkd.reference.temperatures import Temperatures, of_rows, over, temperatures_of, times
from fastkd.reference.top_k import Slots
from fastkd.reference.top_k import divergence_rows as rows_of_slots
from fastkd.symbols import as_tensor


def compared(
    student: Tensor,
    teachers: Sequence[Tensor],
    p: SoftTarget,
    by: Temperatures,
    lift: Tensor | None = None,
    classes: Classes = HERE,
) -> Sides:
    """What divergences are made of; logarithms are multiplied by the student's T, and scaled.

    p is the mean of the teachers' probabilities, not of their logits.
    """
    if p.teacher_is != "logits":
        return stated(student, teachers[0], p, by, lift, classes)
    log_lift = 0.0 if lift is None else lift.log()
    weights, scale = p.weights, by.student * LOGIT_SCALE
    maxima = [classes.largest(t) for t in teachers]
    # The maximum goes first, because dividing large logits would round away their differences.
    exponents = [over(t - top, by.teacher) for t, top in zip(teachers, maxima, strict=True)]
    totals = [log_sum(exp(z), classes) for z in exponents]
    shares = [exp(z - total + log_lift) for z, total in zip(exponents, totals, strict=True)]
    top = classes.largest(student)
    x, of_student = shifted(student, top), log_sum(over(student - top, by.student).exp(), classes)
    log_p = exponents[0] - totals[0]
    if len(teachers) == 1:
        # The difference of logits comes first: at a large T it is the smaller part of both.
        y = times(shifted(teachers[0], maxima[0]), by.ratio)
        ratio = (y - x) + scale * (of_student - totals[0])
    else:
        shares = [weight * share for weight, share in zip(weights, shares, strict=True)]
        mean = torch.stack(shares).sum(0)
        # Where p underflows its logarithm is multiplied by 0, and must be finite.
        log_p = mean.masked_fill(mean == 0, 1).log() - log_lift
        if p.divergence == "reverse_kl":  # which multiplies it by q
            log_p = log_of_mean(mean, log_p, log_shares(exponents, totals, weights))
        ratio = scale * (log_p + of_student) - x
    return Sides(
        student=student,
        teachers=teachers,
        log_ratio=ratio,
        shares=shares,
        log_parts=lambda: [log - log_p for log in log_shares(exponents, totals, weights)],
        weights=weights,
        q=lambda: exp(over(student - top, by.student) - of_student + log_lift),
        lift=1.0 if lift is None else lift,
        unit=scale,
        beta=p.beta,
        normalized=True,
        classes=classes,
    )


def stated(
    student: Tensor,
    teacher: Tensor,
    p: SoftTarget,
    by: Temperatures,
    lift: Tensor | None,
    classes: Classes,
) -> Sides:
    """The same of a teacher whose probabilities, or their logarithms, are used as they are."""
    log_lift = 0.0 if lift is None else lift.log()
    if p.teacher_is == "probabilities":
        # What is 0 is excluded, and has a gradient of 0.
        share = teacher.masked_fill(teacher < 0, torch.nan).masked_fill(teacher == 0, 0)
        log_p = log_of(share)
        share = share if lift is None else share * lift
    else:
        log_p, share = teacher, exp(teacher + log_lift)
    scale, top = by.student * LOGIT_SCALE, classes.largest(student)
    of_student = log_sum(over(student - top, by.student).exp(), classes)
    return Sides(
        student=student,
        teachers=[log_p],
        log_ratio=times(log_p, scale) + scale * of_student - shifted(student, top),
        shares=[share],
        log_parts=lambda: [],
        weights=p.weights,
        q=lambda: exp(over(student - top, by.student) - of_student + log_lift),
        lift=1.0 if lift is None else lift,
        unit=scale,
        beta=p.beta,
        normalized=False,
        classes=classes,
    )


def log_of(x: Tensor) -> Tensor:
    """`log(x)`, also of subnormal numbers; where x is 0 its gradient is 0."""
    raised = torch.where(x < torch.finfo(x.dtype).tiny, 2.0**64, 1.0).to(x.dtype)
    is_zero = x == 0
    return ((x * raised).masked_fill(is_zero, 1).log() - raised.log()).masked_fill(
        is_zero, -torch.inf
    )


def log_shares(
    exponents: Sequence[Tensor], totals: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """Of each teacher's weighted probabilities."""
    return [
        z - total + as_tensor(weight, z.dtype, z.device).log()
        for z, total, weight in zip(exponents, totals, weights, strict=True)
    ]


def log_of_mean(mean: Tensor, log_mean: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """`log_mean`; where the mean underflows, of the shares' logarithms."""
    terms = torch.stack([*shares])
    excluded = (terms == -torch.inf).all(0)
    underflows = mean < torch.finfo(mean.dtype).tiny
    found = torch.where(underflows, terms.masked_fill(excluded, 0).logsumexp(0), log_mean)
    return found.masked_fill(excluded, -torch.inf)


def divergence_rows(
    student: Tensor,
    teachers: Sequence[Tensor] | Slots,
    ignored: Tensor | None,
    lift: Tensor,
    p: SoftTarget,
    by: Temperatures,
    classes: Classes = HERE,
) -> Tensor:
    """`lift * T * D(sum(w * softmax(teacher/T_t)), softmax(student/T))` of rows, scaled.

    `lift` is a factor of the loss that multiplies within the exponential. In backward it would come
    to p with the difference of two logits, and their product overflow, before p makes it small.
    """
    if isinstance(teachers, Slots):
        return lift * rows_of_slots(student, teachers, p, by, classes)
    sides = compared(student, teachers, p, by, lift, classes)
    rows = DIVERGENCES[p.divergence].rows(sides)
    if ignored is None or sides.normalized:
        return rows
    return rows.masked_fill(ignored, 0)  # of logits it is 0 as it is


def lift_for(factor: Tensor) -> Tensor:
    """What `divergence_rows` takes where the loss is the sum of `T D` times `factor`.

    The gradient of p is then no larger than a float can be. One number serves all rows.
    """
    lift = (8 * factor.detach().abs()).clamp(min=1)
    if lift.ndim == 0:
        return lift
    return lift.nan_to_num(1, 1).amax() if lift.numel() else lift.new_ones(())


def _classes(logits: Tensor, p: SoftTarget) -> int:
    """How many exist."""
    return logits.shape[p.dim] if p.num_classes is None else p.num_classes


def prepared(
    student: Tensor,
    teachers: Sequence[Tensor] | Slots,
    labels: Tensor | None,
    p: SoftTarget,
    classes: Classes = HERE,
) -> tuple[Tensor, Any, Tensor]:
    """The sides, classes last, and what a sum of losses is divided by.

    Slots are those of their rows already.
    """
    dtype = compute_dtype(student, *teachers)
    stored = () if isinstance(teachers, Slots) else teachers
    student, *others = (
        x.narrow(p.dim, 0, _classes(x, p)).to(dtype).movedim(p.dim, -1) for x in (student, *stored)
    )
    divisor = divisor_of(student.shape[:-1].numel(), classes.count(student), student, labels, p)
    if labels is not None:
        ignored = labels == p.ignore_index
        # Filled rather than multiplied by 0 afterwards: an ignored row may hold NaN or infinity.
        student, *others = (x.masked_fill(ignored[..., None], 0) for x in (student, *others))
    return student, teachers if isinstance(teachers, Slots) else others, divisor


def divisor_of(
    rows: int, classes: int, like: Tensor, labels: Tensor | None, p: SoftTarget
) -> Tensor:
    """What a sum of losses of rows is divided by, in the dtype of `like`."""
    if labels is None:
        count = as_tensor(rows, like.dtype, like.device)
    else:
        count = (labels != p.ignore_index).sum().to(like.dtype)
    of_row = {"batchmean": 1, "mean": classes}.get(p.reduction, 0)
    return (count * of_row).clamp(min=1)


def soft_target_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    classes: Classes = HERE,
) -> Tensor:
    """`soft_weight * D(p, q)` of each row that counts, reduced."""
    student, teachers, divisor = prepared(student, teachers, labels, p, classes)
    by = temperatures_of(temperatures, labels, p)
    factor = of_rows(by.weight) / divisor
    lift = lift_for(factor)
    # Divided before they are added up, because only the mean may be representable.
    ignored = None if labels is None else labels == p.ignore_index
    rows = divergence_rows(student, teachers, ignored, lift, p, by, classes)
    rows = rows * (factor / lift / LOGIT_SCALE)
    return rows if p.reduction == "none" else rows.sum()


def zero(x: Tensor) -> Tensor:
    """0, with a gradient of 0, whatever `x` holds."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0).sum()


def teacher_gradients(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    wanted: Sequence[bool],
    p: SoftTarget,
) -> list[Tensor | None]:
    """The gradients of the teachers that want one, for kernels that leave them to torch.

    With slopes r and `p_m` one teacher's probabilities it is `w_m/T_t p_m (r - sum(p_m r))`. Of
    probabilities that are used as they are it is r, and of their logarithms `p r`.
    """
    wanting = list(zip(teachers, wanted, strict=True))
    if p.soft_weight == 0 or not any(wanted):
        return [torch.zeros_like(t) if want else None for t, want in wanting]
    student, logits, divisor = prepared(student, teachers, labels, p)
    by = temperatures_of(temperatures, labels, p)
    factor = by.teacher_weight * grad_output.to(student.dtype)[..., None] / divisor
    if labels is not None:
        factor = factor.masked_fill((labels == p.ignore_index)[..., None], 0)
    sides = compared(student, logits, p, by)
    factor = factor / sides.unit
    divergence = DIVERGENCES[p.divergence]
    if sides.normalized:
        gradients = divergence.to_teachers(sides)
    else:
        gradients = [divergence.to_stated(sides, p.teacher_is)]
    return [
        _padded((factor * gradient).movedim(-1, p.dim).to(teacher.dtype), teacher, p.dim)
        if want
        else None
        for (teacher, want), gradient in zip(wanting, gradients, strict=True)
    ]


def _padded(gradient: Tensor, like: Tensor, dim: int) -> Tensor:
    """Of as many classes as are stored: 0 where none exist."""
    if gradient.shape == like.shape:
        return gradient
    stored = torch.zeros_like(like)
    stored.narrow(dim, 0, gradient.shape[dim]).copy_(gradient)
    return stored
