"""Operators and autograd of relational distillation, on squared distances in float64."""

from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import Fused, wants_gradient
from fastkd.operators import define, kernels
from fastkd.ops import relations
from fastkd.parameters import Rkd, in_schema
from fastkd.precision import compute_dtype

# Elements of the embeddings that are in float64 at a time, where there are not more relations.
_AT_ONCE = 131072


def _outputs(
    student: Tensor, teacher: Tensor, to_student: bool, to_teacher: bool, p: Rkd
) -> tuple[Tensor, Tensor, Tensor]:
    count = student.shape[0]
    one, other = (
        student.new_empty((count, count) if wanted else (0,), dtype=torch.float64)
        for wanted in (to_student, to_teacher)
    )
    return student.new_empty((), dtype=compute_dtype(student, teacher)), one, other


@define(
    "rkd_forward(Tensor student, Tensor teacher, bool to_student, bool to_teacher, "
    f"{in_schema(Rkd)}) -> (Tensor loss, Tensor student_slopes, Tensor teacher_slopes)",
    _outputs,
    Rkd,
)
def forward(
    student: Tensor, teacher: Tensor, to_student: bool, to_teacher: bool, p: Rkd
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its derivatives by the squared distances of the sides that are wanted."""
    loss, one, other = _outputs(student, teacher, to_student, to_teacher, p)
    module = kernels(p.backend, "rkd")
    compare = module.rkd_angle if p.kind == "angle" else module.rkd_distance
    s, t = _squared_distances(student, p.backend), _squared_distances(teacher, p.backend)
    wanted = one if to_student else None, other if to_teacher else None
    relations.compare_sides(compare, s, t, loss, *wanted, p.delta)
    return loss, one, other


def _squared_distances(embeddings: Tensor, backend: str) -> Tensor:
    count = embeddings.shape[0]
    to = embeddings.new_empty((count, count), dtype=torch.float64)
    rows = embeddings.to(compute_dtype(embeddings)).contiguous()
    kernels(backend, "rkd").squared_distances(rows, to)
    return to


@define(
    "rkd_backward(Tensor grad_output, Tensor slopes, Tensor embeddings) -> Tensor",
    lambda grad_output, slopes, embeddings: torch.empty_like(embeddings),
)
def backward(grad_output: Tensor, slopes: Tensor, embeddings: Tensor) -> Tensor:
    """`2 Σ_j slopes_ij (x_i − x_j)` times `grad_output`: rounded once, in float64 before."""
    to = torch.empty_like(embeddings)
    totals, scale = slopes.sum(1, keepdim=True), 2 * grad_output.double()
    step = max(len(embeddings), _AT_ONCE // max(len(embeddings), 1))
    for columns, part in zip(to.split(step, 1), embeddings.split(step, 1), strict=True):
        wide = part.double()
        columns.copy_(torch.addmm(totals * wide, slopes, wide, alpha=-1).mul_(scale))
    return to


class RkdLoss(Fused):
    """The loss: `apply(student, teacher, parameters)`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, p: Rkd) -> Tensor:
        loss, *slopes = forward(student, teacher, *ctx.needs_input_grad[:2], p)
        relations.keep(ctx, (student, teacher), slopes)
        ctx.kind = p.kind
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return (*relations.gradients(ctx, f"rkd_{ctx.kind}_loss", backward, grad_output), None)


def rkd(student: Tensor, teacher: Tensor, p: Rkd) -> Tensor:
    """The loss, differentiable where that is wanted."""
    if wants_gradient(student, teacher):
        loss: Tensor = RkdLoss.record(student, teacher, p)
        return loss
    return forward(student, teacher, False, False, p)[0]
