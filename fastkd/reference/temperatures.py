"""The temperatures of a call as the reference has them: numbers, or tensors of one for each row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.parameters import SoftTarget


class Temperatures(NamedTuple):
    """Numbers, or tensors that broadcast against the rows' classes.

    `weight` is what a divergence times the student's temperature is multiplied by, and
    `teacher_weight` one times the teacher's; `squared` is the first without the soft term's weight.
    """

    student: float | Tensor
    teacher: float | Tensor
    weight: float | Tensor
    teacher_weight: float | Tensor
    squared: float | Tensor

    @property
    def ratio(self) -> float | Tensor:
        """What brings the teacher's logits to the student's temperature."""
        return self.student / self.teacher


def temperatures_of(
    temperatures: Sequence[Tensor], labels: Tensor | None, p: SoftTarget
) -> Temperatures:
    """From the operators' operand, or where there is none from the parameters."""
    if not temperatures:
        student, teacher = p.temperature, p.teacher_temperature
        weights = p.soft_weight / student, p.soft_weight / teacher
        return Temperatures(student, teacher, *weights, student)
    if labels is not None:
        ignored = labels == p.ignore_index
        temperatures = [t.masked_fill(ignored, 1) for t in temperatures]
    of_student, of_teacher, root = (t[..., None] for t in temperatures)
    squared = root * (root / of_student)
    return Temperatures(
        of_student,
        of_teacher,
        p.soft_weight * squared,
        p.soft_weight * (root * (root / of_teacher)),
        squared,
    )


def of_rows(x: float | Tensor) -> float | Tensor:
    """A number, or one for each row."""
    return x.squeeze(-1) if isinstance(x, Tensor) else x


def over(x: Tensor, temperature: float | Tensor) -> Tensor:
    """`x / temperature`.

    To a temperature's gradient infinite logits contribute nothing, and neither do those whose
    derivative would be infinite.
    """
    if not isinstance(temperature, Tensor):
        return x / temperature
    number = temperature.detach()
    infinite = (x.detach() / number / number).isinf()
    return torch.where(infinite, x / number, x.masked_fill(infinite, 0) / temperature)


def times(x: Tensor, ratio: float | Tensor) -> Tensor:
    """`x * ratio`. To a temperature's gradient infinite logits contribute nothing."""
    if not isinstance(ratio, Tensor):
        return x * ratio
    infinite = x.isinf()
    return torch.where(infinite, x * ratio.detach(), x.masked_fill(infinite, 0) * ratio)
