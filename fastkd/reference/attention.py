"""Attention maps and attention transfer (Zagoruyko & Komodakis 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.precision import compute_dtype
from fastkd.symbols import is_symbolic, operand


def attention_map(
    features: Tensor,
    *,
    kind: str,
    p: float,
    normalize: bool,
    eps: float,
    channel_dim: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`vec(F(A))` of each sample, `(B, positions)`, divided by its L2 norm if `normalize`."""
    magnitude = features.to(dtype or compute_dtype(features)).movedim(channel_dim, 1).abs()
    if kind == "max_pow":
        # `max(dim)` sends the gradient to the first channel that attains it; `amax` splits it.
        raw = magnitude.max(dim=1).values.pow(operand(p, magnitude))
    else:
        raw = magnitude.pow(operand(p, magnitude)).sum(dim=1)
    raw = raw.flatten(1)
    return unit(raw, eps) if normalize else raw


def unit(raw: Tensor, eps: float) -> Tensor:
    """Each row over its L2 norm, or over `eps` where that is larger; zeros stay zeros."""
    length = norm(raw, 2.0).clamp_min(operand(eps, raw))
    return raw / length.clamp_min(torch.finfo(raw.dtype).tiny)


def norm(rows: Tensor, order: float) -> Tensor:
    """The norm of each row, `(rows, 1)`: relative to its largest element no power overflows."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    scale = largest.masked_fill(~((largest > 0) & largest.isfinite()), 1)
    if is_symbolic(order):
        return _norm_of_any_order(rows / scale, operand(order, rows)) * scale
    return torch.linalg.vector_norm(rows / scale, ord=order, dim=1, keepdim=True) * scale


def _norm_of_any_order(rows: Tensor, order: Tensor) -> Tensor:
    """For `torch.linalg.vector_norm`, which takes no tensor for its order."""
    total = rows.abs().pow(order).sum(1, keepdim=True)
    is_zero = total == 0
    return total.masked_fill(is_zero, 1).pow(1 / order).masked_fill(is_zero, 0)


def attention_transfer_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    kind: str,
    p: float,
    distance: str,
    order: float,
    beta: float,
    reduction: str,
    eps: float,
    channel_dim: int,
) -> Tensor:
    """The distances between normalised maps, `(pairs, B)`, weighted and reduced."""
    dtype = compute_dtype(*students, *teachers)

    def maps(features: Tensor) -> Tensor:
        return attention_map(
            features,
            kind=kind,
            p=p,
            normalize=True,
            eps=eps,
            channel_dim=channel_dim,
            dtype=dtype,
        )

    rows = []
    for student, teacher in zip(students, teachers, strict=True):
        difference = maps(student) - maps(teacher)
        if distance == "norm":
            rows.append(beta * (norm(difference, order).squeeze(1) / 2))
        else:
            rows.append(beta * difference.square().mean(dim=1))
    losses = torch.stack(rows)
    if reduction == "none":
        return losses
    return losses.sum() / (max(losses.shape[1], 1) if reduction == "mean" else 1)
