"""Rows whose classes are split over ranks: their parts are exchanged, and make whole rows.

Logarithms and losses are scaled as in the kernels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.soft_target_operators import STATISTICS, forward
from fastkd.parameters import ELSEWHERE, SoftTarget
from fastkd.precision import widest_dtype
from fastkd.ranks import Ranks
from fastkd.reference.scaled import LOGIT_SCALE

KL = ("forward_kl", "reverse_kl")
IGNORED = -1  # the label of rows that do not count, in what kernels get


class Side(NamedTuple):
    """What rows have of one side: a maximum, and a sum of exponentials relative to it."""

    top: Tensor
    sum: Tensor


class Parts(NamedTuple):
    """What each rank has of each row, one rank after another."""

    student: Side
    teacher: Side
    hard: Tensor  # the student's sum at temperature 1
    divergence: Tensor  # between the softmaxes of the rank's classes
    cross_entropy: Tensor  # of these with an even distribution
    label: Tensor  # the logit of the row's label on its rank, 0 on others


def exchange(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    ranks: Ranks,
) -> Parts:
    """The statistics of all ranks' classes."""
    shape, widest = student.shape, widest_dtype(student.device)
    rows = (shape[: p.dim] + shape[p.dim + 1 :]).numel()
    logit = student.new_zeros(rows, dtype=widest)
    columns = torch.zeros((8, rows), dtype=widest, device=student.device)
    columns[0] = columns[2] = -torch.inf
    if ranks.here:
        smooths = 1.0 if p.label_smoothing else 0.0
        marks = None if labels is None else (labels == p.ignore_index).to(torch.int64) * IGNORED
        q = p._replace(reduction="none", ignore_index=IGNORED, label_smoothing=smooths)
        if p.divergence not in KL:
            q = q._replace(divergence="forward_kl")
        inputs = student, [teacher], marks, temperatures
        found = forward(*inputs, None, False, True, False, q)[2]
        columns[:7] = found.view(rows, STATISTICS).T
        if labels is not None and p.labels_are_classes:
            local = (labels - ranks.first).flatten()
            is_here = (local >= 0) & (local < ranks.here)
            at = local.clamp(0, ranks.here - 1).view(labels.shape).unsqueeze(p.dim)
            logit = student.detach().gather(p.dim, at).flatten().to(widest).masked_fill(~is_here, 0)
    columns[7] = logit
    s_top, s_sum, t_top, t_sum, hard, kl, ce, label = ranks.gather(columns).unbind(1)
    return Parts(Side(s_top, s_sum), Side(t_top, t_sum), hard, kl, ce, label)


def whole_rows(side: Side, temperature: Any) -> tuple[Side, Tensor]:
    """Of whole rows, and the scaled logarithm of each rank's share of a row's mass."""
    top = side.top.amax(0)
    origin = top.masked_fill(top == -torch.inf, 0)
    apart = (side.top * LOGIT_SCALE - origin * LOGIT_SCALE) / temperature
    # A rank without a class has the sum 0. Where it has NaN alone it has no maximum either.
    total = ((apart / LOGIT_SCALE).exp() * side.sum).sum(0)
    return Side(top, total), apart + (side.sum.log() - total.log()) * LOGIT_SCALE


def chained(found: Parts, s_logs: Tensor, t_logs: Tensor, divergence: str) -> Tensor:
    """A KL divergence of whole rows by the chain rule, which adds up what cannot be negative.

    It is the mean of the divergences of the ranks' classes, and the divergence of their masses.
    """
    weigher, other = (found.teacher, found.student), (t_logs, s_logs)
    if divergence == "reverse_kl":
        weigher, other = weigher[::-1], other[::-1]
    share = (other[0] / LOGIT_SCALE).exp()
    part = share * (found.divergence + (other[0] - other[1]))
    # A class that is excluded is infinitely far, whatever its mass.
    is_far = (found.divergence == torch.inf) | (weigher[1].top == -torch.inf)
    part = part.masked_fill(is_far, torch.inf)
    return part.masked_fill(weigher[0].top == -torch.inf, 0).sum(0).clamp(min=0)


def cross_entropy(
    found: Parts, top: Tensor, total: Tensor, smoothing: float, ranks: Ranks
) -> Tensor:
    """Of whole rows, at temperature 1. A part of weight 0 may be infinite."""
    log_total, top = total.log() * LOGIT_SCALE, top * LOGIT_SCALE
    rows = torch.zeros_like(log_total)
    if smoothing < 1:
        rows = rows + (1 - smoothing) * (log_total + (top - found.label.sum(0) * LOGIT_SCALE))
    if smoothing > 0:
        apart = top - found.student.top * LOGIT_SCALE
        parts = found.cross_entropy + (log_total - found.hard.log() * LOGIT_SCALE) + apart
        parts = parts.masked_fill(found.student.top == -torch.inf, torch.inf)
        shares = [
            (part, n / ranks.classes) for part, n in zip(parts, ranks.shares, strict=True) if n
        ]
        rows = rows + smoothing * torch.stack([part * share for part, share in shares]).sum(0)
    return rows


def labels_here(labels: Tensor | None, p: SoftTarget, ranks: Ranks) -> Tensor | None:
    """Labels of the classes that are here, for kernels; marks stay what they are."""
    if labels is None:
        return None
    ignored = labels == p.ignore_index
    if not p.labels_are_classes:
        return ignored.to(torch.int64) * IGNORED
    local = labels - ranks.first
    elsewhere = (local < 0) | (local >= ranks.here)
    return local.masked_fill(elsewhere, ELSEWHERE).masked_fill(ignored, IGNORED)


def of_shard(p: SoftTarget, ranks: Ranks) -> SoftTarget:
    """The parameters as kernels take them: of rows, whose labels are those of `labels_here`."""
    return p._replace(reduction="none", ignore_index=IGNORED, all_classes=ranks.classes)


def wrong_labels(
    labels: Tensor | None, ignored: Tensor | None, p: SoftTarget, ranks: Ranks
) -> Tensor | None:
    """Rows with a label that is no class, which a CPU's calls have refused before."""
    if labels is None or ignored is None or not p.labels_are_classes:
        return None
    labels = labels.flatten()
    return ((labels < 0) | (labels >= ranks.classes)) & ~ignored
