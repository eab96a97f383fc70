"""What language models bring along, in soft targets: padding, and numbers of each row."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.workloads.divergence import rows_loss
from benchmarks.workloads.workload import Inputs, Shape, Workload

FAMILY = "soft targets, keywords"
_SHAPE = (1024, 32000)
_TEMPERATURE = 2.0
_forward_kl = partial(rows_loss, divergence="forward_kl")


def padded_loss(student: Tensor, teacher: Tensor, *, num_classes: int, **keywords: Any) -> Tensor:
    return _forward_kl(student[:, :num_classes], teacher[:, :num_classes], **keywords).mean()


def temperatures_loss(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature[:, None], dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature[:, None], dim=-1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (rows * temperature**2).mean()


def fused_temperatures_loss(
    student: Tensor, teacher: Tensor, temperature: Tensor, **keywords: Any
) -> Tensor:
    return fastkd.soft_target_loss(student, teacher, temperature=temperature, **keywords)


def teachers_temperature_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / teacher_temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def weighted_loss(student: Tensor, teacher: Tensor, weight: Tensor, **keywords: Any) -> Tensor:
    return (_forward_kl(student, teacher, **keywords) * weight).mean()


def fused_weighted_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, **keywords: Any
) -> Tensor:
    return fastkd.soft_target_loss(student, teacher, row_weight=weight, **keywords)


def probabilities_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, teacher.float(), reduction="batchmean") * temperature**2


def fused_probabilities_loss(student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    return fastkd.soft_target_loss(student, fastkd.Probabilities(teacher), **keywords)


def add_numbers_of_rows(inputs: Inputs) -> None:
    """Between 1 and 3, one for each row."""
    student = inputs.batch[0]
    assert isinstance(student, Tensor)
    inputs.batch += (torch.linspace(1, 3, len(student), device=student.device),)


def soften_teacher(inputs: Inputs) -> None:
    teacher = inputs.batch[1]
    assert isinstance(teacher, Tensor)
    teacher.copy_(F.softmax(teacher.float() / _TEMPERATURE, dim=-1))


_workload = partial(Workload, "soft_target_loss", FAMILY)
_plain = partial(_workload, (_SHAPE,), (_SHAPE,))
_number: dict[str, Any] = {"temperature": _TEMPERATURE}
_padded: tuple[Shape, Shape] = ((1024, 32128), (1024, 32256))

WORKLOADS = (
    _workload(
        *((shape,) for shape in _padded),
        padded_loss,
        title="32000 classes of a padded vocabulary",
        keywords={**_number, "num_classes": _SHAPE[1]},
    ),
    _plain(
        temperatures_loss,
        title="a temperature per row",
        fused=fused_temperatures_loss,
        prepare=add_numbers_of_rows,
    ),
    _plain(
        teachers_temperature_loss,
        title="the teacher's own temperature",
        keywords={**_number, "teacher_temperature": 1.0},
    ),
    _plain(
        weighted_loss,
        title="a weight per row",
        keywords=_number,
        fused=fused_weighted_loss,
        prepare=add_numbers_of_rows,
    ),
    _plain(
        probabilities_loss,
        title="a teacher's probabilities",
        keywords=_number,
        fused=fused_probabilities_loss,
        prepare=soften_teacher,
    ),
)
