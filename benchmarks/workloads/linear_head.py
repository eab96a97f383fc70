"""Soft targets of two linear heads, whose logits eager PyTorch computes as a whole."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.workloads.divergence import rows_loss
from benchmarks.workloads.workload import Inputs, Workload

FAMILY = "soft targets, linear heads"
_ROWS, _HIDDEN, _CLASSES = 2048, 1024, 32000


def heads_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor, **keywords: Any
) -> Tensor:
    with torch.no_grad():
        of_teacher = F.linear(teacher, teacher_weight)
    return rows_loss(F.linear(student, weight), of_teacher, temperature=1.0, **keywords).mean()


def fused_heads_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor, **keywords: Any
) -> Tensor:
    heads = fastkd.LinearHead(student, weight), fastkd.LinearHead(teacher, teacher_weight)
    return fastkd.soft_target_loss(*heads, **keywords)


class _Products(torch.autograd.Function):
    """The products of such a step in chunks as fastkd picks them, and nothing between them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, other: Tensor) -> Any:
        size = 704
        logits = [x.new_empty(size, len(weight)) for x in (student, teacher)]
        to_student, to_weight = torch.empty_like(student), torch.empty_like(weight)
        for start in range(0, len(student), size):
            part, of_teacher = student[start : start + size], teacher[start : start + size]
            of_student = torch.mm(part, weight.T, out=logits[0][: len(part)])
            torch.mm(of_teacher, other.T, out=logits[1][: len(part)])
            torch.mm(of_student, weight, out=to_student[start : start + size])
            beta = 1 if start else 0
            torch.addmm(to_weight, of_student.T, part, beta=beta, out=to_weight)
        ctx.gradients = to_student, to_weight
        return student.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        to_student, to_weight = ctx.gradients
        return to_student, None, to_weight, None


def products(student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor) -> Tensor:
    found: Tensor = _Products.apply(student, teacher, weight, teacher_weight)
    return found


def scale_weights(inputs: Inputs) -> None:
    """So that logits are about as large as a language model's."""
    for name in ("weight", "teacher_weight"):
        inputs.parameters[name].mul_(_HIDDEN**-0.5 / 2)


_shape = (_ROWS, _HIDDEN)
_heads = partial(
    Workload,
    "soft_target_loss",
    FAMILY,
    (_shape,),
    (_shape,),
    heads_loss,
    fused=fused_heads_loss,
    classes=_CLASSES,
    prepare=scale_weights,
)

WORKLOADS = tuple(
    _heads(title=f"{divergence}, {_CLASSES} classes", keywords={"divergence": divergence})
    for divergence in ("forward_kl", "jsd")
)
