"""Operators and autograd of hints: the squared difference of each pair of features."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.library import (
    define,
    differentiate_once,
    eager_gradient,
    for_grad_output,
    kernels,
    no_grad,
    scales,
    wants_gradient,
)
from fastkd.reference.precision import compute_dtype

_PARAMETERS = "float scale, str reduction, str backend"


class Parameters(NamedTuple):
    """The arguments that every hint operator ends with; `scale` is ½ or 1."""

    scale: float
    reduction: str
    backend: str


def _outputs(
    students: Sequence[Tensor], teachers: Sequence[Tensor], reduction: str, with_gradients: bool
) -> tuple[Tensor, list[Tensor]]:
    first = students[0]
    dtype = compute_dtype(*students, *teachers)
    shape = (len(students), first.shape[0]) if reduction == "none" else ()
    gradients = [torch.empty_like(s) for s in students] if with_gradients else []
    return first.new_empty(shape, dtype=dtype), gradients


@define(
    "hint_forward(Tensor[] students, Tensor[] teachers, bool with_gradients, "
    f"{_PARAMETERS}) -> (Tensor loss, Tensor[] gradients)",
    lambda students, teachers, with_gradients, scale, reduction, backend: _outputs(
        students, teachers, reduction, with_gradients
    ),
)
def forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    with_gradients: bool,
    *parameters: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the students' gradients for a `grad_output` of 1."""
    p = Parameters(*parameters)
    loss, gradients = _outputs(students, teachers, p.reduction, with_gradients)
    kernels(p.backend, "hint").hint_forward(students, teachers, loss, gradients, p)
    return loss, gradients


def _backward_fake(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    to_students: Sequence[bool],
    to_teachers: Sequence[bool],
    *parameters: Any,
) -> list[Tensor]:
    wanted = zip((*students, *teachers), (*to_students, *to_teachers), strict=True)
    return [torch.empty_like(t) if want else t.new_empty(0) for t, want in wanted]


@define(
    "hint_backward(Tensor grad_output, Tensor[] students, Tensor[] teachers, bool[] to_students, "
    f"bool[] to_teachers, {_PARAMETERS}) -> Tensor[]",
    _backward_fake,
)
def backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    to_students: Sequence[bool],
    to_teachers: Sequence[bool],
    *parameters: Any,
) -> list[Tensor]:
    """The gradients of students and then teachers, computed from the inputs."""
    p = Parameters(*parameters)
    to = _backward_fake(grad_output, students, teachers, to_students, to_teachers)
    wanted = [g if want else None for g, want in zip(to, (*to_students, *to_teachers), strict=True)]
    kernels(p.backend, "hint").hint_backward(grad_output, students, teachers, wanted, p)
    return to


@define(
    "hint_rescale(Tensor(a!)[] gradients, Tensor grad_output, Tensor[] students, "
    f"Tensor[] teachers, {_PARAMETERS}) -> ()",
    lambda *_: None,
)
def rescale(
    gradients: Sequence[Tensor],
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *parameters: Any,
) -> None:
    """Forward's gradients for another scalar `grad_output`, computed again in their place."""
    p = Parameters(*parameters)
    kernels(p.backend, "hint").hint_backward(grad_output, students, teachers, gradients, p)


class Hint(torch.autograd.Function):
    """The loss of all pairs: `apply(parameters, *students, *teachers)`."""

    @staticmethod
    def forward(ctx: Any, p: Parameters, *features: Tensor) -> Tensor:
        count = len(features) // 2
        students, teachers = features[:count], features[count:]
        needed = ctx.needs_input_grad[1:]
        with_gradients = (
            all(needed[:count])
            and not any(needed[count:])
            and p.reduction != "none"
            and eager_gradient(students)
        )
        loss, gradients = forward(students, teachers, with_gradients, *p)
        scaled = with_gradients and scales(students)
        ctx.save_for_backward(*students, *gradients, *(() if scaled else teachers))
        ctx.parameters, ctx.count, ctx.with_gradients = p, count, with_gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved, count, p = ctx.saved_tensors, ctx.count, ctx.parameters
        students = saved[:count]
        gradients = saved[count : 2 * count] if ctx.with_gradients else ()
        teachers = saved[count + len(gradients) :]
        needed = ctx.needs_input_grad[1:]
        with no_grad():
            if not ctx.with_gradients:
                to = backward(grad_output, students, teachers, needed[:count], needed[count:], *p)
            else:
                to = for_grad_output(
                    gradients,
                    grad_output,
                    lambda to: rescale(to, grad_output, students, teachers, *p),
                )
        found = tuple(g if want else None for g, want in zip(to, needed, strict=False))
        found += (None,) * (2 * count - len(found))
        return (None, *differentiate_once("hint_loss", found, (*students, *teachers)))


def hint(students: Sequence[Tensor], teachers: Sequence[Tensor], p: Parameters) -> Tensor:
    """The loss of all pairs, differentiable where that is wanted."""
    if wants_gradient(*students, *teachers):
        loss: Tensor = Hint.apply(p, *students, *teachers)
        return loss
    return forward(students, teachers, False, *p)[0]
