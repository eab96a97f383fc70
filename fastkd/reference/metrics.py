"""How far a student's distributions are from its teacher's."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.parameters import Metrics
from fastkd.precision import compute_dtype
from fastkd.reference.scaled import LOGIT_SCALE, largest, shifted
from fastkd.tensors import unshard


class _Side(NamedTuple):
    """Rows of one side, and what is known of each with a last dimension of 1."""

    excluded: Tensor
    below: Tensor  # the logits less their maximum, scaled; 0 where they are excluded
    p: Tensor
    log_sum: Tensor  # of exponentials relative to the maximum
    log_sum_exp: Tensor
    entropy: Tensor


def distillation_metrics(
    student: Tensor, teacher: Tensor, mask: Tensor | None, p: Metrics
) -> tuple[Tensor, Tensor]:
    """Both log-sum-exps and entropies, forward KL, reverse KL and overlap; and both arg-maxima.

    Each is stacked along a first dimension.
    """
    dtype = compute_dtype(student, teacher)
    student, teacher = (x.to(dtype).movedim(p.dim, -1) for x in (student, teacher))
    if mask is not None:
        # Filled rather than left out afterwards: such a row may hold NaN.
        student, teacher = (x.masked_fill(~mask[..., None], 0) for x in (student, teacher))
    student, teacher = unshard(student, -1), unshard(teacher, -1)
    s, t = _side(student, p.temperature), _side(teacher, p.teacher_temperature)
    # At a large temperature the difference of logits is the smaller part of both logarithms.
    apart = t.below * (p.temperature / p.teacher_temperature) - s.below
    ratio = s.log_sum - t.log_sum
    unit = p.temperature * LOGIT_SCALE
    values = torch.stack(
        [
            s.log_sum_exp,
            t.log_sum_exp,
            s.entropy,
            t.entropy,
            _kl(t, s, apart, ratio, unit),
            _kl(s, t, -apart, -ratio, unit),
            torch.minimum(s.p, t.p).sum(-1, keepdim=True).clamp(max=1),
        ]
    ).squeeze(-1)
    argmax = torch.stack([student.argmax(-1), teacher.argmax(-1)])
    if mask is None:
        return values, argmax
    return values.masked_fill(~mask, 0), argmax.masked_fill(~mask, -1)


def _side(x: Tensor, temperature: float) -> _Side:
    top, excluded = largest(x), x == -torch.inf
    unit = temperature * LOGIT_SCALE
    below = shifted(x, top)
    e = (below / unit).exp()
    total = e.sum(-1, keepdim=True)
    log_sum = total.log()
    below = below.masked_fill(excluded, 0)
    entropy = log_sum - (e * below).sum(-1, keepdim=True) / total / unit
    log_sum_exp = torch.where(top == -torch.inf, top, top / temperature + log_sum)
    return _Side(excluded, below, e / total, log_sum, log_sum_exp, entropy.clamp(min=0))


def _kl(of: _Side, to: _Side, apart: Tensor, log_ratio: Tensor, unit: float) -> Tensor:
    """`sum(p * (apart / unit + log_ratio))`, p the distribution of the first side."""
    infinite = (to.excluded & ~of.excluded).any(-1, keepdim=True)
    mean = (of.p * apart).sum(-1, keepdim=True) / unit
    return mean.masked_fill(infinite, torch.inf).add(log_ratio).clamp(min=0)
