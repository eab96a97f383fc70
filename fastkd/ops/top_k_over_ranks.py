"""Losses whose teacher kept k classes, on logits whose classes are split over ranks.

A row is known by few numbers: the sums over the classes that no slot lists, which kernels find of
those that are here, and the logits of the slots and of the label, each of which one rank has. One
exchange makes them those of whole rows. The loss follows from them without another look at the
logits, and so does the gradient of each class.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import (
    Fused,
    check_grad_output,
    differentiate_once,
    no_grad,
    savable,
    wants_gradient,
)
from fastkd.ops.rows_over_ranks import (
    IGNORED,
    Side,
    labels_here,
    of_shard,
    whole_rows,
    wrong_labels,
)
from fastkd.ops.soft_target_operators import existing
from fastkd.ops.temperatures import by_temperature, of_divergence
from fastkd.ops.top_k import in_rows, to_slots
from fastkd.ops.top_k_operators import SUMS, backward_of_shard, forward_of_shard, sums_of_shard
from fastkd.parameters import SoftTarget
from fastkd.precision import widest_dtype
from fastkd.ranks import Ranks
from fastkd.reference.scaled import LOGIT_SCALE
from fastkd.reference.top_k import Slots


def top_k_rows(
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """As `soft_target_rows`; slots and labels are those of all classes."""
    indices, log_p, log_rest = in_rows(slots)
    if wants_gradient(student, *slots, *temperatures):
        inputs = ranks, p, slots.listed_only, indices, labels
        found = _TopKRanksLoss.record(*inputs, student, log_p, log_rest, *temperatures)
        return found[0], found[1]
    flat = Slots(indices, log_p, log_rest, slots.listed_only)
    loss, parts, *_ = forward(student, flat, labels, p, temperatures, ranks, False)
    return loss, parts


class _TopKRanksLoss(Fused):
    """`apply(ranks, parameters, listed_only, indices, labels, student, log_p, log_rest, *T)`."""

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        p: SoftTarget,
        listed_only: bool,
        indices: Tensor,
        labels: Tensor | None,
        student: Tensor,
        log_p: Tensor,
        log_rest: Tensor | None,
        *temperatures: Tensor,
    ) -> Any:
        of_slots = any(ctx.needs_input_grad[6:8])
        slots = Slots(indices, log_p, log_rest, listed_only)
        loss, parts, *kept = forward(student, slots, labels, p, temperatures, ranks, of_slots)
        inputs = student, log_p, log_rest, indices, labels
        ctx.save_for_backward(*savable(*inputs, *kept, *temperatures))
        ctx.parameters, ctx.ranks, ctx.listed_only = p, ranks, listed_only
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        student, log_p, log_rest, indices, labels, *others = ctx.saved_tensors
        sums, logits, log_q, divergence, *temperatures = others
        check_grad_output("a loss on logits", grad_output)
        slots = Slots(indices, log_p, log_rest, ctx.listed_only)
        with no_grad():
            found = gradients(
                (grad_output * LOGIT_SCALE).to(log_p.dtype),
                *(student, slots, labels, ctx.parameters, temperatures, ctx.ranks),
                *(sums, logits, log_q, divergence, ctx.needs_input_grad[5:]),
            )
        learning = (x for x in (student, log_p, log_rest, *temperatures) if x is not None)
        return *(None,) * 5, *differentiate_once("a loss on logits", found, tuple(learning))


def forward(
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
    with_log_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The scaled losses of rows, their parts, and what `gradients` takes.

    The slots are one row after another, as kernels take them. What is kept are the sums of whole
    rows, the logits of slots and labels, the student's log-probabilities if `with_log_q`, and the
    divergences of rows.
    """
    shard, _, here, q = _of_kernels(student, labels, p, ranks)
    sums, logits = _exchange(student, slots, labels, here, q, temperatures, ranks)
    inputs = slots.indices, *_logs(slots), here, temperatures, sums, logits, slots.listed_only
    loss, parts, log_q = forward_of_shard(shard, *inputs, with_log_q, q)
    widest = widest_dtype(student.device)
    scaled = [x.to(widest) * LOGIT_SCALE for x in (loss, parts)]
    return *scaled, sums, logits, log_q if with_log_q else None, parts[1]


