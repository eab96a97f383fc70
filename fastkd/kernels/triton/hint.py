"""Hints: difference, square, sum and gradient in one pass over both features."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.tiles import (
    COMPUTE,
    TILE,
    launch,
    locate,
    offsets,
    plan,
    power_of_2,
)
from fastkd.parameters import Hint
from fastkd.precision import compute_dtype


@triton.jit(
    do_not_specialize=["grad_output_stride", "tiles", "parts"],
    do_not_specialize_on_alignment=["sums", "grad_output"],
)
def squared_difference(
    student,
    teacher,
    gradient,  # coefficient · grad_output · (student − teacher), or None
    sums,  # weight · Σ (student − teacher)², one a program or (samples, parts), or None
    grad_output,  # one number, or one a sample; None is 1
    grad_output_stride,
    coefficient: tl.float64,
    weight: tl.float64,
    tiles,
    parts,
    counts,
    sizes,
    student_strides,
    teacher_strides,
    gradient_strides,
    COMPUTE: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum and gradient of one tile after another.

    With IN_PLACE the gradient holds what a `grad_output` of 1 makes of it.
    """
    factor = tl.full((), coefficient, COMPUTE)
    if grad_output is not None and not BY_SAMPLE:
        upstream = tl.load(grad_output).to(COMPUTE)
        factor *= upstream
        if IN_PLACE:
            tiles = tl.where(upstream == 1, 0, tiles)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        place, mask = locate(tile, parts, counts, sizes, DEPTH, ROWS, COLUMNS)
        s = tl.load(student + offsets(place, sizes, student_strides), mask=mask, other=0)
        t = tl.load(teacher + offsets(place, sizes, teacher_strides), mask=mask, other=0)
        difference = s.to(COMPUTE) - t.to(COMPUTE)
        if gradient is not None:
            scaled = difference * factor
            if grad_output is not None and BY_SAMPLE:
                at = grad_output + place[2] * grad_output_stride
                scaled *= tl.load(at, mask=place[2] < sizes[2], other=0).to(COMPUTE)
            at = gradient + offsets(place, sizes, gradient_strides)
            tl.store(at, scaled.to(gradient.dtype.element_ty), mask=mask)
        if sums is not None:
            squares = difference * difference
            if BY_SAMPLE:
                samples = tl.reshape(place[2], [DEPTH])
                total = tl.sum(tl.sum(squares, 2), 1).to(tl.float64) * weight
                at = sums + samples * parts + tile % parts
                tl.store(at, total.to(sums.dtype.element_ty), mask=samples < sizes[2])
            else:
                total = tl.sum(squares).to(tl.float64) * weight
                tl.store(sums + tile, total.to(sums.dtype.element_ty))


@triton.jit(
    do_not_specialize=["rows", "parts"],
    do_not_specialize_on_alignment=["sums", "losses"],
)
def add_up(
    sums,  # (rows, parts)
    losses,  # (rows,)
    rows,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of each row: one program's, so always in the same order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    totals = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, parts, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < parts)
        totals += tl.load(sums + row * parts + column, mask=mask, other=0)
    total = tl.sum(totals, 1, keep_dims=True)
    tl.store(losses + row, total.to(losses.dtype.element_ty), mask=row < rows)


def hint_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    gradients: Sequence[Tensor],
    p: Hint,
) -> None:
    """Fill the loss, and the students' gradients if there are any."""
    pairs = [
        _Pair(student, teacher, gradients[j] if gradients else None, p.reduction)
        for j, (student, teacher) in enumerate(zip(students, teachers, strict=True))
    ]
    if p.reduction == "none":
        for pair, row in zip(pairs, loss, strict=True):
            parts = pair.plan.parts
            sums = row if parts == 1 else _scratch(loss, len(row) * parts)
            pair.launch(pair.plan.tiles, p, loss.dtype, sums=sums)
            if parts != 1:
                _add_up(sums, row, parts, by_sample=True)
        return
    counts = [pair.plan.tiles for pair in pairs]
    parts, total = sum(counts), loss.view(1)
    sums = total if parts == 1 else _scratch(loss, parts)
    for pair, some in zip(pairs, sums.split(counts), strict=True):
        pair.launch(pair.plan.tiles, p, loss.dtype, sums=some)
    if parts != 1:
        _add_up(sums, total, parts, by_sample=False)


def hint_backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    p: Hint,
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted, of students and then of teachers.

    With `in_place` they hold their values for a `grad_output` of 1, and where it is 1 nothing is
    read or written.
    """
    dtype = compute_dtype(*students, *teachers)
    ones, others = (*students, *teachers), (*teachers, *students)
    for j, (one, other, gradient) in enumerate(zip(ones, others, gradients, strict=False)):
        if gradient is not None:
            upstream = grad_output[j % len(students)] if grad_output.ndim else grad_output
            pair = _Pair(one, other, gradient, p.reduction)
            pair.launch(pair.plan.few, p, dtype, grad_output=upstream, in_place=in_place)


class _Pair:
    """Features, those that they are compared with, and the gradient of the former if wanted."""

    def __init__(
        self, student: Tensor, teacher: Tensor, gradient: Tensor | None, reduction: str
    ) -> None:
        self.tensors = student, teacher, gradient
        layouts = student, teacher, student if gradient is None else gradient
        self.plan = plan(layouts, by_sample=reduction == "none")
        divisors = {"mean": student.numel(), "batchmean": student.shape[0]}
        self.divisor = max(divisors.get(reduction, 1), 1)

    def launch(
        self,
        programs: int,
        p: Hint,
        dtype: torch.dtype,
        sums: Tensor | None = None,
        grad_output: Tensor | None = None,
        in_place: bool = False,
    ) -> None:
        launch(
            squared_difference,
            programs,
            self.tensors[0],
            *self.tensors,
            sums,
            grad_output,
            grad_output.stride(0) if grad_output is not None and grad_output.ndim else 0,
            2 * p.scale / self.divisor,
            p.scale / self.divisor,
            self.plan.tiles,
            self.plan.parts,
            self.plan.counts,
            self.plan.sizes,
            *self.plan.strides,
            COMPUTE=COMPUTE[dtype],
            BY_SAMPLE=p.reduction == "none",
            IN_PLACE=in_place,
            **self.plan.shape,
        )


def _scratch(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.float64)


def _add_up(sums: Tensor, losses: Tensor, parts: int, by_sample: bool) -> None:
    if by_sample:
        columns = min(power_of_2(parts), TILE)
        shape = {"ROWS": TILE // columns, "COLUMNS": columns}
    else:
        # All of the GPU waits for this one program: it has as many threads as there can be.
        shape = {"ROWS": 1, "COLUMNS": 2 * TILE, "num_warps": 32}
    rows = len(losses)
    launch(add_up, -(-rows // shape["ROWS"]), sums, sums, losses, rows, parts, **shape)
