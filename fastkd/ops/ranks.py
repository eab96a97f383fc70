"""Losses on logits whose classes are split over ranks: sums, an exchange, terms, gradients.

Kernels find the statistics of the classes that are here. The ranks' statistics make those of whole
rows, from which kernels compute the gradient of each class. A divergence of probabilities takes one
more step between, and one more exchange: the sums over classes of its terms.
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
    KL,
    Side,
    chained,
    cross_entropy,
    exchange,
    labels_here,
    of_shard,
    whole_rows,
    wrong_labels,
)
from fastkd.ops.soft_target import mirrored
from fastkd.ops.soft_target_operators import backward, terms
from fastkd.ops.temperatures import by_temperature, exchanged, of_divergence
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype, widest_dtype
from fastkd.ranks import Ranks
from fastkd.reference.scaled import LOGIT_SCALE


def soft_target_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """The losses of rows, and their parts `(hard, T² D)`, scaled; every rank has all of them.

    There is one teacher, of logits. The labels are those of all classes.
    """
    if wants_gradient(student, teacher, *temperatures):
        found = _RanksLoss.record(ranks, p, labels, student, teacher, *temperatures)
        return found[0], found[1]
    loss, parts, *_ = forward(student, teacher, labels, p, temperatures, ranks, (False, False))
    return loss, parts


class _RanksLoss(Fused):
    """`apply(ranks, parameters, labels, student, teacher, *temperatures)`."""

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        p: SoftTarget,
        labels: Tensor | None,
        student: Tensor,
        teacher: Tensor,
        *temperatures: Tensor,
    ) -> Any:
        wanted = ctx.needs_input_grad[3:]
        of_temperatures = any(wanted[2:])
        sides = wanted[0] or of_temperatures, wanted[1] or of_temperatures
        loss, parts, *kept = forward(student, teacher, labels, p, temperatures, ranks, sides)
        ctx.save_for_backward(*savable(student, teacher, *kept, *temperatures))
        ctx.parameters, ctx.ranks = p, ranks
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        student, teacher, *others = ctx.saved_tensors
        labels, statistics, of_mirrored, rows, *temperatures = others
        check_grad_output("a loss on logits", grad_output)
        with no_grad():
            found = gradients(
                (grad_output * LOGIT_SCALE).to(compute_dtype(student, teacher)),
                *(student, teacher, labels, temperatures, statistics, of_mirrored, rows),
                *(ctx.needs_input_grad[3:], of_shard(ctx.parameters, ctx.ranks), ctx.ranks),
            )
        inputs = student, teacher, *temperatures
        return None, None, None, *differentiate_once("a loss on logits", found, inputs)


def forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """The losses of rows, their parts, and what backward takes.

    That is the labels here, the statistics of whole rows, those for the teacher's gradient of a
    divergence of probabilities, and the divergences of rows. `wanted` tells of which side there
    will be a gradient.
    """
    shape = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    dtype, widest = compute_dtype(student, teacher), widest_dtype(student.device)
    ignored = None if labels is None else (labels == p.ignore_index).flatten()
    here = labels_here(labels, p, ranks)
    found = exchange(student, teacher, labels, p, temperatures, ranks)
    heat: list[Any] = [t.flatten().to(widest) for t in temperatures]
    heat = heat or [p.temperature, p.teacher_temperature]
    (s_top, s_sum), s_logs = whole_rows(found.student, heat[0])
    (t_top, t_sum), t_logs = whole_rows(found.teacher, heat[1])
    (_, hard_sum), _ = whole_rows(Side(found.student.top, found.hard), 1)
    divergence = torch.zeros_like(s_sum)
    if p.divergence in KL:
        divergence = chained(found, s_logs, t_logs, p.divergence)
    is_valid = (s_sum > 0) & (t_sum > 0)  # False for NaN, too
    divergence = divergence.masked_fill(~is_valid, torch.nan)
    wrong = wrong_labels(labels, ignored, p, ranks)
    if wrong is not None:
        hard_sum = hard_sum.masked_fill(wrong, torch.nan)

    def statistics(divergence: Tensor) -> Tensor:
        columns = s_top, s_sum, t_top, t_sum, hard_sum, divergence, torch.zeros_like(s_sum)
        whole = torch.stack(columns, 1).to(dtype)
        return whole if ignored is None else whole.masked_fill(ignored[:, None], 0)

    of_rows, of_mirrored = statistics(divergence), None
    if p.divergence not in KL:
        inputs = student, teacher, here, temperatures, of_rows
        totals = ranks.total(_terms(*inputs, wanted[1], of_shard(p, ranks)))
        totals = totals.masked_fill(~is_valid, torch.nan)
        # Rounding may leave a tiny negative number.
        divergence = totals[0].clamp(min=0) * LOGIT_SCALE
        of_rows = statistics(totals[1])
        if wanted[1]:
            of_mirrored = _exchange_sides(statistics(totals[2]))
    hard = torch.zeros_like(divergence)
    if labels is not None and p.labels_are_classes:
        hard = cross_entropy(found, s_top, hard_sum, p.label_smoothing, ranks)
    soft = divergence * (heat[2] * heat[2] if temperatures else 1)
    if ignored is not None:
        soft, hard = soft.masked_fill(ignored, 0), hard.masked_fill(ignored, 0)
        divergence = divergence.masked_fill(ignored, 0)
    # A weight of 0 switches its term off, also where the term is infinite or NaN.
    loss = soft * p.soft_weight if p.soft_weight else torch.zeros_like(soft)
    if p.hard_weight:
        loss = loss + hard * p.hard_weight
    parts = torch.stack([hard, soft * (p.temperature * p.temperature)])
    kept = here, of_rows, of_mirrored, divergence.view(shape)
    return loss.view(shape), parts.view(2, *shape), *kept


def _terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    with_mirrored: bool,
    p: SoftTarget,
) -> Tensor:
    """(Σφ, Σψ) of the classes here, and Σψ with the sides exchanged where that is wanted."""
    rows = statistics.shape[0]
    if p.num_classes == 0 or student.shape[p.dim] == 0:
        return statistics.new_zeros((2 + with_mirrored, rows), dtype=torch.float64)
    found = terms(student, [teacher], labels, temperatures, statistics, p).T
    if not with_mirrored:
        return found
    of_sides = teacher, [student], labels, exchanged(temperatures), _exchange_sides(statistics)
    return torch.cat([found, terms(*of_sides, mirrored(p)).T[1:]])


def _exchange_sides(statistics: Tensor) -> Tensor:
    """Of rows with the sides in each other's place; the hard sum is the student's, and stays."""
    return statistics[:, [2, 3, 0, 1, 4, 5, 6]].contiguous()


def gradients(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    of_mirrored: Tensor | None,
    rows: Tensor,
    wanted: Sequence[bool],
    p: SoftTarget,
    ranks: Ranks,
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, of the student, the teacher and the temperatures."""
    inputs = grad_output, student, teacher, labels, temperatures, statistics, of_mirrored
    of_temperatures = any(wanted[2:])
    if not ranks.here:
        sides = [
            torch.zeros_like(x) if want else None for x, want in _pairs(student, teacher, wanted)
        ]
        found = torch.zeros((3, *grad_output.shape), dtype=grad_output.dtype, device=student.device)
    elif p.divergence in KL:
        wishes = *wanted[:2], of_temperatures
        *sides, found = backward(
            grad_output, student, [teacher], labels, temperatures, statistics.flatten(), *wishes, p
        )
    else:
        sides = _of_sides(*inputs, wanted[:2], p)
        if of_temperatures:
            found = _of_temperatures(*inputs, p)
    if not of_temperatures:
        return *sides, *(None for _ in wanted[2:])
    # T² is the same on every rank; through the logits each has a part of the derivative.
    of_logits = ranks.total(found[:2].to(torch.float64)).to(found.dtype)
    root = 2 * (rows / LOGIT_SCALE).to(found.dtype) * grad_output
    root = root * p.soft_weight * temperatures[2]
    if p.soft_weight == 0:  # then nothing may show, whatever the temperatures are
        root = torch.zeros_like(root)
    if labels is not None:
        root = root.masked_fill(labels == IGNORED, 0)
    every = *of_logits.unbind(), root
    return *sides, *(x if want else None for x, want in zip(every, wanted[2:], strict=True))


