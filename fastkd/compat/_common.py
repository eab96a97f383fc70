"""What several of these modules share."""

import math
from collections.abc import Iterable
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
from fastkd.product import product

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
    try:
        return distillation_loss(
            student, teacher, labels, dim=1, ignore_index=_NOTHING_IGNORED, **keywords
        )
    except ValueError:
        if (labels == -100).any():
            raise ValueError(
                "labels must be classes, got -100: the cross-entropy would leave its row out, the "
                "soft term would not; torchdistill's KDLoss takes ignore_index=-100 for that"
            ) from None
        raise


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


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of tensors of one shape, which may be numbers."""
    return hint_loss(*map(torch.atleast_2d, (student, teacher)), half=False, reduction="mean")


def samples(features: Tensor) -> Tensor:
    """Features `(N, *)`, of which `(N,)` are `(N, 1)`."""
    return features if features.ndim > 1 else features[:, None]


def hierarchical_context_loss(
    student: Tensor, teacher: Tensor, sizes: Iterable[int], reduction: str = "mean"
) -> Tensor:
    """The squared difference of features, and of these pooled to squares, weighted 1, ½, ¼, ….

    Sizes that are not below the height are left out, and the weights are divided by their sum.
    """
    squares = [size for size in sizes if size < student.shape[2]]
    sides = (
        [x, *(F.adaptive_avg_pool2d(wide(x), size) for size in squares)] for x in (student, teacher)
    )
    weights = [0.5**level for level in range(len(squares) + 1)]
    shares = [weight / sum(weights) for weight in weights]
    return hint_loss(*sides, half=False, reduction=reduction, pair_weights=shares)


def pool_to_height(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the higher of two feature maps to a square of the other's height.

    The widths are not looked at, as in RepDistiller and mdistiller.
    """
    height = min(first.shape[2], second.shape[2])

    def pooled(x: Tensor) -> Tensor:
        return x if x.shape[2] == height else F.adaptive_avg_pool2d(wide(x), (height, height))

    return pooled(first), pooled(second)


def attention_map(features: Tensor, p: float) -> Tensor:
    """`normalize(mean over channels of features ** p)`: without an absolute value."""
    if _is_even(p):
        return fused_attention_map(features, p=p)
    return F.normalize(wide(features).pow(p).mean(1).flatten(1))


def attention_loss(pairs: Iterable[tuple[Tensor, Tensor]], p: float) -> Tensor:
    """The mean squared difference of attention maps, summed over pairs."""
    pooled = [pool_to_height(*pair) for pair in pairs]
    sides = [one for one, _ in pooled], [other for _, other in pooled]
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
    products = product(embeddings, embeddings.mT)
    result = (squares[:, None] + squares - 2 * products).clamp(min=eps)
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
