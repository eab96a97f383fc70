"""What several of these modules share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.attention import attention_map as fused_attention_map
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.distillation import distillation_loss
from fastkd.losses.hint import hint_loss
from fastkd.losses.metrics import distillation_metrics
from fastkd.losses.soft_target import soft_target_loss
from fastkd.precision import compute_dtype

# No label has this value, so that -100 is an error, and not a row that the soft term leaves out.
_NOTHING_IGNORED = -(2**31)


def kl_div(
    student: Tensor, teacher: Tensor, *, reduction: str = "batchmean", **keywords: Any
) -> Tensor:
    """`F.kl_div` of softened logits `(N, K, *)`, whose "batchmean" is the sum over N."""
    loss = soft_target_loss(student, teacher, dim=1, reduction=reduction, **keywords)
    if reduction == "batchmean" and student.ndim > 2:
        return loss * math.prod(student.shape[2:])
    return loss


def soft_and_hard(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    """`distillation_loss` of logits `(N, K, *)`, of which every row counts."""
    return distillation_loss(
        student, teacher, labels, dim=1, ignore_index=_NOTHING_IGNORED, **keywords
    )


def soft_share(reduction: str, logits: Tensor) -> float:
    """The weight of the soft term in `soft_and_hard` that reduces it as `F.kl_div` would.

    Of logits `(N, K, *)`, next to a cross-entropy that is a mean over rows, or a sum with "sum".
    """
    return {
        "batchmean": float(math.prod(logits.shape[2:])),
        "mean": 1 / logits.shape[1],
        "sum": 1.0,
    }[reduction]


def wide(x: Tensor) -> Tensor:
    """Half precision in float32, for what torch computes."""
    return x.to(compute_dtype(x))


def pool_to_height(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the higher of two feature maps to a square of the other's height.

    The widths are not looked at, as in RepDistiller and mdistiller.
    """
    height = min(first.shape[2], second.shape[2])

    def pooled(x: Tensor) -> Tensor:
        return x if x.shape[2] == height else F.adaptive_avg_pool2d(x, (height, height))

    return pooled(first), pooled(second)


def attention_map(features: Tensor, p: float) -> Tensor:
    """`normalize(mean over channels of features ** p)`: without an absolute value."""
    if _is_even(p):
        return fused_attention_map(features, p=p)
    return F.normalize(wide(features).pow(p).mean(1).flatten(1))


def attention_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], p: float) -> Tensor:
    """The mean squared difference of attention maps, summed over pairs, the shorter list's."""
    pairs = [pool_to_height(*pair) for pair in zip(students, teachers, strict=False)]
    sides = [one for one, _ in pairs], [other for _, other in pairs]
    if _is_even(p):
        return attention_transfer_loss(*sides, p=p, distance="mse")
    maps = ([attention_map(f, p) for f in side] for side in sides)
    return hint_loss(*maps, half=False, reduction="mean")


def _is_even(p: float) -> bool:
    # Of these the absolute value, which fastkd takes, changes nothing.
    return p >= 2 and p % 2 == 0


def distances(embeddings: Tensor, *, eps: float, squared: bool = False) -> Tensor:
    """The distances `(N, N)`; off the diagonal their squares are at least `eps`."""
    embeddings = wide(embeddings)
    squares = embeddings.pow(2).sum(1)
    result = (squares[:, None] + squares - 2 * embeddings @ embeddings.T).clamp(min=eps)
    same = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    return (result if squared else result.sqrt()).masked_fill(same, 0)


def distance_loss(
    student: Tensor, teacher: Tensor, *, eps: float, squared: bool = False, of_mean: float = 0.0
) -> Tensor:
    """The smooth L1 loss of distances over their positive mean plus `of_mean`."""

    def relative(embeddings: Tensor) -> Tensor:
        d = distances(embeddings, eps=eps, squared=squared)
        return d / (d.sum() / (d > 0).sum() + of_mean)

    return F.smooth_l1_loss(relative(student), relative(teacher))


def log_sum_exp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of logits over the temperature, along the last dimension, in float32 at least.

    Without a gradient to record the logits are read as they are: half precision is not copied.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return (wide(logits) / temperature).logsumexp(-1)
    found = distillation_metrics(logits, logits, temperature=temperature, dim=logits.ndim - 1)
    return found.teacher_log_sum_exp
