"""The losses as modules, with the keywords of the functions as attributes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd import regressor
from fastkd.dispatch import Backend
from fastkd.losses import checks
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.fsp import Pairs, fsp_loss
from fastkd.losses.hint import hint_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss
from fastkd.losses.soft_target import DistillationParts, distillation_loss, soft_target_loss


class _Loss(torch.nn.Module):
    """A module whose attributes are the keywords of one loss: what is set, the next call takes."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self._names = tuple(keywords)
        for name, value in keywords.items():
            setattr(self, name, value)

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """The keywords, as they would be written in a call."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class SoftTargetLoss(_Loss):
    """`fastkd.soft_target_loss` as a module; the same keywords, the same defaults."""

    temperature: float
    scale_t2: bool
    reduction: str
    dim: int
    teacher_weights: Iterable[float] | None
    backend: Backend | None

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        scale_t2: bool = True,
        reduction: str = "batchmean",
        dim: int = -1,
        teacher_weights: Iterable[float] | None = None,
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

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | Iterable[Tensor]) -> Tensor:
        """See `fastkd.soft_target_loss`."""
        return soft_target_loss(student_logits, teacher_logits, **self._keywords())


class DistillationLoss(_Loss):
    """`fastkd.distillation_loss` as a module; the same keywords, the same defaults."""

    temperature: float
    soft_weight: float
    hard_weight: float
    ignore_index: int
    label_smoothing: float
    dim: int
    teacher_weights: Iterable[float] | None
    return_parts: bool
    backend: Backend | None

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dim: int = -1,
        teacher_weights: Iterable[float] | None = None,
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
        self, student_logits: Tensor, teacher_logits: Tensor | Iterable[Tensor], labels: Tensor
    ) -> Tensor | DistillationParts:
        """See `fastkd.distillation_loss`."""
        return distillation_loss(student_logits, teacher_logits, labels, **self._keywords())


class AttentionTransferLoss(_Loss):
    """`fastkd.attention_transfer_loss` as a module; the same keywords, the same defaults."""

    kind: str
    p: float | None
    distance: str
    order: float | None
    beta: float
    resize: str | None
    reduction: str
    eps: float
    channel_dim: int
    backend: Backend | None

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
        self, student: Tensor | Iterable[Tensor], teacher: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """See `fastkd.attention_transfer_loss`."""
        return attention_transfer_loss(student, teacher, **self._keywords())


class _Half(int):
    """The keyword `half` of hints, which is `torch.nn.Module.half` where it is called."""

    convert: Callable[[], torch.nn.Module]

    def __call__(self) -> torch.nn.Module:
        return self.convert()

    def __repr__(self) -> str:
        return repr(bool(self))


class HintLoss(_Loss):
    """`fastkd.hint_loss` with a regressor of its own, of `student_channels` to `teacher_channels`.

    The regressor is an ordinary 1×1 `torch.nn.Conv2d` submodule: optimizers, DDP and
    `state_dict` see it. It exists where the channel counts are equal, too.

    Another module may take its place, and it may be wrapped, hooked, pruned, parametrized or
    sharded: then it is called with each of the student's features, and computes as modules do, in
    the features' dtype and, under autocast, in autocast's. The plain convolution, which
    `fastkd.hint_loss` takes by its weight, computes in float32 or wider at all times. A 1×1
    `Conv2d` takes features `(B, C, *spatial)` of any number of dimensions in either case.

    The attribute `half` is the keyword, and `half()` converts to float16, as of every module.
    """

    reduction: str
    backend: Backend | None
    regressor: torch.nn.Module

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

    @property
    def half(self) -> Any:
        """The paper's factor ½, True or False."""
        if not isinstance(self._half, bool):
            return self._half
        half = _Half(self._half)
        half.convert = super().half
        return half

    @half.setter
    def half(self, value: bool) -> None:
        self._half = bool(value) if isinstance(value, _Half) else value

    def forward(
        self, student: Tensor | Iterable[Tensor], teacher: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """See `fastkd.hint_loss`."""
        keywords: dict[str, Any] = {
            "reduction": self.reduction,
            "half": self._half,
            "backend": self.backend,
        }
        plain = regressor.plain_parameters(self.regressor)
        if plain is not None:
            weight, bias = plain
            return hint_loss(
                student, teacher, regressor_weight=weight, regressor_bias=bias, **keywords
            )
        students, teachers, is_sequence = checks.pairs(student, teacher)
        students = [regressor.regress(self.regressor, features) for features in students]
        if is_sequence:
            return hint_loss(students, teachers, **keywords)
        return hint_loss(students[0], teachers[0], **keywords)


class RKDDistanceLoss(_Loss):
    """`fastkd.rkd_distance_loss` as a module; the same keywords, the same defaults."""

    delta: float
    backend: Backend | None

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_distance_loss`."""
        return rkd_distance_loss(student, teacher, **self._keywords())


class RKDAngleLoss(_Loss):
    """`fastkd.rkd_angle_loss` as a module; the same keywords, the same defaults."""

    delta: float
    backend: Backend | None

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_angle_loss`."""
        return rkd_angle_loss(student, teacher, **self._keywords())


class SimilarityPreservingLoss(_Loss):
    """`fastkd.similarity_preserving_loss` as a module; the same keyword, the same default."""

    backend: Backend | None

    def __init__(self, *, backend: Backend | None = None) -> None:
        super().__init__(backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.similarity_preserving_loss`."""
        return similarity_preserving_loss(student, teacher, **self._keywords())


class FSPLoss(_Loss):
    """`fastkd.fsp_loss` as a module; the same keyword, the same default."""

    backend: Backend | None

    def __init__(self, *, backend: Backend | None = None) -> None:
        super().__init__(backend=backend)

    def forward(self, student: Pairs, teacher: Pairs) -> Tensor:
        """See `fastkd.fsp_loss`."""
        return fsp_loss(student, teacher, **self._keywords())
