"""The losses on features and relations that have no parameters, as modules."""

from collections.abc import Iterable

from torch import Tensor

from fastkd.facts import Backend
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.fsp import Pairs, fsp_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss
from fastkd.nn.base import Loss


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
