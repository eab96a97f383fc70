"""A mix-in that makes a `LightningModule` distil; the extra is `fastkd[lightning]`.

Lightning itself is not imported: the mix-in fits `lightning` and `pytorch_lightning` alike.
"""

from typing import Any, Self

import torch
from torch import nn

from fastkd.logits import Student, Teacher
from fastkd.losses.distillation import DistillationParts, distillation_loss

__all__ = ["DistillationMixin"]


class DistillationMixin(nn.Module):
    """A frozen teacher and `distillation_step`, to be put before `LightningModule` as a base.

    The module's own `forward` is the student: `self(inputs)` are its logits. The teacher is
    `self.teacher`: it follows the module to its device, stays in eval mode, needs no gradient, and
    is no part of `state_dict`, so neither of checkpoints. (Lightning's warning that modules are in
    eval mode is about the teacher's.) A batch is a pair of inputs and labels. For networks that
    return something else than logits, or for `fastkd.LinearHead` in the place of logits, override
    `student_logits` and `teacher_logits`.

    Args:
        *args: those of the module's other bases.
        teacher: the teacher, which is frozen. Required.
        distillation: keywords of `fastkd.distillation_loss`, such as `temperature`. Default: None,
            its defaults.
        **kwargs: those of the module's other bases.

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
        ...         self.log_dict({"hard": parts.hard, "soft": parts.soft})
        ...         return parts.loss
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.student.parameters(), lr=0.1)
        >>> module = Classifier(torch.nn.Linear(8, 3), torch.nn.Linear(8, 3))
        >>> list(module.state_dict())
        ['student.weight', 'student.bias']
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        distillation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.distillation = distillation or {}
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the teacher, which stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def student_logits(self, inputs: Any) -> Student:
        """Compute the student's logits; override it where `self(inputs)` is something else."""
        return self(inputs)

    def teacher_logits(self, inputs: Any) -> Teacher:
        """Compute the teacher's logits; override it where its result is something else."""
        return self.teacher(inputs)

    def distillation_step(self, batch: Any) -> DistillationParts:
        """Compute the loss of a batch, with its hard and its soft part to log."""
        inputs, labels = batch
        with torch.no_grad():
            teacher = self.teacher_logits(inputs)
        return distillation_loss(
            self.student_logits(inputs), teacher, labels, return_parts=True, **self.distillation
        )


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]


def _put_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What loading would otherwise miss."""
    teacher: Any = module.teacher
    state |= {f"{prefix}teacher.{name}": x for name, x in teacher.state_dict().items()}
