"""Operators and autograd of soft targets, alone and with the hard labels.

Both losses are one kernel: `soft_weight · D(p, q) + hard_weight · CE` of each row, where a loss
without labels has no second term. The target p is the mean of the teachers' probabilities, which no
memory ever holds.
"""

from collections.abc import Sequence
from typing import Any

import torch
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
from fastkd.operators import define, kernels
from fastkd.parameters import SoftTarget, in_schema
from fastkd.precision import compute_dtype
from fastkd.reference.soft_target import teacher_gradients

# Per row: maximum and sum of exponentials of student and teacher at T, the student's sum at
# temperature 1, the KL divergence and the cross-entropy. These two are multiplied by 2^-24, so that
# those of any finite logits are finite. All that backward needs of a row and its one teacher. Where
# the losses of rows are reduced, the number of rows that count comes after the last row.
STATISTICS = 7

_PARAMETERS = in_schema(SoftTarget)

# The divergences whose gradients follow from statistics. For another one a row is read as in
# forward, and its teacher's gradient is the student's of this one with the sides exchanged.
_MIRRORED = {
    "jsd": "jsd",
    "tvd": "tvd",
    "skew_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_kl",
}


def existing(
    p: SoftTarget, student: Tensor, teachers: Sequence[Tensor], *gradients: Tensor | None
) -> tuple[Any, ...]:
    """The same tensors without the classes that do not exist, where gradients become 0."""
    count = p.num_classes
    if count is None:
        return student, teachers, *gradients

    def existing(x: Tensor) -> Tensor:
        return x.narrow(p.dim, 0, count)

    for gradient in gradients:
        if gradient is not None:
            gradient.narrow(p.dim, count, gradient.shape[p.dim] - count).zero_()
    to = [None if gradient is None else existing(gradient) for gradient in gradients]
    return existing(student), [existing(teacher) for teacher in teachers], *to


