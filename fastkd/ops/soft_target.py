"""Operators and autograd of soft targets, alone and with the hard labels.

Both losses are one kernel: `soft_weight · KL(p‖q) + hard_weight · CE` of each row, where a loss
without labels has no second term. `soft_weight` holds T² where that is wanted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.library import (
    Fused,
    check_grad_output,
    define,
    differentiate_once,
    eager_gradient,
    for_grad_output,
    is_final,
    kernels,
    no_grad,
    savable,
    scales,
    wants_gradient,
)
from fastkd.reference.precision import compute_dtype
from fastkd.reference.soft_target import LOGIT_SCALE

# Per row: maximum and sum of exponentials of student and teacher at T, the student's sum at
# temperature 1, the KL divergence and the cross-entropy. These two are multiplied by 2^-24, so that
# those of any finite logits are finite. All that backward needs of a row. After the last row come
# the parts of the loss, `(hard, T² KL)`, and the number of rows that count.
STATISTICS = 7
KL, CROSS_ENTROPY = 5, 6
PARTS = 3

PARAMETERS = (
    "float temperature, float soft_weight, float hard_weight, float label_smoothing, "
    "int ignore_index, str reduction, int dim, str backend"
)


class Parameters(NamedTuple):
    """The arguments that every soft-target operator ends with."""

    temperature: float
    soft_weight: float
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    dim: int
    backend: str


def _outputs(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    with_statistics: bool,
    with_gradient: bool,
    p: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = compute_dtype(student, teacher)
    rows: Sequence[int] = ()
    if p.reduction == "none":
        rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    statistics = None
    if with_statistics:
        count = student.numel() // student.shape[p.dim]
        statistics = student.new_empty(count * STATISTICS + PARTS, dtype=dtype)
    gradient = torch.empty_like(student) if with_gradient else None
    return student.new_empty(rows, dtype=dtype), statistics, gradient


@define(
    "soft_target_forward(Tensor student, Tensor teacher, Tensor? labels, bool with_statistics, "
    f"bool with_gradient, {PARAMETERS}) -> (Tensor loss, Tensor statistics, Tensor gradient)",
    _outputs,
    Parameters,
)
def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    with_statistics: bool,
    with_gradient: bool,
    p: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, what backward needs of each row and the parts after it, and the gradient."""
    outputs = _outputs(student, teacher, labels, with_statistics, with_gradient, p)
    kernels(p.backend, "soft_target").soft_target_forward(student, teacher, labels, *outputs, p)
    return outputs


def _gradients(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    to_student: bool,
    to_teacher: bool,
    p: Parameters,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(student) if to_student else None,
        torch.empty_like(teacher) if to_teacher else None,
    )


@define(
    "soft_target_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor? labels, "
    f"Tensor statistics, bool to_student, bool to_teacher, {PARAMETERS}) -> (Tensor, Tensor)",
    _gradients,
    Parameters,
)
def backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    to_student: bool,
    to_teacher: bool,
    p: Parameters,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients, computed from the inputs."""
    inputs = grad_output, student, teacher, labels, statistics
    to = _gradients(*inputs, to_student, to_teacher, p)
    kernels(p.backend, "soft_target").soft_target_backward(*inputs, *to, p)
    return to


@define(
    "soft_target_rescale(Tensor(a!) gradient, Tensor grad_output, Tensor student, Tensor teacher, "
    f"Tensor? labels, Tensor statistics, bool in_place, {PARAMETERS}) -> ()",
    lambda *_: None,
    Parameters,
)
def rescale(
    gradient: Tensor,
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    in_place: bool,
    p: Parameters,
) -> None:
    """The student's gradient for a scalar `grad_output`, computed from the inputs.

    `in_place` says that `gradient` holds forward's, for a `grad_output` of 1.
    """
    kernels(p.backend, "soft_target").soft_target_backward(
        grad_output, student, teacher, labels, statistics, gradient, None, p, in_place
    )


class SoftTarget(Fused):
    """The loss, or `(loss, statistics)`; only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        with_parts: bool,
        p: Parameters,
    ) -> Any:
        to_student, to_teacher = ctx.needs_input_grad[:2]
        with_gradient = (
            to_student and not to_teacher and p.reduction != "none" and eager_gradient(student)
        )
        scaled = with_gradient and scales(student)
        loss, statistics, gradient = forward(
            student, teacher, labels, with_parts or not scaled, with_gradient, p
        )
        if scaled:
            ctx.save_for_backward(gradient, student)
        else:
            ctx.save_for_backward(*savable(gradient, student, teacher, labels, statistics))
        ctx.parameters, ctx.with_gradient = p, with_gradient
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        if ctx.with_gradient and is_final(grad_output):
            return gradient, None, None, None, None
        check_grad_output("a loss on logits", grad_output)
        p = ctx.parameters
        to_student, to_teacher = ctx.needs_input_grad[:2]
        with no_grad():
            if ctx.with_gradient:
                (to,) = for_grad_output(
                    [gradient],
                    grad_output,
                    p.backend,
                    lambda to, in_place: rescale(to[0], grad_output, student, *others, in_place, p),
                )
                gradients = to, None
            else:
                gradients = backward(grad_output, student, *others, to_student, to_teacher, p)
        found = (gradients[0] if to_student else None, gradients[1] if to_teacher else None)
        inputs = (student, *others[:1])
        return (*differentiate_once("a loss on logits", found, inputs), None, None, None)


def soft_target(student: Tensor, teacher: Tensor, labels: Tensor | None, p: Parameters) -> Tensor:
    """The loss, differentiable where that is wanted."""
    if wants_gradient(student, teacher):
        loss: Tensor = SoftTarget.record(student, teacher, labels, False, p)
        return loss
    return forward(student, teacher, labels, False, False, p)[0]


def soft_target_parts(
    student: Tensor, teacher: Tensor, labels: Tensor | None, p: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, T² KL)`, the loss differentiable where that is wanted."""
    if wants_gradient(student, teacher):
        loss, statistics = SoftTarget.record(student, teacher, labels, True, p)
    else:
        loss, statistics, _ = forward(student, teacher, labels, True, False, p)
    if p.reduction == "none":
        rows = statistics[:-PARTS].view(*loss.shape, STATISTICS)
        t2 = p.temperature * p.temperature
        return loss, rows[..., CROSS_ENTROPY] / LOGIT_SCALE, rows[..., KL] * t2 / LOGIT_SCALE
    # Copies, because a part that is kept for a log would keep the statistics of all rows.
    return loss, statistics[-3].clone(), statistics[-2].clone()
