"""What losses on relations between samples share: slopes of each side, a product in backward."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastkd.autograd import check_grad_output, differentiate_once, no_grad, savable


def compare_sides(
    compare: Callable[..., None],
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    *parameters: Any,
) -> None:
    """Fill the loss and the slopes that are wanted.

    A kernel fills those of its first side; the losses are the same with their sides swapped.
    """
    if to_student is not None or to_teacher is None:
        compare(student, teacher, loss, to_student, *parameters)
    if to_teacher is not None:
        compare(teacher, student, loss, to_teacher, *parameters)


def keep(ctx: Any, sides: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
    """For `gradients`, those that need one, each with its slopes."""
    wanted = zip(sides, slopes, ctx.needs_input_grad[:2], strict=True)
    ctx.save_for_backward(*savable(*(x for *side, want in wanted if want for x in side)))


def gradients(
    ctx: Any, loss: str, product: Callable[[Tensor, Tensor, Tensor], Tensor], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Of student and teacher, `product(grad_output, slopes, side)` where one is needed."""
    check_grad_output(loss, grad_output)
    tensors = ctx.saved_tensors
    sides, slopes = tuple(tensors[::2]), tensors[1::2]
    with no_grad():
        found = [product(grad_output, *pair) for pair in zip(slopes, sides, strict=True)]
    left = iter(differentiate_once(loss, tuple(found), sides))
    return tuple([next(left) if want else None for want in ctx.needs_input_grad[:2]])
