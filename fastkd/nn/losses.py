"""The losses without parameters as modules."""

from collections.abc import Iterable

from torch import Tensor

from fastkd.facts import Backend
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.distillation import DistillationParts, distillation_loss
from fastkd.losses.fsp import Pairs, fsp_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss
from fastkd.losses.soft_target import soft_target_loss
from fastkd.nn.base import Loss


class SoftTargetLoss(Loss):
    """`fastkd.soft_target_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.SoftTargetLoss(temperature=4.0)
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> criterion(student, teacher).backward()
    """

    temperature: float
    scale_t2: bool
    reduction: str
    dim: int
    num_classes: int | None
    divergence: str
    beta: float
    inplace: bool
    teacher_weights: Iterable[float] | None
    backend: Backend | None

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        scale_t2: bool = True,
        reduction: str = "batchmean",
        dim: int = -1,
        num_classes: int | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        inplace: bool = False,
        teacher_weights: Iterable[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            scale_t2=scale_t2,
            reduction=reduction,
            dim=dim,
            num_classes=num_classes,
            divergence=divergence,
            beta=beta,
            inplace=inplace,
            teacher_weights=teacher_weights,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Iterable[Tensor],
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """See `fastkd.soft_target_loss`."""
        return soft_target_loss(
            student_logits,
            teacher_logits,
            mask=mask,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._keywords(),
        )


class DistillationLoss(Loss):
    """`fastkd.distillation_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.DistillationLoss(temperature=4.0)
        >>> student, teacher = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        >>> criterion(student, teacher, torch.randint(100, (64,))).backward()
    """

    temperature: float
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
        reduction: str = "batchmean",
        dim: int = -1,
        num_classes: int | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        inplace: bool = False,
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
            reduction=reduction,
            dim=dim,
            num_classes=num_classes,
            divergence=divergence,
            beta=beta,
            inplace=inplace,
            teacher_weights=teacher_weights,
            return_parts=return_parts,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Iterable[Tensor],
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | DistillationParts:
        """See `fastkd.distillation_loss`."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._keywords(),
        )


class AttentionTransferLoss(Loss):
    """`fastkd.attention_transfer_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.AttentionTransferLoss(distance="mse", beta=1000.0)
        >>> student, teacher = torch.randn(8, 16, 32, 32), torch.randn(8, 64, 32, 32)
        >>> loss = criterion(student, teacher)
    """

    kind: str
    p: float | None
    distance: str
    order: float | None
    beta: float
    pair_weights: Iterable[float] | None
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
        pair_weights: Iterable[float] | None = None,
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
            pair_weights=pair_weights,
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


class RKDDistanceLoss(Loss):
    """`fastkd.rkd_distance_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.RKDDistanceLoss()
        >>> loss = 25 * criterion(torch.randn(64, 32), torch.randn(64, 128))
    """

    delta: float
    backend: Backend | None

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_distance_loss`."""
        return rkd_distance_loss(student, teacher, **self._keywords())


class RKDAngleLoss(Loss):
    """`fastkd.rkd_angle_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.RKDAngleLoss()
        >>> loss = 50 * criterion(torch.randn(64, 32), torch.randn(64, 128))
    """

    delta: float
    backend: Backend | None

    def __init__(self, *, delta: float = 1.0, backend: Backend | None = None) -> None:
        super().__init__(delta=delta, backend=backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `fastkd.rkd_angle_loss`."""
        return rkd_angle_loss(student, teacher, **self._keywords())


class SimilarityPreservingLoss(Loss):
    """`fastkd.similarity_preserving_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.SimilarityPreservingLoss()
        >>> loss = 3000 * criterion(torch.randn(64, 16, 8, 8), torch.randn(64, 64, 4, 4))
    """

    pair_weights: Iterable[float] | None
    backend: Backend | None

    def __init__(
        self,
        *,
        pair_weights: Iterable[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(pair_weights=pair_weights, backend=backend)

    def forward(
        self, student: Tensor | Iterable[Tensor], teacher: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """See `fastkd.similarity_preserving_loss`."""
        return similarity_preserving_loss(student, teacher, **self._keywords())


class FSPLoss(Loss):
    """`fastkd.fsp_loss` as a module; the same keywords, the same defaults.

    Example:
        >>> criterion = fastkd.nn.FSPLoss()
        >>> student = torch.randn(8, 16, 32, 32), torch.randn(8, 32, 16, 16)
        >>> teacher = torch.randn(8, 16, 32, 32), torch.randn(8, 32, 16, 16)
        >>> loss = criterion(student, teacher)
    """

    pair_weights: Iterable[float] | None
    backend: Backend | None

    def __init__(
        self,
        *,
        pair_weights: Iterable[float] | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(pair_weights=pair_weights, backend=backend)

    def forward(self, student: Pairs, teacher: Pairs) -> Tensor:
        """See `fastkd.fsp_loss`."""
        return fsp_loss(student, teacher, **self._keywords())
