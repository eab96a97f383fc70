"""The temperatures of both sides: numbers, or tensors that receive their gradients."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkd.losses import checks, rows
from fastkd.precision import compute_dtype
from fastkd.tensors import can_be_read


def check(
    sides: Sequence[Tensor],
    dim: int,
    temperature: Any,
    teacher_temperature: Any,
    scale_t2: bool,
    labels: Tensor | None,
    ignore_index: int,
) -> tuple[float, float, tuple[Tensor, ...]]:
    """The temperatures for `sides`, student first, whose rows count but for the ignored labels.

    The student's number and the teacher's; and tensors in their place, if any. Where there are
    tensors both numbers are 1. The tensors are the student's, the teacher's, and those whose
    squares multiply the divergence: each of the rows' shape, in the precision of the loss.
    """
    if teacher_temperature is None and not isinstance(temperature, Tensor):
        number = checks.number("temperature", temperature, above=0)
        return number, number, ()
    counts = None if labels is None else labels != ignore_index
    student = _check_one("temperature", temperature, sides[0], dim, counts)
    if teacher_temperature is None:
        teacher = student
    else:
        teacher = _check_one("teacher_temperature", teacher_temperature, sides[0], dim, counts)
    if not isinstance(student, Tensor) and not isinstance(teacher, Tensor):
        return student, teacher, ()
    of_student = _of_rows(student, sides, dim)
    # Views, because compiled code takes no tensor twice for an autograd function.
    if teacher is student:
        of_teacher = of_student.view_as(of_student)
    else:
        of_teacher = _of_rows(teacher, sides, dim)
    root = of_student.view_as(of_student) if scale_t2 else _of_rows(1.0, sides, dim)
    return 1.0, 1.0, (of_student, of_teacher, root)


def _check_one(
    name: str, value: Any, student: Tensor, dim: int, counts: Tensor | None
) -> float | Tensor:
    """A number above 0, or a tensor of such, NaN in the place of others that cannot be raised."""
    if not isinstance(value, Tensor):
        return checks.number(name, value, above=0)
    checks.floating((name, value))
    checks.same_device("student_logits", student, name, value)
    shape = rows.shape_of(student, dim)
    if value.ndim > 0 and value.shape != shape:
        raise ValueError(
            f"{name} must be a number, a tensor without dimensions, or one of the logits' shape "
            f"without dim {dim}, {tuple(shape)}, got {tuple(value.shape)}"
        )
    wrong = ~((value > 0) & (value < math.inf))
    if not can_be_read(value):
        return value.masked_fill(wrong, math.nan)
    if value.ndim > 0 and counts is not None:
        wrong = wrong & counts
    if wrong.any():
        raise ValueError(f"{name} must be finite and > 0, got {value[wrong][0].item()}")
    return value


def _of_rows(value: float | Tensor, sides: Sequence[Tensor], dim: int) -> Tensor:
    student, dtype = sides[0], compute_dtype(*sides)
    shape = rows.shape_of(student, dim)
    if isinstance(value, Tensor):
        return value.to(dtype).expand(shape).contiguous()
    return student.new_ones(shape, dtype=dtype, requires_grad=False) * value
