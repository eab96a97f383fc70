"""Operators and autograd of hints: the squared difference of each pair of features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import (
    Fused,
    check_grad_output,
    differentiate_once,
    eager_gradient,
    for_grad_output,
    is_final,
    no_grad,
    of_wanted,
    savable,
    scales,
    wants_gradient,
)
from fastkd.operators import define, kernels
from fastkd.parameters import Hint, in_schema
from fastkd.precision import compute_dtype
from fastkd.tensors import nobody_listens

_PARAMETERS = in_schema(Hint)


def _outputs(
    students: Sequence[Tensor], teachers: Sequence[Tensor], with_gradients: bool, p: Hint
) -> tuple[Tensor, list[Tensor]]:
    first = students[0]
    dtype = compute_dtype(*students, *teachers)
    shape = (len(students), first.shape[0]) if p.reduction == "none" else ()
    gradients = [torch.empty_like(s) for s in students] if with_gradients else []
    return first.new_empty(shape, dtype=dtype), gradients


@define(
    "hint_forward(Tensor[] students, Tensor[] teachers, bool with_gradients, "
    f"{_PARAMETERS}) -> (Tensor loss, Tensor[] gradients)",
    _outputs,
    Hint,
)
def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], with_gradients: bool, p: Hint
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the students' gradients for a `grad_output` of 1."""
    loss, gradients = _outputs(students, teachers, with_gradients, p)
    kernels(p.backend, "hint").hint_forward(students, teachers, loss, gradients, p)
    return loss, gradients


def _gradients(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    to_students: Sequence[bool],
    to_teachers: Sequence[bool],
    p: Hint,
) -> list[Tensor]:
    wanted = zip((*students, *teachers), (*to_students, *to_teachers), strict=True)
    return [torch.empty_like(t) if want else t.new_empty(0) for t, want in wanted]


@define(
    "hint_backward(Tensor grad_output, Tensor[] students, Tensor[] teachers, bool[] to_students, "
    f"bool[] to_teachers, {_PARAMETERS}) -> Tensor[]",
    _gradients,
    Hint,
)
def backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    to_students: Sequence[bool],
    to_teachers: Sequence[bool],
    p: Hint,
) -> list[Tensor]:
    """The gradients of students and then teachers, computed from the inputs."""
    to = _gradients(grad_output, students, teachers, to_students, to_teachers, p)
    wanted = [g if want else None for g, want in zip(to, (*to_students, *to_teachers), strict=True)]
    kernels(p.backend, "hint").hint_backward(grad_output, students, teachers, wanted, p)
    return to


@define(
    "hint_rescale(Tensor(a!)[] gradients, Tensor grad_output, Tensor[] students, "
    f"Tensor[] teachers, bool in_place, {_PARAMETERS}) -> ()",
    lambda *_: None,
    Hint,
)
def rescale(
    gradients: Sequence[Tensor],
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    in_place: bool,
    p: Hint,
) -> None:
    """Forward's gradients for another scalar `grad_output`, computed again.

    `in_place` says that they hold those for a `grad_output` of 1.
    """
    kernels(p.backend, "hint").hint_backward(
        grad_output, students, teachers, gradients, p, in_place=in_place
    )


class HintLoss(Fused):
    """The loss of all pairs: `apply(consumes, parameters, *students, *teachers)`.

    `consumes` says that nobody else will look at the students: their gradients may take their
    place, which is in cache.
    """

    @staticmethod
    def forward(ctx: Any, consumes: bool, p: Hint, *features: Tensor) -> Tensor:
        count = len(features) // 2
        students, teachers = features[:count], features[count:]
        needed = ctx.needs_input_grad[2:]
        with_gradients = (
            all(needed[:count])
            and not any(needed[count:])
            and p.reduction != "none"
            and eager_gradient(*students)
        )
        scaled = with_gradients and scales(*students)
        if consumes and scaled and nobody_listens(features):
            loss, _ = _outputs(students, teachers, False, p)
            kernels(p.backend, "hint").hint_forward(students, teachers, loss, students, p)
            gradients: Sequence[Tensor] = students
        else:
            loss, gradients = forward(students, teachers, with_gradients, p)
        if scaled:
            ctx.save_for_backward(*students, *gradients)
        else:
            ctx.save_for_backward(*savable(*students, *gradients, *teachers))
        ctx.parameters, ctx.count, ctx.with_gradients = p, count, with_gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        tensors, count, p = ctx.saved_tensors, ctx.count, ctx.parameters
        students = tensors[:count]
        gradients = tensors[count : 2 * count] if ctx.with_gradients else ()
        if ctx.with_gradients and is_final(grad_output):
            return (None, None, *gradients, *[None] * count)
        check_grad_output("hint_loss", grad_output)
        teachers = tensors[count + len(gradients) :]
        needed = ctx.needs_input_grad[2:]
        with no_grad():
            if not ctx.with_gradients:
                to = backward(grad_output, students, teachers, needed[:count], needed[count:], p)
            else:
                to = for_grad_output(
                    gradients,
                    grad_output,
                    p.backend,
                    lambda to, in_place: rescale(to, grad_output, students, teachers, in_place, p),
                )
        found = of_wanted(to, needed)
        return (None, None, *differentiate_once("hint_loss", found, (*students, *teachers)))


def hint(students: Sequence[Tensor], teachers: Sequence[Tensor], consumes: bool, p: Hint) -> Tensor:
    """The loss of all pairs, differentiable where that is wanted; see `HintLoss` for `consumes`."""
    if wants_gradient(*students, *teachers):
        loss: Tensor = HintLoss.record(consumes, p, *students, *teachers)
        return loss
    return forward(students, teachers, False, p)[0]
