"""Losses on logits whose gradient takes the place of the student's logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import Fused, is_final, keeps_graph
from fastkd.operators import define, kernels
from fastkd.ops.soft_target_operators import existing, fill_padding, outputs, weighted
from fastkd.parameters import SoftTarget, in_schema


def _losses(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None]:
    inputs = student, teachers, labels, temperatures
    loss, parts, *_ = outputs(*inputs, factor, with_parts, False, False, p)
    return loss, parts


@define(
    "soft_target_forward_(Tensor(a!) student, Tensor[] teachers, Tensor? labels, "
    f"Tensor[] temperatures, Tensor? factor, bool with_parts, {in_schema(SoftTarget)}) "
    "-> (Tensor loss, Tensor parts)",
    _losses,
    SoftTarget,
)
def forward_(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None]:
    """The loss and its parts `(hard, T² D)`; `student` then holds the gradient.

    The gradient alone is multiplied by the factor, a number or one for each row.
    """
    loss, parts = _losses(student, teachers, labels, temperatures, factor, with_parts, p)
    logits, teachers, gradient = existing(p, student, teachers, student)
    kernels(p.backend, "soft_target").soft_target_forward(
        logits,
        teachers,
        labels,
        loss,
        parts,
        None,
        gradient,
        p,
        temperatures=temperatures,
        grad_output=factor,
    )
    fill_padding(p, student)
    return loss, parts


class _InPlace(Fused):
    """`apply(losses, student)` is the student, which holds the gradient, and `losses(student)`.

    The first result makes this function a part of the history of whatever uses the student later.
    """

    @staticmethod
    def forward(
        ctx: Any, losses: Callable[[Tensor], tuple[Tensor, Tensor | None]], student: Tensor
    ) -> Any:
        loss, parts = losses(student)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(student)
        ctx.save_for_backward(student)
        if parts is not None:
            ctx.mark_non_differentiable(parts)
        return student, loss, parts

    @staticmethod
    def backward(ctx: Any, of_student: Tensor | None, grad_output: Tensor | None, *_: Any) -> Any:
        if of_student is not None:
            raise RuntimeError(
                "the student's logits were used after a loss on them with inplace=True, when they "
                "held its gradient: use them before, or pass inplace=False"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss on logits with inplace=True can be differentiated only once: pass "
                'inplace=False and backend="reference"'
            )
        if grad_output is None:
            return None, None
        gradient = ctx.saved_tensors[0].detach()
        if is_final(grad_output):
            return None, gradient
        return None, gradient * grad_output if keeps_graph() else gradient.mul_(grad_output)


def soft_target_(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    with_parts: bool,
    factor: Tensor | None,
    reference: Callable[[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """`(loss,)` or `(loss, hard, T² D)`; `reference(student)` are these by the reference.

    The factor multiplies the loss, and is no part of the parts.
    """

    def by_kernels(student: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, parts = forward_(student, teachers, labels, temperatures, factor, with_parts, p)
        return loss if factor is None else weighted(loss, factor), parts

    return instead_of_logits(student, by_kernels, reference, with_parts, p)


def instead_of_logits(
    student: Tensor,
    by_kernels: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    reference: Callable[[Tensor], Sequence[Tensor]],
    with_parts: bool,
    p: SoftTarget,
) -> tuple[Tensor, ...]:
    """`(loss,)` or `(loss, hard, T² D)` of logits in whose place the gradient is written."""

    def by_reference(student: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            loss, *parts = reference(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        student.copy_(gradient)
        return loss.detach(), torch.stack(parts) if with_parts else None

    losses = by_reference if p.backend == "reference" else by_kernels
    _, loss, parts = _InPlace.record(losses, student)
    return (loss, *parts.unbind()) if with_parts else (loss,)
