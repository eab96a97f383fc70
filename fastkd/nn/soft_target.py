"""Soft targets as a module."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastkd.facts import Backend
from fastkd.logits import Student, Teacher
from fastkd.losses.soft_target import soft_target_loss
from fastkd.nn.base import Loss


class SoftTargetLoss(Loss):
    """`fastkd.soft_target_loss` as a module; the same keywords, the same defaults.

    Each temperature may be a `torch.nn.Parameter` without dimensions, which is learned and moves
    with the module. A temperature that is given in a call takes the place of the module's there.

    Example:
        >>> criterion = fastkd.nn.SoftTargetLoss(temperature=4.0)
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> criterion(student, teacher).backward()
    """

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    scale_t2: bool
    reduction: str
    dim: int
    num_classes: int | None
    divergence: str
    beta: float
    inplace: bool
    chunk_size: int | None
    group: "torch.distributed.ProcessGroup | None"
    teacher_weights: Iterable[float] | None
    backend: Backend | None

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        scale_t2: bool = True,
        reduction: str = "batchmean",
        dim: int = -1,
        num_classes: int | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        inplace: bool = False,
        chunk_size: int | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
        teacher_weights: Iterable[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            scale_t2=scale_t2,
            reduction=reduction,
            dim=dim,
            num_classes=num_classes,
            divergence=divergence,
            beta=beta,
            inplace=inplace,
            chunk_size=chunk_size,
            group=group,
            teacher_weights=teacher_weights,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Student,
        teacher_logits: Teacher,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
    ) -> Tensor:
        """See `fastkd.soft_target_loss`."""
        return soft_target_loss(
            student_logits,
            teacher_logits,
            mask=mask,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._keywords(temperature=temperature, teacher_temperature=teacher_temperature),
        )
