"""From the losses of rows to the loss, and what the kernels of a loss on logits are called with."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import LOGIT_SCALE, SCALE
from fastkd.kernels.triton.hint import add_up
from fastkd.kernels.triton.rows import Plan
from fastkd.kernels.triton.temperatures import rate_of
from fastkd.kernels.triton.tiles import COMPUTE, TILE, launch
from fastkd.parameters import SoftTarget

# How many labels a program counts.
_LABELS = 4 * TILE

BY_ROWS = frozenset({"batchmean", "mean"})


@triton.jit
def weighted(term, weight):
    """A weight of 0 switches its term off, also where the term is infinite or NaN."""
    return tl.where(weight == 0, 0, weight * term)


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["labels", "counts"],
)
def count(labels, counts, ignore_index, rows, LABELS: tl.constexpr):
    """How many labels of a stretch are not ignored."""
    row = tl.program_id(0).to(tl.int64) * LABELS + tl.arange(0, LABELS)
    label = tl.load(labels + row, mask=row < rows, other=ignore_index)
    found = tl.sum((label != ignore_index).to(tl.int32))
    tl.store(counts + tl.program_id(0), found.to(counts.dtype.element_ty))


@triton.jit(
    do_not_specialize=["programs"],
    do_not_specialize_on_alignment=["sums", "loss", "parts", "kept"],
)
def finalize(
    sums,  # of cross-entropies, divergences and rows that count, one a program each
    loss,
    parts,  # or None
    kept,  # gets the number of rows that count, or None
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    size: tl.float64,  # the divisor of one row
    t2: tl.float64,
    programs,
    BY_ROWS: tl.constexpr,  # whether the number of rows is part of the divisor
    COLUMNS: tl.constexpr,
):
    """The loss and its parts, from sums that are added up in the same order each time."""
    hard = tl.zeros([COLUMNS], tl.float64)
    kl, counted = hard, hard
    for start in range(0, programs, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at, mask = sums + column, column < programs
        hard += tl.load(at, mask=mask, other=0)
        kl += tl.load(at + programs, mask=mask, other=0)
        counted += tl.load(at + 2 * programs, mask=mask, other=0)
    rows = tl.sum(counted)
    divisor = size * tl.maximum(rows, 1) if BY_ROWS else size
    hard_part = tl.sum(hard) / divisor
    kl_part = tl.sum(kl) / divisor
    total = weighted(kl_part, soft_weight) + weighted(hard_part, hard_weight)
    tl.store(loss, (total / SCALE).to(loss.dtype.element_ty))
    if parts is not None:
        tl.store(parts, (hard_part / SCALE).to(parts.dtype.element_ty))
        tl.store(parts + 1, (weighted(kl_part, t2) / SCALE).to(parts.dtype.element_ty))
    if kept is not None:
        tl.store(kept, rows.to(kept.dtype.element_ty))


# All of the GPU waits for such a program: it has as many threads as there can be.
ALONE = {"COLUMNS": TILE, "num_warps": 32}


def reduce(
    plan: Plan,
    sums: Tensor,
    loss: Tensor,
    parts: Tensor | None,
    kept: Tensor | None,
    p: SoftTarget,
) -> None:
    """Fill the loss, and those that are wanted of its parts and the number of rows that count."""
    launch(
        finalize,
        1,
        loss,
        *(sums, loss, parts, kept),
        *(p.soft_weight, p.hard_weight, size_of_row(plan, p), p.temperature * p.temperature),
        plan.programs,
        BY_ROWS=p.reduction in BY_ROWS,
        **ALONE,
    )


def size_of_row(plan: Plan, p: SoftTarget) -> float:
    """What the reduction divides by, but for the number of rows."""
    return float(plan.units * plan.tile["UNIT"]) if p.reduction == "mean" else 1.0


def arguments(plan: Plan, labels: Tensor | None, p: SoftTarget) -> tuple[Any, ...]:
    """What kernels take after the tensors."""
    divisor = size_of_row(plan, p)
    if labels is None and p.reduction in BY_ROWS:
        divisor *= max(plan.rows, 1)
    return (
        p.ignore_index,
        rate_of(p.temperature),
        p.soft_weight / p.temperature / divisor,
        p.hard_weight / divisor if labels is not None else 0.0,
        p.label_smoothing,
        *plan[1:6],
    )


def mean_of_teachers(weights: Sequence[float], rate: float) -> tuple[Any, ...] | None:
    """Of several teachers the weights, and a power of 2 with its inverse.

    log₂(p) and the student's logit are subtracted from one another times that power, by which
    neither factor is large. Triton takes no float64 in a tuple: each weight is the sum of two
    float32.
    """
    if len(weights) == 1:
        return None
    power = 2.0 ** -max(math.frexp(rate * LOGIT_SCALE)[1], 0)
    high = torch.tensor(weights, dtype=torch.float32).tolist()
    halves = tuple([(one, weight - one) for one, weight in zip(high, weights, strict=True)])
    return halves, power, 1 / power


def constants(
    plan: Plan,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    dtype: torch.dtype,
    p: SoftTarget,
) -> dict[str, Any]:
    """What kernels are compiled for."""
    is_at_1 = not temperatures and p.temperature == 1
    return {
        "COMPUTE": COMPUTE[dtype],
        "HAS_HARD": labels is not None and p.labels_are_classes and not is_at_1,
        "DIVERGENCE": p.divergence,
        **plan.tile,
    }


def count_kept(labels: Tensor, kept: Tensor, ignore_index: int) -> Tensor:
    """The number of rows that count, into `kept`."""
    rows = labels.numel()
    programs = -(-rows // _LABELS)
    counts = kept if programs == 1 else kept.new_empty(programs, dtype=torch.float64)
    args = labels, counts, ignore_index, rows
    launch(count, programs, labels, *args, LABELS=_LABELS, num_warps=32)
    if programs > 1:
        launch(add_up, 1, labels, counts, kept, 1, programs, ROWS=1, **ALONE)
    return kept


def upstream_strides(grad_output: Tensor | None, student: Tensor) -> tuple[int, ...]:
    """The strides of one number a row, or of one for all."""
    if grad_output is None or grad_output.ndim == 0:
        return (0,) * (student.ndim - 1)
    return grad_output.stride()
