"""Operators of losses on linear heads: loops over chunks of rows, without autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.autograd import no_grad
from fastkd.operators import define
from fastkd.ops.linear_head_call import Call, loss_dtype
from fastkd.parameters import Heads, SoftTarget, in_schema
from fastkd.product import no_autocast

_INPUTS = "Tensor[] student, Tensor[] teachers, Tensor? labels, Tensor[] temperatures"
_PARAMETERS = f"{in_schema(Heads)}, {in_schema(SoftTarget)}"


def _outputs(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    dtype, shape = loss_dtype(heads), student[0].shape[:-1]
    parts = student[0].new_empty((2, *shape), dtype=dtype) if with_parts else None
    gradients = [
        x.new_empty(x.shape, dtype=_added_up_in(heads) if heads.student_is_head else x.dtype)
        for x, want in zip(student, wanted, strict=True)
        if want
    ]
    return student[0].new_empty(shape, dtype=dtype), parts, gradients


def _added_up_in(heads: Heads) -> torch.dtype:
    return torch.float64 if heads.dtype == "float64" else torch.float32


@define(
    f"linear_head_forward({_INPUTS}, Tensor? factor, bool with_parts, bool[] wanted, "
    f"{_PARAMETERS}) -> (Tensor losses, Tensor parts, Tensor[] gradients)",
    _outputs,
    Heads,
    SoftTarget,
)
def forward(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """As `Call.forward`."""
    with no_grad(), no_autocast(student[0].device.type):
        call = Call(student, teachers, labels, temperatures, heads, p)
        return call.forward(factor, with_parts, wanted)


def _like_wanted(
    grad_output: Tensor,
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> list[Tensor]:
    tensors = *student, *teachers, *temperatures
    return [x.new_empty(x.shape) for x, want in zip(tensors, wanted, strict=True) if want]


@define(
    f"linear_head_backward(Tensor grad_output, {_INPUTS}, bool[] wanted, {_PARAMETERS}) "
    "-> Tensor[]",
    _like_wanted,
    Heads,
    SoftTarget,
)
def backward(
    grad_output: Tensor,
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> list[Tensor]:
    """As `Call.backward`."""
    with no_grad(), no_autocast(student[0].device.type):
        call = Call(student, teachers, labels, temperatures, heads, p)
        return call.backward(grad_output, wanted)
