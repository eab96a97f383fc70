"""Model-Optimizer's losses of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastkd.compat._common import wide
from fastkd.logits import Probabilities
from fastkd.losses.soft_target import soft_target_loss


class LogitsDistillationLoss(_Loss):
    """`T² KL(softmax(t/T) ‖ softmax(s/T))`, reduced as `F.kl_div` does; `losses.py`.

    Releases before 0.43 have `"batchmean"` as the default, which is the sum over the number of all
    rows there, and return the terms of each class with `"none"`.

    Args:
        temperature: T, above 0. Default: 1.0.
        reduction: `"mean"` for the sum over rows × classes, `"batchmean"` for the sum over the
            first dimension alone (L times larger for `(B, L, K)` than over rows), `"sum"`, or
            `"none"` for one loss for each row. Default: `"mean"`, K times smaller than the default
            of `fastkd.soft_target_loss`.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Of logits `(*rows, K)` a scalar; with `"none"` a tensor of the rows' shape."""
        return soft_target_loss(
            logits_s,
            logits_t.detach(),
            temperature=self._temperature,
            reduction=self._reduction,
            normalizer=max(len(logits_s), 1) if self._reduction == "batchmean" else None,
            dim=logits_s.ndim - 1,
        )


class MFTLoss(_Loss):
    """Soft targets of a teacher that is corrected where it is wrong or unsure; `losses.py`.

    Minifinetuning (Belcak et al. 2025). The teacher's `p = softmax(t/T)` is moved towards the label
    y, `(1 − f) p + f onehot(y)`: where its arg-max a is another class by `f = (p_a − p_y +
    threshold) / (1 + p_a − p_y)`, which leaves y ahead of a by the threshold, and elsewhere until
    `p_y` is larger by the threshold, or 1. The loss is `T² KL` from this target, a
    `fastkd.Probabilities`.

    Args:
        temperature: T, above 0. Default: 1.0.
        threshold: in [0, 1]. Default: 0.2.
        reduction: `"batchmean"` for the sum over the number of rows, `"mean"` for the sum over rows
            × classes, `"sum"`, or `"none"` for the terms of each class, which torch computes.
            Default: `"batchmean"`.
    """

    def __init__(
        self, temperature: float = 1.0, threshold: float = 0.2, reduction: str = "batchmean"
    ) -> None:
        super().__init__()
        self._temperature = temperature
        self._reduction = reduction
        self._threshold = threshold

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        """Of logits `(*, K)` and the labels `(rows,)` a scalar; with `"none"` `(rows, K)`."""
        student, teacher = (x.flatten(0, -2) for x in (logits_s, logits_t.detach()))
        if labels.ndim != 1:
            raise ValueError(f"labels must have one dimension, got {tuple(labels.shape)}")
        target = self._corrected((wide(teacher) / self._temperature).softmax(-1), labels)
        if self._reduction == "none":
            log_q = (wide(student) / self._temperature).log_softmax(-1)
            return F.kl_div(log_q, target, reduction="none") * self._temperature**2
        return soft_target_loss(
            student,
            Probabilities(target),
            temperature=self._temperature,
            reduction=self._reduction,
        )

    def _corrected(self, p: Tensor, labels: Tensor) -> Tensor:
        """In the memory of p."""
        labels = labels[:, None]
        of_largest, largest = p.max(-1, keepdim=True)
        of_label = p.gather(-1, labels)
        gap = of_largest - of_label
        if_wrong = (gap + self._threshold) / (1 + gap + 1e-7)
        wanted = (of_label + self._threshold).clamp(max=1)
        if_right = (wanted - of_largest) / (1 - of_largest + 1e-7)
        share = torch.where(largest == labels, if_right, if_wrong)
        return p.mul_(1 - share).scatter_add_(-1, labels, share)
