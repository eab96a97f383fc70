"""Whether the gradient of a loss may take the place of the student's logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.losses import checks
from fastkd.tensors import obstacle_to_kernels


def check_inplace(
    inplace: bool,
    student: Tensor,
    teachers: Sequence[Tensor],
    temperatures: Sequence[Tensor],
    reduction: str,
    row_weight: Tensor | None,
) -> bool:
    """Whether it does, in this call.

    It does not where nobody wants a gradient, nor in compiled code, where the compiler decides what
    shares memory.
    """
    if not checks.flag("inplace", inplace):
        return False
    if reduction == "none":
        raise ValueError(
            "inplace=True needs a loss that is one number, which that of reduction='none' is not"
        )
    if not torch.is_grad_enabled() or not student.requires_grad or torch.compiler.is_compiling():
        return False
    problem = _problem(student, teachers, temperatures, row_weight)
    if problem is not None:
        raise ValueError(f"inplace=True does not take {problem}; pass inplace=False")
    return True


def _problem(
    student: Tensor,
    teachers: Sequence[Tensor],
    temperatures: Sequence[Tensor],
    row_weight: Tensor | None,
) -> str | None:
    obstacle = obstacle_to_kernels((student, *teachers, row_weight, *temperatures))
    if obstacle is not None:
        return f"tensors that only the reference serves ({obstacle})"
    if student.is_leaf:
        return "student logits that are a leaf of the graph, whose values belong to the program"
    if student._is_view():
        return (
            "student logits that are a view, because another tensor would change, too: logits of "
            "any shape can be passed as the model returns them, with dim and mask in the place of "
            "reshaping and slicing"
        )
    learning = (*teachers, *temperatures, *(() if row_weight is None else (row_weight,)))
    if any([x.requires_grad for x in learning]):
        return (
            "a teacher, a temperature or a row_weight that requires a gradient, which needs the "
            "student's logits in backward"
        )
    memory = student.untyped_storage()._cdata
    if any([teacher.untyped_storage()._cdata == memory for teacher in teachers]):
        return "a teacher that shares its memory with the student"
    return None
