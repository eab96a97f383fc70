"""The losses as modules, with the keywords of the functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.dispatch import Backend
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.fsp import Pairs, fsp_loss
from fastkd.losses.hint import hint_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss
from fastkd.losses.soft_target import DistillationParts, distillation_loss, soft_target_loss


class _Loss(torch.nn.Module):
    """A module that holds the keywords of one loss and shows them."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.keywords = keywords

    def extra_repr(self) -> str:
        """The keywords, as they would be written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())


class SoftTargetLoss(_Loss):
    """`fastkd.soft_target_loss` as a module; the same keywords, the same defaults."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        scale_t2: bool = True,
        reduction: str = "batchmean",
        dim: int = -1,
        teacher_weights: Sequence[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            scale_t2=scale_t2,
            reduction=reduction,
            dim=dim,
            teacher_weights=teacher_weights,
            backend=backend,
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor]) -> Tensor:
        """See `fastkd.soft_target_loss`."""
        return soft_target_loss(student_logits, teacher_logits, **self.keywords)


class DistillationLoss(_Loss):
    """`fastkd.distillation_loss` as a module; the same keywords, the same defaults."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dim: int = -1,
        teacher_weights: Sequence[float] | None = None,
        return_parts: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            dim=dim,
            teacher_weights=teacher_weights,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor], labels: Tensor
    ) -> Tensor | DistillationParts:
        """See `fastkd.distillation_loss`."""
        return distillation_loss(student_logits, teacher_logits, labels, **self.keywords)


class AttentionTransferLoss(_Loss):
    """`fastkd.attention_transfer_loss` as a module; the same keywords, the same defaults."""

    def __init__(
        self,
        *,
        kind: str = "sum_pow",
        p: float | None = None,
        distance: str = "norm",
        order: float | None = None,
        beta: float = 1.0,
        resize: str | None = None,
        reduction: str = "mean",
        eps: float = 1e-12,
        channel_dim: int = 1,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            kind=kind,
            p=p,
            distance=distance,
            order=order,
            beta=beta,
            resize=resize,
            reduction=reduction,
            eps=eps,
            channel_dim=channel_dim,
            backend=backend,
        )

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """See `fastkd.attention_transfer_loss`."""
        return attention_transfer_loss(student, teacher, **self.keywords)


class HintLoss(_Loss):
    """`fastkd.hint_loss` with a regressor of its own, of `student_channels` to `teacher_channels`.

    The regressor is an ordinary 1×1 `torch.nn.Conv2d` submodule: optimizers, DDP and
    `state_dict` see it. It exists where the channel counts are equal, too.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        bias: bool = True,
        reduction: str = "batchmean",
        half: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(reduction=reduction, half=half, backend=backend)
        self.regressor = torch.nn.Conv2d(student_channels, teacher_channels, 1, bias=bias)

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """See `fastkd.hint_loss`."""
        return hint_loss(
            student,
            teacher,
            regressor_weight=self.regressor.weight,
            regressor_bias=self.regressor.bias,
            **self.keywords,
        )


class RKDDistanceLoss(_Loss):
    """`fastkd.rkd_distance_loss` as a module; the same keywords, the same defaults."""

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_distance_loss`."""
        return rkd_distance_loss(student, teacher, **self.keywords)


class RKDAngleLoss(_Loss):
    """`fastkd.rkd_angle_loss` as a module; the same keywords, the same defaults."""

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_angle_loss`."""
        return rkd_angle_loss(student, teacher, **self.keywords)


class SimilarityPreservingLoss(_Loss):
    """`fastkd.similarity_preserving_loss` as a module; the same keyword, the same default."""

    def __init__(self, *, backend: Backend | None = None) -> None:
        super().__init__(backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.similarity_preserving_loss`."""
        return similarity_preserving_loss(student, teacher, **self.keywords)


class FSPLoss(_Loss):
    """`fastkd.fsp_loss` as a module; the same keyword, the same default."""

    def __init__(self, *, backend: Backend | None = None) -> None:
        super().__init__(backend=backend)

    def forward(self, student: Pairs, teacher: Pairs) -> Tensor:
        """See `fastkd.fsp_loss`."""
        return fsp_loss(student, teacher, **self.keywords)
