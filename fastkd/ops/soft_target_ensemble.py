"""Operators and autograd of soft targets from several teachers, alone and with the hard labels.

The target is the mean of the teachers' probabilities, `sum(w * softmax(teacher/T))`, which no
memory ever holds. Everything else is as for one teacher; see `soft_target`.
"""

from collections.abc import Sequence
from typing import Any

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
from fastkd.ops.soft_target import PARAMETERS, PARTS, Parameters
from fastkd.reference import soft_target as reference
from fastkd.reference.precision import compute_dtype


def _outputs(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    with_parts: bool,
    with_gradient: bool,
    weights: Sequence[float],
    p: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = compute_dtype(student, *teachers)
    rows: Sequence[int] = ()
    if p.reduction == "none":
        rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    parts = student.new_empty(PARTS, dtype=dtype) if with_parts else None
    gradient = torch.empty_like(student) if with_gradient else None
    return student.new_empty(rows, dtype=dtype), parts, gradient


@define(
    "soft_target_ensemble_forward(Tensor student, Tensor[] teachers, Tensor? labels, "
    f"bool with_parts, bool with_gradient, float[] weights, {PARAMETERS}) "
    "-> (Tensor loss, Tensor parts, Tensor gradient)",
    _outputs,
    Parameters,
)
def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    with_parts: bool,
    with_gradient: bool,
    weights: Sequence[float],
    p: Parameters,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, its parts `(hard, T² KL, rows that count)`, and the student's gradient."""
    outputs = _outputs(student, teachers, labels, with_parts, with_gradient, weights, p)
    kernels(p.backend, "soft_target_ensemble").soft_target_ensemble(
        student, teachers, tuple(weights), labels, *outputs, None, p
    )
    return outputs


@define(
    "soft_target_ensemble_backward(Tensor grad_output, Tensor student, Tensor[] teachers, "
    f"Tensor? labels, float[] weights, {PARAMETERS}) -> Tensor",
    lambda _, student, *others: torch.empty_like(student),
    Parameters,
)
def backward(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Sequence[float],
    p: Parameters,
) -> Tensor:
    """The student's gradient, computed from the inputs."""
    to_student = torch.empty_like(student)
    kernels(p.backend, "soft_target_ensemble").soft_target_ensemble(
        student, teachers, tuple(weights), labels, None, None, to_student, grad_output, p
    )
    return to_student


@define(
    "soft_target_ensemble_rescale(Tensor(a!) gradient, Tensor grad_output, Tensor student, "
    f"Tensor[] teachers, Tensor? labels, bool in_place, float[] weights, {PARAMETERS}) -> ()",
    lambda *_: None,
    Parameters,
)
def rescale(
    gradient: Tensor,
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    in_place: bool,
    weights: Sequence[float],
    p: Parameters,
) -> None:
    """The student's gradient for a scalar `grad_output`, computed from the inputs.

    `in_place` says that `gradient` holds forward's, for a `grad_output` of 1.
    """
    kernels(p.backend, "soft_target_ensemble").soft_target_ensemble(
        student, teachers, tuple(weights), labels, None, None, gradient, grad_output, p, in_place
    )


def to_teachers(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    wanted: Sequence[bool],
    weights: Sequence[float],
    p: Parameters,
) -> list[Tensor | None]:
    """The teachers' gradients where they are wanted, in torch's own operations.

    Teachers rarely learn. With `r = log p - log q` and `p_m` one teacher's probabilities its
    gradient is `w_m/T p_m (r - sum(p_m r))`, as of a loss with one teacher.
    """
    if p.soft_weight == 0:
        return [
            torch.zeros_like(t) if want else None for t, want in zip(teachers, wanted, strict=True)
        ]
    dtype = compute_dtype(student, *teachers)
    student, *logits = (x.to(dtype).movedim(p.dim, -1) for x in (student, *teachers))
    rows = student[..., 0].numel()
    count = {"batchmean": rows, "mean": student.numel()}.get(p.reduction, 1)
    factor = p.soft_weight / p.temperature * grad_output.to(dtype)[..., None]
    if labels is None:
        factor = factor / max(count, 1)
    else:
        ignored = (labels == p.ignore_index)[..., None]
        if p.reduction == "batchmean":
            factor = factor / (~ignored).sum().clamp(min=1)
        # Filled first, because an ignored row may hold NaN or infinity.
        student, *logits = (x.masked_fill(ignored, 0) for x in (student, *logits))
        factor = factor.masked_fill(ignored, 0)
    ratio, shares = reference.log_ratio(student, logits, weights, p.temperature)
    factor = factor / (p.temperature * reference.LOGIT_SCALE)
    found: list[Tensor | None] = []
    for teacher, share, weight, want in zip(teachers, shares, weights, wanted, strict=True):
        if not want:
            found.append(None)
            continue
        slope = share * (ratio - (share * ratio).sum(-1, keepdim=True) / weight)
        found.append((factor * slope).movedim(-1, p.dim).to(teacher.dtype))
    return found


class SoftTargetEnsemble(Fused):
    """The loss, or `(loss, parts)`; only the loss is differentiable.

    `apply(with_parts, weights, parameters, labels, student, *teachers)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        with_parts: bool,
        weights: Sequence[float],
        p: Parameters,
        labels: Tensor | None,
        student: Tensor,
        *teachers: Tensor,
    ) -> Any:
        needs_student, *need_teachers = ctx.needs_input_grad[4:]
        with_gradient = (
            needs_student
            and not any(need_teachers)
            and p.reduction != "none"
            and eager_gradient(student)
        )
        loss, parts, gradient = forward(
            student, teachers, labels, with_parts, with_gradient, weights, p
        )
        if with_gradient and scales(student):
            ctx.save_for_backward(gradient, student)
        else:
            ctx.save_for_backward(*savable(gradient, student, labels, *teachers))
        ctx.weights, ctx.parameters, ctx.with_gradient = weights, p, with_gradient
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        weights, p = ctx.weights, ctx.parameters
        needs_student, *need_teachers = ctx.needs_input_grad[4:]
        nothing = (None,) * 4
        if ctx.with_gradient and is_final(grad_output):
            return (*nothing, gradient, *[None] * len(need_teachers))
        check_grad_output("a loss on logits", grad_output)
        labels, teachers = (others[0], others[1:]) if others else (None, [])
        to_student: Tensor | None = None
        with no_grad():
            if ctx.with_gradient:
                (to_student,) = for_grad_output(
                    [gradient],
                    grad_output,
                    p.backend,
                    lambda to, in_place: rescale(
                        to[0], grad_output, student, teachers, labels, in_place, weights, p
                    ),
                )
            elif needs_student:
                to_student = backward(grad_output, student, teachers, labels, weights, p)
            found: list[Tensor | None] = [None] * len(need_teachers)
            if any(need_teachers):
                found = to_teachers(
                    grad_output, student, teachers, labels, need_teachers, weights, p
                )
        gradients = differentiate_once(
            "a loss on logits", (to_student, *found), (student, *teachers)
        )
        return (*nothing, *gradients)


def soft_target_ensemble(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor | None,
    p: Parameters,
) -> Tensor:
    """The loss, differentiable where that is wanted."""
    if wants_gradient(student, *teachers):
        loss: Tensor = SoftTargetEnsemble.record(False, weights, p, labels, student, *teachers)
        return loss
    return forward(student, teachers, labels, False, False, weights, p)[0]


def soft_target_ensemble_parts(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    labels: Tensor | None,
    p: Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, hard, T² KL)`, the loss differentiable where that is wanted."""
    if p.reduction == "none":
        # The kernels keep no numbers of a row: each part is a loss of its own.
        sides = student.detach(), [t.detach() for t in teachers]
        hard, soft = (
            forward(
                *sides, labels, False, False, weights, p._replace(soft_weight=s, hard_weight=h)
            )[0]
            for s, h in ((0.0, 1.0), (p.temperature * p.temperature, 0.0))
        )
        return soft_target_ensemble(student, teachers, weights, labels, p), hard, soft
    if wants_gradient(student, *teachers):
        loss, parts = SoftTargetEnsemble.record(True, weights, p, labels, student, *teachers)
    else:
        loss, parts, _ = forward(student, teachers, labels, True, False, weights, p)
    return loss, parts[0].clone(), parts[1].clone()
