"""Divergences of probabilities between shards of the classes: what a shard adds to a row's sums."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import SCALE
from fastkd.kernels.triton.reduction import arguments, constants
from fastkd.kernels.triton.rows import locate, look_up, tile_of_rows, upstream_of
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.soft_target_gradient import STATISTICS
from fastkd.kernels.triton.soft_target_rows import terms_in_blocks
from fastkd.kernels.triton.softmax import locate_all
from fastkd.kernels.triton.temperatures import operand, temperatures_of
from fastkd.kernels.triton.tiles import launch
from fastkd.parameters import SoftTarget


@triton.jit(
    do_not_specialize=["ignore_index", "rows"],
    do_not_specialize_on_alignment=["labels", "statistics", "terms"],
)
def shard_terms(
    student,
    teacher,
    labels,  # one a row, or None
    temperatures,  # of rows, a number of the teacher's, or nothing
    statistics,  # of all shards
    terms,  # (Σφ, Σψ) of each row
    beta: tl.float64,
    ignore_index,
    rate: tl.float64,
    soft: tl.float64,
    hard: tl.float64,
    smoothing: tl.float64,
    rows,
    units,
    sizes,
    row_strides,  # of student, twice, and teacher, twice
    class_strides,
    COMPUTE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """The terms of a tile of rows, a block at a time."""
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    _, counts, _ = look_up(labels, row, is_row, ignore_index, classes)
    rates, _, _ = temperatures_of(rate, soft, temperatures, row, counts, COMPUTE)
    s_at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    t_ats = locate_all((teacher,), inner, outer, sizes, row_strides, UNIT)
    at = statistics + row.to(tl.int64) * STATISTICS
    s_max = tl.load(at, mask=counts, other=0)
    s_sum = tl.load(at + 1, mask=counts, other=1)
    t_max = tl.load(at + 2, mask=counts, other=0)
    t_sum = tl.load(at + 3, mask=counts, other=1)
    shares = tl.full([1, 1], beta, COMPUTE), tl.full([1, 1], 1 - beta, COMPUTE)
    phi, psi = terms_in_blocks(
        *(s_at, t_ats, class_strides, counts, column, classes, s_max, (t_max,)),
        *((), s_sum, t_sum, None, rates, shares, DIVERGENCE, "logits"),
    )
    at = terms + row.to(tl.int64) * 2
    tl.store(at, phi.to(tl.float64) / SCALE, mask=is_row)
    tl.store(at + 1, tl.where(counts, psi, 0).to(tl.float64), mask=is_row)


def soft_target_terms(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor,
    terms: Tensor,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
) -> None:
    """Fill what the classes of a shard add to (Σφ, Σψ) of each row."""
    (teacher,) = teachers
    strides = student.stride(), student.stride(), teacher.stride(), teacher.stride()
    plan = plan_rows(student.shape, strides, upstream_of(None, student), p.dim, statistics.dtype)
    labels = labels if labels is None else labels.contiguous()
    launch(
        shard_terms,
        plan.programs,
        student,
        *(student, teacher, labels, operand(temperatures, p), statistics, terms, p.beta),
        *arguments(plan, labels, p),
        **constants(plan, labels, temperatures, statistics.dtype, p),
    )
