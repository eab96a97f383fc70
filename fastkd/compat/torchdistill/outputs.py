"""The outputs of hooks that torchdistill's losses are called with, and checks that losses share."""

from collections.abc import Mapping
from typing import Any

import torch

# By the path of a module, and by "input" or "output".
Outputs = Mapping[str, Mapping[str, Any]]


def no_terms(reduction: str) -> None:
    """Refuse the reduction that keeps a row's terms."""
    if reduction == "none":
        raise ValueError('reduction must not be "none": fastkd adds up the terms of a row')


def check_mode(mode: str) -> None:
    """Refuse what is no mode."""
    if mode not in ("code", "paper"):
        raise ValueError(f'mode must be "code" or "paper", got {mode!r}')


class OfTwoModules(torch.nn.Module):
    """A loss of one output of the student and one of the teacher."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
    ) -> None:
        super().__init__()
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io

    def outputs(self, student: Outputs, teacher: Outputs) -> tuple[Any, Any]:
        return (
            student[self.student_module_path][self.student_module_io],
            teacher[self.teacher_module_path][self.teacher_module_io],
        )
