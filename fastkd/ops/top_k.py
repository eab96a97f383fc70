"""Autograd of losses on logits whose teacher kept k classes.

The teacher's side is small, and torch's own operations prepare it: `Slots`. Their gradients are
computed in torch, too, from the student's log-probabilities of the slots, which forward keeps where
they are wanted.
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
    savable,
    scales,
    wants_gradient,
)
from fastkd.ops.soft_target_inplace import instead_of_logits
from fastkd.ops.soft_target_operators import existing, times, weighted
from fastkd.ops.temperatures import to_temperatures
from fastkd.ops.top_k_operators import backward, forward, forward_, rescale
from fastkd.parameters import SoftTarget
from fastkd.reference.divergence import DIVERGENCES
from fastkd.reference.soft_target import divisor_of
from fastkd.reference.top_k import Slots, sides_of


class TopKLoss(Fused):
    """The loss and its parts, which are None where nobody asks; only the loss is differentiable.

    `apply(with_parts, parameters, listed_only, indices, labels, factor, student, log_p, log_rest,
    *temperatures)`, where rows of slots are in the order of the student's. The factor is as that of
    `SoftTargetLoss`. The teacher's temperature gets no gradient here: it is a part of log_p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        with_parts: bool,
        p: SoftTarget,
        listed_only: bool,
        indices: Tensor,
        labels: Tensor | None,
        factor: Tensor | None,
        student: Tensor,
        log_p: Tensor,
        log_rest: Tensor | None,
        *temperatures: Tensor,
    ) -> Any:
        needed = ctx.needs_input_grad
        with_gradient = (
            needed[6]
            and not any(needed[7:])
            and (p.reduction != "none" or factor is not None)
            and eager_gradient(student)
        )
        slots = indices, log_p, log_rest
        loss, parts, log_q, gradient = forward(
            student,
            *slots,
            labels,
            temperatures,
            factor if with_gradient else None,
            listed_only,
            with_parts,
            any(needed[7:9]),
            with_gradient,
            p,
        )
        # What is absent is an empty tensor where the dispatcher was asked.
        log_q = log_q if any(needed[7:9]) else None
        if with_gradient and scales(student):
            ctx.save_for_backward(gradient, student)
        else:
            inputs = gradient, student, *slots, labels, factor, log_q, *temperatures
            ctx.save_for_backward(*savable(*inputs))
        ctx.parameters, ctx.listed_only, ctx.with_gradient = p, listed_only, with_gradient
        if factor is not None:
            loss = weighted(loss, factor)
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        gradient, student, *others = ctx.saved_tensors
        needed, nothing = ctx.needs_input_grad, (None,) * 6
        of_others = (None,) * (len(needed) - 7)
        if ctx.with_gradient and is_final(grad_output):
            return *nothing, gradient, *of_others
        check_grad_output("a loss on logits", grad_output)
        p, listed_only = ctx.parameters, ctx.listed_only
        of_call: Sequence[Any] = others or (None,) * 6
        indices, log_p, log_rest, labels, factor, log_q, *temperatures = of_call
        inputs: Any = student, indices, log_p, log_rest, labels, temperatures, listed_only
        with no_grad():
            if ctx.with_gradient:
                (to,) = for_grad_output(
                    [gradient],
                    grad_output,
                    p.backend,
                    lambda to, _: rescale(to[0], times(grad_output, factor), *inputs, p),
                )
                gradients: tuple[Tensor | None, ...] = (to, *of_others)
            else:
                upstream = times(grad_output, factor)
                to_student, to_slots, to_heat = all_gradients(
                    *(upstream, student, indices, log_p, log_rest, labels, temperatures),
                    *(listed_only, log_q, needed[6], needed[9:], p),
                )
                gradients = to_student, *to_slots, *to_heat
        learning = (x for x in (student, log_p, log_rest, *temperatures) if x is not None)
        return *nothing, *differentiate_once("a loss on logits", gradients, tuple(learning))


def all_gradients(
    grad_output: Tensor,
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    listed_only: bool,
    log_q: Tensor | None,
    to_student: bool,
    to_temperatures: Sequence[bool],
    p: SoftTarget,
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None], tuple[Tensor | None, ...]]:
    """Those that are wanted: the student's, those of the slots if there is log_q, and of T."""
    inputs = student, indices, log_p, log_rest, labels, temperatures, listed_only
    return (
        backward(grad_output, *inputs, p) if to_student else None,
        to_slots(grad_output, student, log_p, log_rest, log_q, labels, temperatures, p),
        _to_temperatures(to_temperatures, p, grad_output, *inputs),
    )