def outputs(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    with_parts: bool,
    with_statistics: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Room for the loss, its parts, the statistics and the gradient, as far as they are wanted."""
    dtype = compute_dtype(student, *teachers)
    rows: Sequence[int] = ()
    if p.reduction == "none":
        rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    parts = statistics = None
    if with_parts:
        parts = student.new_empty((2, *rows), dtype=dtype)
    if with_statistics:
        count = student.numel() // student.shape[p.dim]
        statistics = student.new_empty(count * STATISTICS + (p.reduction != "none"), dtype=dtype)
    gradient = torch.empty_like(student) if with_gradient else None
    return student.new_empty(rows, dtype=dtype), parts, statistics, gradient


@define(
    "soft_target_forward(Tensor student, Tensor[] teachers, Tensor? labels, bool with_parts, "
    f"bool with_statistics, bool with_gradient, {_PARAMETERS}) "
    "-> (Tensor loss, Tensor parts, Tensor statistics, Tensor gradient)",
    outputs,
    SoftTarget,
)
def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    with_parts: bool,
    with_statistics: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, its parts `(hard, T² KL)`, what backward needs of each row, and the gradient.

    There are statistics where there is one teacher and the divergence is a KL divergence.
    """
    found = outputs(student, teachers, labels, with_parts, with_statistics, with_gradient, p)
    *of_rows, gradient = found
    student, teachers, gradient = existing(p, student, teachers, gradient)
    kernels(p.backend, "soft_target").soft_target_forward(
        student, teachers, labels, *of_rows, gradient, p
    )
    return found


def _gradients(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    p: SoftTarget,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(student) if to_student else None,
        torch.empty_like(teachers[0]) if to_teacher else None,
    )


@define(
    "soft_target_backward(Tensor grad_output, Tensor student, Tensor[] teachers, Tensor? labels, "
    f"Tensor? statistics, bool to_student, bool to_teacher, {_PARAMETERS}) -> (Tensor, Tensor)",
    _gradients,
    SoftTarget,
)
def backward(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    p: SoftTarget,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the student and of its one teacher, computed from the inputs."""
    found = _gradients(
        grad_output, student, teachers, labels, statistics, to_student, to_teacher, p
    )
    student, teachers, *to = existing(p, student, teachers, *found)
    kernels(p.backend, "soft_target").soft_target_backward(
        grad_output, student, teachers, labels, statistics, *to, p
    )
    return found


@define(
    "soft_target_rescale(Tensor(a!) gradient, Tensor grad_output, Tensor student, "
    f"Tensor[] teachers, Tensor? labels, Tensor? statistics, bool in_place, {_PARAMETERS}) -> ()",
    lambda *_: None,
    SoftTarget,
)
def rescale(
    gradient: Tensor,
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    in_place: bool,
    p: SoftTarget,
) -> None:
    """The student's gradient for a scalar `grad_output`, computed from the inputs.

    `in_place` says that `gradient` holds forward's, for a `grad_output` of 1.
    """
    student, teachers, to = existing(p, student, teachers, gradient)
    kernels(p.backend, "soft_target").soft_target_backward(
        grad_output, student, teachers, labels, statistics, to, None, p, in_place
    )


class SoftTargetLoss(Fused):
    """The loss and its parts, which are None where nobody asks; only the loss is differentiable.

    `apply(with_parts, parameters, labels, student, *teachers)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        with_parts: bool,
        p: SoftTarget,
        labels: Tensor | None,
        student: Tensor,
        *teachers: Tensor,
    ) -> Any:
        needed = ctx.needs_input_grad
        with_gradient = (
            needed[3] and not any(needed[4:]) and p.reduction != "none" and eager_gradient(student)
        )
        scaled = with_gradient and scales(student)
        with_statistics = len(teachers) == 1 and not scaled and p.divergence not in _MIRRORED
        loss, parts, statistics, gradient = forward(
            student, teachers, labels, with_parts, with_statistics, with_gradient, p
        )
        # What is absent is an empty tensor where the dispatcher was asked.
        statistics = statistics if with_statistics else None
        if scaled:
            ctx.save_for_backward(gradient, student)
        else:
            ctx.save_for_backward(*savable(gradient, student, labels, statistics, *teachers))
        ctx.parameters, ctx.with_gradient = p, with_gradient
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_teachers = (None,) * (len(needed) - 4)
        if ctx.with_gradient and is_final(grad_output):
            return (None, None, None, gradient, *of_teachers)
        check_grad_output("a loss on logits", grad_output)
        p = ctx.parameters
        labels, statistics, *teachers = others or (None, None)
        with no_grad():
            if ctx.with_gradient:
                (to,) = for_grad_output(
                    [gradient],
                    grad_output,
                    p.backend,
                    lambda to, in_place: rescale(
                        to[0], grad_output, student, teachers, labels, statistics, in_place, p
                    ),
                )
                gradients: tuple[Tensor | None, ...] = (to, *of_teachers)
            else:
                gradients = _all_gradients(
                    grad_output, student, teachers, labels, statistics, needed[3:], p
                )
        inputs = (student, *teachers)
        found = differentiate_once("a loss on logits", gradients, inputs)
        return (None, None, None, *found)


def _all_gradients(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    wanted: Sequence[bool],
    p: SoftTarget,
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, of the student and the teachers.

    Several teachers rarely learn: their gradients are computed in torch's own operations.
    """
    inputs = grad_output, student, teachers, labels
    if len(teachers) == 1 and p.divergence not in _MIRRORED:
        return of_wanted(backward(*inputs, statistics, *wanted, p), wanted)
    to_student, *to_teachers = wanted
    found = backward(*inputs, None, True, False, p)[0] if to_student else None
    if len(teachers) > 1:
        return found, *teacher_gradients(*inputs, to_teachers, p)
    if not to_teachers[0]:
        return found, None
    exchanged = grad_output, teachers[0], [student], labels
    return found, backward(*exchanged, None, True, False, _mirrored(p))[0]


def _mirrored(p: SoftTarget) -> SoftTarget:
    """Of the divergence of student and teacher in each other's place, without the labels' term."""
    return p._replace(
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
    with_parts: bool = False,
) -> tuple[Tensor, ...]:
    """`(loss,)` or `(loss, hard, T² KL)`, the loss differentiable where that is wanted."""
    parts: Any = None
    if wants_gradient(student, *teachers):
        found = SoftTargetLoss.record(with_parts, p, labels, student, *teachers)
        loss, parts = found if with_parts else (found, None)
    else:
        loss, parts, *_ = forward(student, teachers, labels, with_parts, False, False, p)
    return (loss, *parts.unbind()) if with_parts else (loss,)
