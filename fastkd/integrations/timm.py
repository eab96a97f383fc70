"""timm's distillation task on fastkd; the extra is `fastkd[timm]`."""

from typing import Any

import torch
from timm import task
from torch import Tensor, nn

from fastkd.losses.soft_target import soft_target_loss

__all__ = ["LogitDistillationTask"]


class LogitDistillationTask(task.LogitDistillationTask):
    """`timm.task.LogitDistillationTask` whose divergence fastkd computes.

    `task_loss_weight * criterion(student, target) + distill_loss_weight * T^2 * KL(teacher ‖
    student at T)`, the second averaged over the images. Only `forward` is overridden: teachers,
    weights, `prepare_distributed`, `compile` and checkpoints are timm's. The criterion, which may
    take soft targets of mixed images, stays a pass of its own.

    Args:
        student_model: the student.
        teacher_model: a name of timm's, a module, or a `timm.task.DistillationTeacher`.
        divergence: of the logits, by a name of `fastkd.soft_target_loss`. Default: `"forward_kl"`,
            timm's.
        beta: in [0, 1], of `"jsd"` and the skew divergences. Default: 0.5.
        teacher_temperature: the teacher's own T. Default: None, `temperature`.
        **keywords: those of `timm.task.LogitDistillationTask`, such as `temperature`.

    Example:
        >>> import timm
        >>> from fastkd.integrations.timm import LogitDistillationTask
        >>> student = timm.create_model("resnet10t", num_classes=10)
        >>> teacher = timm.create_model("resnet14t", num_classes=10)
        >>> task = LogitDistillationTask(student, teacher, temperature=4.0, task_loss_weight=0.1)
        >>> task(torch.randn(2, 3, 32, 32), torch.randint(10, (2,)))["loss"].backward()
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        teacher_temperature: float | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(student_model, teacher_model, **keywords)
        self.divergence = divergence
        self.beta = beta
        self.teacher_temperature = teacher_temperature

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute `loss`, `output` (the student's logits), `task_loss` and `kd_loss` of a batch."""
        student = self.trainable_module(input)
        task_loss = self.criterion(student, target)
        with torch.no_grad():
            teacher = self.teacher(
                self.teacher.normalize_input(input, self.student_mean, self.student_std)
            )
        kd_loss = soft_target_loss(
            student,
            teacher,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            divergence=self.divergence,
            beta=self.beta,
        )
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": student, "task_loss": task_loss, "kd_loss": kd_loss}
