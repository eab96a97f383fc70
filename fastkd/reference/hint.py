"""FitNets hints (Romero et al. 2015)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.precision import compute_dtype
from fastkd.product import product


def regress(student: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The regressor r: a 1x1 convolution of `(B, C_s, *spatial)` to `(B, C_t, *spatial)`."""
    student, weight = student.to(dtype), weight.to(dtype).flatten(1)
    bias = None if bias is None else bias.to(dtype)
    if student.ndim > 2 and student.is_contiguous():
        # Positions lie side by side: a product per sample needs no copy with channels last.
        weights = weight.expand(len(student), -1, -1)
        column = None if bias is None else bias[None, :, None]
        projected = product(weights, student.flatten(2), column)
        return projected.unflatten(2, student.shape[2:])
    positions = student.movedim(1, -1)
    row = None if bias is None else bias[None]
    projected = product(positions.flatten(0, -2), weight.mT, row)
    return projected.unflatten(0, positions.shape[:-1]).movedim(-1, 1)


def hint_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    reduction: str,
    scale: float,
) -> Tensor:
    """`scale · ‖student − teacher‖²` of each sample, `(pairs, B)`, reduced."""
    dtype = compute_dtype(*students, *teachers)
    losses = torch.zeros((), dtype=dtype, device=students[0].device)
    rows = []
    for student, teacher in zip(students, teachers, strict=True):
        squares = (student.to(dtype) - teacher.to(dtype)).square()
        rows.append(scale * squares.flatten(1).sum(1))
        divisor = {"none": 1, "sum": 1, "batchmean": squares.shape[0], "mean": squares.numel()}
        losses = losses + rows[-1].sum() / max(divisor[reduction], 1)
    return torch.stack(rows) if reduction == "none" else losses
