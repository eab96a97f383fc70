"""Operators and autograd of similarity-preserving distillation, on Gram matrices."""

from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import Fused, wants_gradient
from fastkd.operators import define, kernels
from fastkd.ops import relations
from fastkd.precision import compute_dtype
from fastkd.product import no_autocast


def _outputs(
    student: Tensor, teacher: Tensor, to_student: bool, to_teacher: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = student.shape[0], compute_dtype(student, teacher)
    one, other = (
        student.new_empty((count, count) if wanted else (0,), dtype=dtype)
        for wanted in (to_student, to_teacher)
    )
    return student.new_empty((), dtype=dtype), one, other


@define(
    "similarity_forward(Tensor student, Tensor teacher, bool to_student, bool to_teacher, "
    "str backend) -> (Tensor loss, Tensor student_slopes, Tensor teacher_slopes)",
    _outputs,
)
def forward(
    student: Tensor, teacher: Tensor, to_student: bool, to_teacher: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its derivatives by the Gram matrices of the sides that are wanted."""
    loss, one, other = _outputs(student, teacher, to_student, to_teacher, backend)
    compare = kernels(backend, "similarity").similarity
    s, t = _gram(student, loss.dtype), _gram(teacher, loss.dtype)
    wanted = one if to_student else None, other if to_teacher else None
    relations.compare_sides(compare, s, t, loss, *wanted)
    return loss, one, other


def _rows(features: Tensor, like: Tensor) -> Tensor:
    """`(B, features)`, a view where it can be: in the order in which `like` has them in memory."""
    return features.permute(_order(like)).reshape(len(features), features[:1].numel())


def _order(features: Tensor) -> list[int]:
    """The batch, and the other dimensions from the sparsest to the densest."""
    return [0, *sorted(range(1, features.ndim), key=features.stride, reverse=True)]


def _gram(features: Tensor, dtype: torch.dtype) -> Tensor:
    rows = _rows(features, features)
    with no_autocast(features.device.type):
        if _widens(rows, dtype):
            return torch.mm(rows, rows.mT, out_dtype=dtype)
        rows = rows.to(dtype)
        return torch.mm(rows, rows.mT)


def _widens(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a product of these in float32, without a copy of them in float32."""
    is_half = rows.dtype.itemsize == 2 and dtype == torch.float32
    return is_half and rows.device.type == "cuda" and torch.version.hip is None


@define(
    "similarity_backward(Tensor grad_output, Tensor slopes, Tensor features) -> Tensor",
    lambda grad_output, slopes, features: torch.empty_like(features),
)
def backward(grad_output: Tensor, slopes: Tensor, features: Tensor) -> Tensor:
    """`slopes @ features` times `grad_output`, rounded once."""
    to = torch.empty_like(features)
    rows, weights = _rows(features, to).to(slopes.dtype), slopes * grad_output
    columns = _rows(to, to)
    with no_autocast(features.device.type):
        if columns.data_ptr() == to.data_ptr() and to.dtype == slopes.dtype:
            torch.mm(weights, rows, out=columns)
        else:
            _write(to, torch.mm(weights, rows))
    return to


def _write(to: Tensor, rows: Tensor) -> None:
    """The inverse of `_rows`."""
    dims = _order(to)
    to.permute(dims).copy_(rows.view([to.shape[d] for d in dims]))


class Similarity(Fused):
    """The loss: `apply(student, teacher, backend)`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, backend: str) -> Tensor:
        loss, *slopes = forward(student, teacher, *ctx.needs_input_grad[:2], backend)
        relations.keep(ctx, (student, teacher), slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        found = relations.gradients(ctx, "similarity_preserving_loss", backward, grad_output)
        return (*found, None)


def similarity(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """The loss, differentiable where that is wanted."""
    if wants_gradient(student, teacher):
        loss: Tensor = Similarity.record(student, teacher, backend)
        return loss
    return forward(student, teacher, False, False, backend)[0]
