"""A mix-in that makes a `LightningModule` distil; the extra is `fastkd[lightning]`.

Lightning itself is not imported: the mix-in fits `lightning` and `pytorch_lightning` alike.
"""

from typing import Any

import torch
from torch import nn

from fastkd.logits import Student, Teacher
from fastkd.losses.distillation import DistillationParts, distillation_loss

__all__ = ["DistillationMixin"]


class DistillationMixin:
    """A frozen teacher and `distillation_step` for a `LightningModule`, which it stands before.

    The module's own `forward` is the student: `self(inputs)` are its logits. The teacher is
    `self.teacher`: it follows the module to its device, stays in eval mode, needs no gradient, and
    is left out of checkpoints. Where a network returns no logits, or a `fastkd.LinearHead` shall
    take their place, override `student_logits` or `teacher_logits`.

    Args:
        *args: those of the module's other bases.
        teacher: the teacher. Required.
        **kwargs: as many as `fastkd.distillation_loss` has of its keywords, such as `temperature`,
            under `distillation`.

    Example:
        >>> import lightning
        >>> from fastkd.integrations.lightning import DistillationMixin
        >>> class Classifier(DistillationMixin, lightning.LightningModule):
        ...     def __init__(self, student, teacher):
        ...         super().__init__(teacher=teacher, distillation={"temperature": 4.0})
        ...         self.student = student
        ...
        ...     def forward(self, images):
        ...         return self.student(images)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         parts = self.distillation_step(batch)
        ...         self.log("soft", parts.soft)
        ...         return parts.loss
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.student.parameters(), lr=0.1)
    """