def _pairs(student: Tensor, teacher: Tensor, wanted: Sequence[bool]) -> Any:
    return zip((student, teacher), wanted[:2], strict=True)


def _of_sides(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    of_mirrored: Tensor | None,
    wanted: Sequence[bool],
    p: SoftTarget,
) -> list[Tensor | None]:
    """Of a divergence of probabilities: the teacher's is the student's with the sides exchanged."""
    found: list[Tensor | None] = [None, None]
    if wanted[0]:
        inputs = grad_output, student, [teacher], labels, temperatures, statistics.flatten()
        found[0] = backward(*inputs, True, False, False, p)[0]
    if wanted[1]:
        assert of_mirrored is not None
        inputs = (
            *(grad_output, teacher, [student], labels, exchanged(temperatures)),
            of_mirrored.flatten(),
        )
        found[1] = backward(*inputs, True, False, False, mirrored(p))[0]
    return found


def _of_temperatures(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    of_mirrored: Tensor | None,
    p: SoftTarget,
) -> Tensor:
    """What the classes here add to the derivatives by both temperatures, through the logits."""
    dtype = compute_dtype(student, teacher)
    sides = student.to(dtype), teacher.to(dtype)
    q = of_divergence(p)
    if q.num_classes is not None:
        count = q.num_classes
        sides = sides[0].narrow(p.dim, 0, count), sides[1].narrow(p.dim, 0, count)
        q = q._replace(num_classes=None)
    inputs = grad_output, *sides, labels, temperatures, statistics, of_mirrored
    found = _of_sides(*inputs, (True, True), q)
    parts = []
    for gradient, side, heat, column in zip(found, sides, temperatures, (0, 2), strict=False):
        assert gradient is not None
        top = statistics[:, column].view(heat.shape).unsqueeze(p.dim)
        parts.append(by_temperature(gradient, side, heat, p.dim, top))
    total = torch.stack(parts)
    return total if labels is None else total.masked_fill(labels == p.ignore_index, 0)
