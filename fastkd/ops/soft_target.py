"""Autograd of soft targets, alone and with the hard labels.

Both losses are one kernel: `soft_weight · D(p, q) + hard_weight · CE` of each row, where a loss
without labels has no second term. The target p is the mean of the teachers' probabilities, which no
memory ever holds.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd.autograd import (
    Fused,
    check_grad_output,
    differentiate_once,
    eager_gradient,
    for_grad_output,
    is_final,
    no_grad,
    of_wanted,
    savable,
    scales,
    wants_gradient,
)
from fastkd.ops.soft_target_operators import (
    backward,
    existing,
    forward,
    rescale,
    times,
    weighted,
)
from fastkd.ops.temperatures import exchanged, to_temperatures
from fastkd.parameters import SoftTarget
from fastkd.reference.soft_target import teacher_gradients

# The divergences whose gradients follow from statistics. For another one a row is read as in
# forward, and its teacher's gradient is the student's of this one with the sides exchanged.
_MIRRORED = {
    "jsd": "jsd",
    "tvd": "tvd",
    "skew_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_kl",
}


def has_statistics(p: SoftTarget) -> bool:
    """Whether kernels compute all gradients, from statistics of the rows."""
    return len(p.weights) == 1 and p.divergence not in _MIRRORED and p.teacher_is == "logits"


class SoftTargetLoss(Fused):
    """The loss and its parts, which are None where nobody asks; only the loss is differentiable.

    `apply(with_parts, parameters, labels, factor, student, *teachers, *temperatures)`. With a
    factor, a number or one for each row, the loss is the sum of what kernels find times that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        with_parts: bool,
        p: SoftTarget,
        labels: Tensor | None,
        factor: Tensor | None,
        student: Tensor,
        *others: Tensor,
    ) -> Any:
        needed, count = ctx.needs_input_grad, len(p.weights)
        teachers, temperatures = others[:count], others[count:]
        with_gradient = (
            needed[4]
            and not any(needed[5:])
            and (p.reduction != "none" or factor is not None)
            and eager_gradient(student)
        )
        scaled = with_gradient and scales(student)
        with_statistics = not scaled and has_statistics(p)
        loss, parts, statistics, gradient = forward(
            student,
            teachers,
            labels,
            temperatures,
            factor if with_gradient else None,
            with_parts,
            with_statistics,
            with_gradient,
            p,
        )
        # What is absent is an empty tensor where the dispatcher was asked.
        statistics = statistics if with_statistics else None
        if scaled:
            ctx.save_for_backward(gradient, student)
        else:
            ctx.save_for_backward(*savable(gradient, student, labels, statistics, factor, *others))
        ctx.parameters, ctx.with_gradient = p, with_gradient
        if factor is not None:
            loss = weighted(loss, factor)
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_others = (None,) * (len(needed) - 5)
        if ctx.with_gradient and is_final(grad_output):
            return (None, None, None, None, gradient, *of_others)
        check_grad_output("a loss on logits", grad_output)
        p = ctx.parameters
        labels, statistics, factor, *others = others or (None, None, None)
        count = len(p.weights)
        inputs = student, others[:count], labels, others[count:], statistics
        with no_grad():
            if ctx.with_gradient:
                (to,) = for_grad_output(
                    [gradient],
                    grad_output,
                    p.backend,
                    lambda to, in_place: rescale(to[0], grad_output, *inputs, factor, in_place, p),
                )
                gradients: tuple[Tensor | None, ...] = (to, *of_others)
            else:
                gradients = all_gradients(times(grad_output, factor), *inputs, needed[4:], p)
        found = differentiate_once("a loss on logits", gradients, (student, *others))
        return (None, None, None, None, *found)


def all_gradients(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    wanted: Sequence[bool],
    p: SoftTarget,
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, of the student, the teachers and the temperatures."""
    sides = 1 + len(teachers)
    inputs = grad_output, student, teachers, labels, temperatures, statistics
    if not any(wanted[sides:]):
        of_others = (None,) * (len(wanted) - sides)
        return *_gradients_of_sides(*inputs, wanted[:sides], p), *of_others
    if statistics is not None:
        *of_sides, found = backward(*inputs, *wanted[:2], any(wanted[2:]), p)
        return *of_wanted(of_sides, wanted[:2]), *of_wanted(found.unbind(), wanted[2:])
    of_sides = _gradients_of_sides(*inputs, wanted[:sides], p)
    student, teachers = existing(p, student, teachers)
    inputs = grad_output, student, teachers, labels, temperatures, statistics
    p = p._replace(num_classes=None)
    return *of_sides, *to_temperatures(*inputs, wanted[sides:], p, _gradients_of_sides, forward)


def _gradients_of_sides(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    wanted: Sequence[bool],
    p: SoftTarget,
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, of the student and the teachers.

    Several teachers rarely learn, and neither do probabilities: their gradients are computed in
    torch's own operations.
    """
    inputs = grad_output, student, teachers, labels, temperatures
    if not any(wanted):
        return (None,) * len(wanted)
    if has_statistics(p):
        return of_wanted(backward(*inputs, statistics, *wanted, False, p)[:2], wanted)
    to_student, *to_teachers = wanted
    found = backward(*inputs, None, True, False, False, p)[0] if to_student else None
    if len(teachers) > 1 or p.teacher_is != "logits":
        return found, *teacher_gradients(*inputs, to_teachers, p)
    if not to_teachers[0]:
        return found, None
    sides_exchanged = grad_output, teachers[0], [student], labels, exchanged(temperatures)
    return found, backward(*sides_exchanged, None, True, False, False, mirrored(p))[0]


def mirrored(p: SoftTarget) -> SoftTarget:
    """Of the divergence of student and teacher in each other's place, without the labels' term."""
    return p._replace(
        temperature=p.teacher_temperature,
        teacher_temperature=p.temperature,
        softcap=p.teacher_softcap,
        teacher_softcap=p.softcap,
        divergence=_MIRRORED[p.divergence],
        beta=1 - p.beta if p.divergence == "jsd" else p.beta,
        hard_weight=0.0,
        label_smoothing=0.0,
    )


def soft_target(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    with_parts: bool = False,
    factor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`(loss,)` or `(loss, hard, T² KL)`, the loss differentiable where that is wanted.

    The factor is no part of the parts.
    """
    parts: Any = None
    if wants_gradient(student, *teachers, *temperatures):
        sides = student, *teachers
        found = SoftTargetLoss.record(with_parts, p, labels, factor, *sides, *temperatures)
        loss, parts = found if with_parts else (found, None)
    else:
        inputs = student, teachers, labels, temperatures
        loss, parts, *_ = forward(*inputs, None, with_parts, False, False, p)
        if factor is not None:
            loss = weighted(loss, factor)
    return (loss, *parts.unbind()) if with_parts else (loss,)
