"""Pairs of the student's and the teacher's features: their checks, and their weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.losses import checks
from fastkd.precision import compute_dtype


def check(student: Any, teacher: Any) -> tuple[list[Tensor], list[Tensor], bool]:
    """Student and teacher as equally long lists, and whether sequences came in."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        checks.floating(("student", student), ("teacher", teacher))
        checks.same_device("student", student, "teacher", teacher)
        return [student], [teacher], False
    students, teachers = checks.items(student), checks.items(teacher)
    is_sequence = students is not None
    if is_sequence != (teachers is not None):
        raise TypeError(
            "student and teacher must both be tensors or both be sequences of tensors, "
            f"got {type(student).__name__} and {type(teacher).__name__}"
        )
    if students is None or teachers is None:
        students, teachers = [student], [teacher]
    if len(students) != len(teachers):
        raise ValueError(
            "student and teacher must have the same number of feature maps, "
            f"got {len(students)} and {len(teachers)}"
        )
    if not students:
        raise ValueError("student and teacher must hold at least one pair, got none")
    for index, (one, other) in enumerate(zip(students, teachers, strict=True)):
        first, second = names(is_sequence, index)
        checks.floating((first, one), (second, other))
        checks.same_device(first, one, second, other)
        if index > 0:
            checks.same_device("student[0]", students[0], first, one)
    return students, teachers, is_sequence


def names(is_sequence: bool, index: int) -> tuple[str, str]:
    """What the user calls the two sides of a pair."""
    return (f"student[{index}]", f"teacher[{index}]") if is_sequence else ("student", "teacher")


def check_weights(value: Any, pairs: int) -> list[float] | None:
    """One number for each pair; None where they all count the same."""
    if value is None:
        return None
    given = checks.items(value)
    if given is None:
        raise TypeError(f"pair_weights must be a sequence of numbers, got {type(value).__name__}")
    if len(given) != pairs:
        raise ValueError(
            f"pair_weights must hold one number for each pair, {pairs} here, got {len(given)}"
        )
    return [checks.number(f"pair_weights[{i}]", weight) for i, weight in enumerate(given)]


def total(
    loss: Callable[[list[Tensor], list[Tensor], float], Tensor],
    students: list[Tensor],
    teachers: list[Tensor],
    weights: Sequence[float] | None,
) -> Tensor:
    """`loss(students, teachers, factor)`: of all pairs at once, or of each with its own factor.

    The loss is a scalar, which is summed, or `(pairs, B)`.
    """
    if weights is None:
        return loss(students, teachers, 1.0)
    is_double = compute_dtype(*students, *teachers) == torch.float64
    losses = []
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        # Each call computes in float64 if any pair holds it, as one call of all pairs would.
        student = student.double() if is_double else student
        losses.append(loss([student], [teacher], weight))
    return torch.cat(losses) if losses[0].ndim else torch.stack(losses).sum()
