"""Autograd of losses on linear heads, whose logits never exist as a whole.

Forward computes the logits of a chunk of rows, and where it can their gradients and those of the
student's tensors. Otherwise backward goes through the chunks again, from the inputs alone.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd.autograd import (
    Fused,
    check_grad_output,
    differentiate_once,
    for_grad_output,
    is_final,
    no_grad,
    savable,
    scales,
    wants_gradient,
)
from fastkd.ops import linear_head_over_ranks as over_ranks
from fastkd.ops.linear_head_operators import backward, forward
from fastkd.ops.soft_target_operators import times
from fastkd.parameters import Heads, SoftTarget
from fastkd.ranks import Ranks

_NAME = "a loss on a linear head"
_FIRST = 8  # of the tensors, in `apply`


class LinearHeadLoss(Fused):
    """`apply(ranks, with_parts, sums, heads, p, labels, factor, sizes, *tensors)`.

    The tensors are those of the student, of the teachers, whose numbers are the `sizes`, and
    temperatures. The loss is that of each row; if `sums` it is their sum, each times the factor.
    The classes are split over the ranks, if there are any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks | None,
        with_parts: bool,
        sums: bool,
        heads: Heads,
        p: SoftTarget,
        labels: Tensor | None,
        factor: Tensor | None,
        sizes: tuple[int, int],
        *tensors: Tensor,
    ) -> Any:
        count = sizes[0]
        needed = ctx.needs_input_grad[_FIRST:]
        student, teachers, temperatures = _split(tensors, sizes)
        with_gradients = (
            sums
            and any(needed[:count])
            and not any(needed[count:])
            and (heads.student_is_head or scales(*student))
        )
        wanted = [with_gradients and want for want in needed[:count]]
        inputs = student, teachers, labels, temperatures
        losses, parts, gradients = _forward(ranks, *inputs, factor, with_parts, wanted, heads, p)
        if with_gradients:
            ctx.save_for_backward(*savable(*gradients, *student))
        else:
            ctx.save_for_backward(*savable(labels, factor, *tensors))
        ctx.parameters = ranks, sums, heads, p, sizes
        ctx.wanted = wanted
        loss = total(losses, factor) if sums else losses
        if not with_parts:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> Any:
        check_grad_output(_NAME, grad_output)
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[_FIRST:]
        ranks, sums, heads, p, sizes = ctx.parameters
        inputs: Sequence[Tensor]
        with no_grad():
            if any(ctx.wanted):
                count = sum(ctx.wanted)
                found, inputs = saved[:count], saved[count:]
                if not is_final(grad_output):
                    found = for_grad_output(found, grad_output, p.backend, _never)
                wanted: Sequence[bool] = ctx.wanted
            else:
                labels, factor, *inputs = saved
                if sums:
                    grad_output = times(grad_output, factor)
                    grad_output = grad_output.expand(inputs[0].shape[:-1])
                student, teachers, temperatures = _split(inputs, sizes)
                wanted = needed
                sides = student, teachers, labels, temperatures
                found = _backward(ranks, grad_output, *sides, list(wanted), heads, p)
            each = iter(found)
            gradients = [
                next(each).to(x.dtype) if want else None
                for x, want in zip(inputs, wanted, strict=True)
            ]
        others = (None,) * (len(needed) - len(gradients))
        guarded = differentiate_once(_NAME, tuple(gradients), tuple(inputs))
        return (*(None,) * _FIRST, *guarded, *others)


def _forward(ranks: Ranks | None, *inputs: Any) -> Any:
    return forward(*inputs) if ranks is None else over_ranks.forward(ranks, *inputs)


def _backward(ranks: Ranks | None, *inputs: Any) -> Any:
    return backward(*inputs) if ranks is None else over_ranks.backward(ranks, *inputs)


def _never(*_: Any) -> None:
    raise AssertionError("gradients are added up in float32 or float64, which multiply")


def _split(
    tensors: Sequence[Tensor], sizes: tuple[int, int]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    student, teachers = sizes
    return tensors[:student], tensors[student : student + teachers], tensors[student + teachers :]


def total(losses: Tensor, factor: Tensor | None) -> Tensor:
    """Their sum, each times the factor."""
    return (losses if factor is None else losses * factor).sum()


def linear_head(
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    heads: Heads,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    with_parts: bool = False,
    sums: bool = False,
    factor: Tensor | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, ...]:
    """`(loss,)` or `(loss, hard, T² D)`, the latter of each row; the factor is no part of them."""
    if ranks is not None:
        heads = over_ranks.agreed(student, teachers, heads, ranks)
    parts: Any = None
    tensors = _distinct([*student, *teachers, *temperatures])
    sizes = len(student), len(teachers)
    if wants_gradient(*tensors):
        inputs = labels, factor, sizes, *tensors
        found = LinearHeadLoss.record(ranks, with_parts, sums, heads, p, *inputs)
        loss, parts = found if with_parts else (found, None)
    else:
        sides = student, teachers, labels, temperatures
        wanted = [False] * len(student)
        losses, parts, _ = _forward(ranks, *sides, None, with_parts, wanted, heads, p)
        loss = total(losses, factor) if sums else losses
    return (loss, *parts.unbind()) if with_parts else (loss,)


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of those that come again: compiled code takes no tensor twice for a function."""
    found: list[Tensor] = []
    for tensor in tensors:
        again = any([tensor is other for other in found])
        found.append(tensor.view_as(tensor) if again else tensor)
    return found
