"""What a training step is measured on: student, teacher, a batch, and the losses between them.

The losses come in forms. The eager ones are the statements of `benchmarks.workloads`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastkd
from benchmarks.models import LinearHead, Output, resnet, wide_resnet
from benchmarks.workloads import attention, hint, soft_target
from fastkd.dispatch import Explanation


class Losses(NamedTuple):
    """One form of the losses; all take the arguments of fastkd's."""

    soft_target: Callable[..., Tensor]
    distillation: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    hint: Callable[..., Tensor]


EAGER = Losses(
    soft_target.soft_target_loss,
    soft_target.distillation_loss,
    attention.paper_loss,
    hint.hint_loss,
)
FASTKD = Losses(
    fastkd.soft_target_loss,
    fastkd.distillation_loss,
    fastkd.attention_transfer_loss,
    fastkd.hint_loss,
)

# (losses, student, teacher, labels)
Criterion = Callable[[Losses, Output, Output, Tensor], Tensor]
# The student stays what it is: after hundreds of steps with one batch, or with given gradients, its
# numbers would be of another kind, and what they are has an influence on the time.
_LEARNING_RATE = 1e-6
# In the middle of the network, as in FitNets.
_HINT_STAGE = 1


@dataclass
class Task:
    """A student that learns from a teacher; both see the same batch in every step."""

    name: str
    title: str
    student: nn.Module
    teacher: nn.Module
    student_input: Tensor
    teacher_input: Tensor
    labels: Tensor
    criterion: Criterion
    autocast: torch.dtype | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    @property
    def dtype(self) -> torch.dtype:
        """What the losses see."""
        return self.autocast or self.student_input.dtype

    def learners(self) -> list[Tensor]:
        """What receives a gradient: parameters and, below a head, hidden states."""
        hidden = [self.student_input] if self.student_input.requires_grad else []
        return [*self.student.parameters(), *hidden]

    def casting(self) -> contextlib.AbstractContextManager[None]:
        """Around the networks and the losses, as in a training loop; not around backward."""
        device = self.student_input.device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)

    def outputs(self) -> tuple[Output, Output]:
        with torch.no_grad():
            target = self.teacher(self.teacher_input)
        return self.student(self.student_input), target

    def explanations(self) -> list[Explanation]:
        """Which backend serves each of fastkd's losses here."""
        found = []

        def explaining(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def explained(*arguments: object, **keywords: object) -> Tensor:
                found.append(fastkd.explain(loss, *arguments, **keywords))
                return torch.zeros(())

            return explained

        with self.casting():
            self.criterion(Losses(*map(explaining, FASTKD)), *self.outputs(), self.labels)
        return found


def _on_cifar(losses: Losses, student: Output, teacher: Output, labels: Tensor) -> Tensor:
    soft = losses.soft_target(student.logits, teacher.logits, temperature=4.0)
    guided, hinted = student.features[_HINT_STAGE], teacher.features[_HINT_STAGE]
    return (
        soft
        + losses.attention(student.features, teacher.features)
        + losses.hint(guided, hinted, reduction="mean", half=False)
    )


def _on_imagenet(losses: Losses, student: Output, teacher: Output, labels: Tensor) -> Tensor:
    soft = losses.soft_target(student.logits, teacher.logits, temperature=4.0)
    return soft + losses.attention(student.features, teacher.features)


def _on_tokens(losses: Losses, student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return losses.distillation(student.logits, teacher.logits, labels, temperature=2.0)


def cifar(device: str, small: bool, dtype: torch.dtype = torch.float32) -> Task:
    """Launches decide here: many small kernels."""
    batch, size = (4, 16) if small else (128, 32)
    if small:
        title = f"narrow WRN-10-2 ← WRN-16-2, batch {batch}, {size}×{size}"
        student, teacher = (wide_resnet(depth, 2, base=4) for depth in (10, 16))
    else:
        title = f"WRN-16-2 ← WRN-40-2, batch {batch}, {size}×{size}"
        student, teacher = (wide_resnet(depth, 2) for depth in (16, 40))
    images = torch.randn(batch, 3, size, size, dtype=dtype, device=device)
    return Task(
        "cifar",
        f"{title}: soft targets, attention, hint",
        student.to(device, dtype),
        teacher.to(device, dtype),
        images,
        images,
        torch.empty(0),
        _on_cifar,
    )


def imagenet(device: str, small: bool) -> Task:
    """Memory decides here; channels_last, under bfloat16 autocast."""
    batch, size, base = (2, 64, 8) if small else (256, 224, 64)
    narrow = "narrow " if small else ""
    student, teacher = (resnet(blocks, base=base) for blocks in ((2, 2, 2, 2), (3, 4, 6, 3)))
    layout = torch.channels_last
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    return Task(
        "imagenet",
        f"{narrow}ResNet-18 ← ResNet-34, batch {batch}, {size}×{size}: soft targets, attention",
        student.to(device, memory_format=layout),
        teacher.to(device, memory_format=layout),
        images,
        images,
        torch.empty(0),
        _on_imagenet,
        autocast=torch.bfloat16,
    )


def tokens(device: str, small: bool) -> Task:
    """The head of a language model, with the gradient of the hidden states below it."""
    rows, hidden, classes = (32, 64, 1000) if small else (8192, 2048, 128256)
    made = {"dtype": torch.bfloat16, "device": device}
    student, teacher = (LinearHead(hidden, classes, bias=False, **made) for _ in range(2))
    return Task(
        "tokens",
        f"head of {hidden} ← {hidden}, {rows} tokens, {classes} classes: soft and hard targets",
        student,
        teacher,
        torch.randn(rows, hidden, **made).requires_grad_(),
        torch.randn(rows, hidden, **made),
        torch.randint(classes, (rows,), device=device),
        _on_tokens,
    )


TASKS: dict[str, Callable[[str, bool], Task]] = {
    "cifar": cifar,
    "imagenet": imagenet,
    "tokens": tokens,
}
