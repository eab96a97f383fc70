"""Soft targets and hard labels together, as a module."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastkd.facts import Backend
from fastkd.logits import Student, Teacher
from fastkd.losses.distillation import DistillationParts, distillation_loss
from fastkd.nn.base import Loss


class DistillationLoss(Loss):
    """`fastkd.distillation_loss` as a module; the same keywords, the same defaults.

    Temperatures are those of `SoftTargetLoss`: numbers, parameters, or given in a call.

    Example:
        >>> criterion = fastkd.nn.DistillationLoss(temperature=4.0)
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> criterion(student, teacher, torch.randint(100, (64,))).backward()
    """

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    soft_weight: float
    hard_weight: float
    ignore_index: int
    label_smoothing: float
    reduction: str
    dim: int
    num_classes: int | None
    divergence: str
    beta: float
    inplace: bool
    chunk_size: int | None
    group: "torch.distributed.ProcessGroup | None"
    teacher_weights: Iterable[float] | None
    return_parts: bool
    backend: Backend | None

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        teacher_temperature: float | Tensor | None = None,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "batchmean",
        dim: int = -1,
        num_classes: int | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        inplace: bool = False,
        chunk_size: int | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
        teacher_weights: Iterable[float] | None = None,
        return_parts: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            dim=dim,
            num_classes=num_classes,
            divergence=divergence,
            beta=beta,
            inplace=inplace,
            chunk_size=chunk_size,
            group=group,
            teacher_weights=teacher_weights,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Student,
        teacher_logits: Teacher,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
    ) -> Tensor | DistillationParts:
        """See `fastkd.distillation_loss`."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._keywords(temperature=temperature, teacher_temperature=teacher_temperature),
        )