def gradients(
    grad_output: Tensor,
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
    sums: Tensor,
    logits: Tensor,
    log_q: Tensor | None,
    divergence: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, of the student, log_p, log_rest and the temperatures.

    They are for a `grad_output` of the losses without their scale, in the dtype of `log_p`.
    """
    shard, first, here, q = _of_kernels(student, labels, p, ranks)
    of_call = temperatures, sums, logits, slots.listed_only, first
    of_rows = slots.indices, *_logs(slots), here

    def to_shard(x: Tensor, q: SoftTarget) -> Tensor:
        return backward_of_shard(grad_output, x, *of_rows, *of_call, q)

    of_student = None
    if wanted[0]:
        of_student = to_shard(shard, q) if ranks.here else torch.zeros_like(student)
    logs = to_slots(grad_output, shard, *_logs(slots), log_q, here, temperatures, q)
    if not temperatures or not (wanted[3] or wanted[5]):
        return of_student, *logs, *(None for _ in temperatures)
    ignored = None if here is None else here == IGNORED
    part = torch.zeros_like(grad_output)
    if wanted[3] and ranks.here and p.soft_weight:
        x = existing(q, shard, ())[0].to(grad_output.dtype)
        soft = of_divergence(q)._replace(num_classes=None)
        heat = temperatures[0] if ignored is None else temperatures[0].masked_fill(ignored, 1)
        top = _largest(slots, sums, logits).view(grad_output.shape).unsqueeze(p.dim)
        part = by_temperature(to_shard(x, soft), x, heat, p.dim, top)
    # T² is the same on every rank; through the logits each has a part of the derivative.
    of_logits = ranks.total(part.to(torch.float64)).to(part.dtype)
    of_root = 2 * divergence / temperatures[2] * grad_output * p.soft_weight
    if p.soft_weight == 0:  # then nothing may show, whatever the temperatures are
        of_root = torch.zeros_like(of_root)
    if ignored is not None:
        of_root = of_root.masked_fill(ignored, 0)
    every = of_logits, None, of_root
    heats = (x if want else None for x, want in zip(every, wanted[3:], strict=True))
    return of_student, *logs, *heats


def _largest(slots: Slots, sums: Tensor, logits: Tensor) -> Tensor:
    """The maxima of whole rows."""
    listed = logits[:, :-1].masked_fill(slots.indices < 0, -torch.inf).amax(-1)
    return torch.maximum(sums[:, 0].to(listed.dtype), listed)


def _logs(slots: Slots) -> tuple[Tensor, Tensor | None]:
    return slots.log_p, slots.log_rest


def _of_kernels(
    student: Tensor, labels: Tensor | None, p: SoftTarget, ranks: Ranks
) -> tuple[Tensor, int, Tensor | None, SoftTarget]:
    """The shard as kernels take it: its logits, its first class, labels and parameters.

    They take no rows without classes: one that is behind all others stands for a shard of none.
    """
    here, q = labels_here(labels, p, ranks), of_shard(p, ranks)
    if ranks.here:
        return student, ranks.first, here, q
    shape = *student.shape[: p.dim], 1, *student.shape[p.dim + 1 :]
    return student.new_zeros(shape), ranks.classes, here, q._replace(num_classes=None)


def _exchange(
    student: Tensor,
    slots: Slots,
    labels: Tensor | None,
    here: Tensor | None,
    q: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """The sums of whole rows, and the logits of slots and labels, in the precision of the loss."""
    widest, (rows, k) = widest_dtype(student.device), slots.indices.shape
    columns = student.new_zeros((rows, SUMS + k + 1), dtype=widest)
    columns[:, 0] = -torch.inf
    has_classes = here is not None and q.labels_are_classes
    if ranks.here:
        if has_classes or not slots.listed_only:
            # The arithmetic is that of the logits' dtype, or the loss's if that is float64.
            wide = student.to(widest) if slots.log_p.dtype == torch.float64 else student
            inputs = wide, slots.indices, here, temperatures, slots.listed_only, ranks.first
            columns[:, :SUMS] = sums_of_shard(*inputs, q)
        local = slots.indices.to(torch.int64) - ranks.first
        label = here if here is not None and has_classes else local.new_full((rows,), IGNORED)
        columns[:, SUMS:] = _logits_of(student, torch.cat([local, label.view(-1, 1)], 1), q, ranks)
    found = ranks.gather(columns)
    tops, at_temperature, at_1, totals = found[..., :SUMS].unbind(-1)
    heat: Any = temperatures[0].flatten().to(widest) if temperatures else q.temperature
    whole, _ = whole_rows(Side(tops, at_temperature), 1 if slots.listed_only else heat)
    hard, _ = whole_rows(Side(tops, at_1), 1)
    sums = torch.stack([whole.top, whole.sum, hard.sum, totals.sum(0)], 1)
    ignored = None if here is None else (here == IGNORED).flatten()
    wrong = wrong_labels(labels, ignored, q, ranks)
    if wrong is not None:
        sums = sums.masked_fill(wrong[:, None], torch.nan)
    logits = found[..., SUMS:].sum(0).to(slots.log_p.dtype)
    logits[:, :-1].masked_fill_(slots.indices >= ranks.classes, torch.nan)
    return sums, logits


def _logits_of(student: Tensor, classes: Tensor, q: SoftTarget, ranks: Ranks) -> Tensor:
    """Of each row those of these classes, counted from the first one here; 0 of other shards'."""
    at = classes.clamp(0, ranks.here - 1)
    rows = student.shape[: q.dim] + student.shape[q.dim + 1 :]
    at = at.view(*rows, classes.shape[1]).movedim(-1, q.dim)
    found = student.detach().gather(q.dim, at).movedim(q.dim, -1).reshape(classes.shape)
    return found.masked_fill((classes < 0) | (classes >= ranks.here), 0)