def to_slots(
    grad_output: Tensor,
    student: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    log_q: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    p: SoftTarget,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `log_p` and `log_rest`, where forward has left log_q for them."""
    if log_q is None:
        return None, None
    rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    divisor = divisor_of(rows.numel(), _classes(student, p), log_p, labels, p)
    weight = grad_output.to(log_p.dtype) * p.soft_weight / divisor
    if temperatures:
        weight = weight * temperatures[2] * temperatures[2]
    weight = weight.expand(rows)
    if labels is not None:
        weight = weight.masked_fill(labels == p.ignore_index, 0)
    logs = log_p, log_q[:, :-1]
    if log_rest is not None:
        logs = torch.cat([log_p, log_rest[:, None]], -1), log_q
    divergence = DIVERGENCES[p.divergence]
    found = divergence.to_stated(sides_of(*logs, logs[1], p.beta), "log_probabilities")
    # A weight of 0 switches its row off, whatever that holds.
    found = (found * weight.reshape(-1, 1)).masked_fill(weight.reshape(-1, 1) == 0, 0)
    return found[:, : log_p.shape[1]], None if log_rest is None else found[:, -1]


def _to_temperatures(
    wanted: Sequence[bool],
    p: SoftTarget,
    grad_output: Tensor,
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    listed_only: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the three temperatures; the teacher's has none of its own."""
    if not temperatures or not (wanted[0] or wanted[2]):
        return (None,) * len(temperatures)
    slots = indices, log_p, log_rest

    def to_student(
        grad_output: Tensor,
        student: Tensor,
        _: Sequence[Tensor],
        labels: Tensor | None,
        temperatures: Sequence[Tensor],
        __: None,
        wanted: Sequence[bool],
        p: SoftTarget,
    ) -> Sequence[Tensor | None]:
        inputs = student, *slots, labels, temperatures, listed_only
        return [backward(grad_output, *inputs, p) if wanted[0] else None]

    def losses(
        student: Tensor,
        _: Sequence[Tensor],
        labels: Tensor | None,
        temperatures: Sequence[Tensor],
        *others: Any,
    ) -> Sequence[Tensor | None]:
        inputs = student, *slots, labels, temperatures, None, listed_only
        return forward(*inputs, False, False, False, others[-1])

    student, _ = existing(p, student, ())
    inputs = grad_output, student.to(log_p.dtype), (), labels, temperatures, None
    found = to_temperatures(*inputs, wanted, p._replace(num_classes=None), to_student, losses)
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


def _classes(student: Tensor, p: SoftTarget) -> int:
    return student.shape[p.dim] if p.num_classes is None else p.num_classes


def in_rows(slots: Slots) -> tuple[Tensor, Tensor, Tensor | None]:
    """One row after another, as kernels take them."""
    shape = -1, slots.indices.shape[-1]
    rest = slots.log_rest
    return (
        slots.indices.reshape(shape).contiguous(),
        slots.log_p.reshape(shape).contiguous(),
        None if rest is None else rest.reshape(-1).contiguous(),
    )


def top_k(
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    with_parts: bool = False,
    factor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `soft_target`."""
    parts: Any = None
    indices, *logs = in_rows(slots)
    inputs: Any
    if wants_gradient(student, *slots, *temperatures):
        inputs = with_parts, p, slots.listed_only, indices, labels, factor
        found = TopKLoss.record(*inputs, student, *logs, *temperatures)
        loss, parts = found if with_parts else (found, None)
    else:
        inputs = student, indices, *logs, labels, temperatures
        loss, parts, *_ = forward(*inputs, None, slots.listed_only, with_parts, False, False, p)
        if factor is not None:
            loss = weighted(loss, factor)
    return (loss, *parts.unbind()) if with_parts else (loss,)


def top_k_(
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    with_parts: bool,
    factor: Tensor | None,
    reference: Any,
) -> tuple[Tensor, ...]:
    """As `soft_target_`."""
    others = *in_rows(slots), labels, temperatures, factor, slots.listed_only

    def by_kernels(student: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, parts = forward_(student, *others, with_parts, p)
        return loss if factor is None else weighted(loss, factor), parts

    return instead_of_logits(student, by_kernels, reference, with_parts, p)
