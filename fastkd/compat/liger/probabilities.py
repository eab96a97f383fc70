"""Liger-Kernel's losses of probabilities and of their logarithms."""

from typing import Any

import torch
from torch import Tensor

from fastkd.compat._common import wide
from fastkd.compat.liger.linear import kept
from fastkd.logits import LogProbabilities
from fastkd.losses.soft_target import soft_target_loss


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """`Σ p (log max(p, eps) − log q)`; `liger_kernel/transformers/kl_div.py`.

    The gradient to log q is −p: that leaves nothing to fuse, and torch computes it. From the
    student's logits `fastkd.soft_target_loss(logits, fastkd.Probabilities(p))` reads them once for
    the softmax, too.

    Args:
        eps: not used with `log_target`. Default: 1e-10.
        *args: those of `torch.nn.KLDivLoss`.
        **kwargs: those of `torch.nn.KLDivLoss`, such as `reduction` (default: `"mean"`, over rows ×
            classes) and `log_target` (default: False).
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Of log-probabilities `(BT, V)` and the target a scalar, or `(BT, V)` with `"none"`."""
        y_pred, y_true = wide(y_pred), wide(y_true.detach())
        if self.log_target:
            terms = y_true.exp() * (y_true - y_pred)
        else:
            terms = y_true * (y_true.clamp(min=self.eps).log() - y_pred)
        return _reduced(terms, self.reduction, len(y_pred))


class LigerJSD(torch.nn.Module):
    """`beta KL(P‖M) + (1 − beta) KL(Q‖M)`, `M = beta P + (1 − beta) Q`; `transformers/jsd.py`.

    The gradient to log q is `(1 − beta) q log(q/m)`. One fused pass computes it with the sides
    exchanged: log q is used as it is, and log p takes the place of logits. That normalises rows of
    P that do not sum to 1, which the library does not do. From logits
    `fastkd.soft_target_loss(s, t, divergence="jsd", beta=beta, scale_t2=False)` computes both
    softmaxes as well.

    Args:
        beta: in [0, 1]; forward KL at 0, reverse KL at 1. Default: 0.5.
        ignore_index: the label of rows that do not count. Default: -100.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Of log-probabilities `(BT, V)` and labels `(BT,)` a scalar."""
        return soft_target_loss(
            log_p.detach(),
            LogProbabilities(log_q),
            divergence="jsd",
            beta=1 - self.beta,
            mask=kept(shift_labels, self.ignore_index),
        )


class LigerTVDLoss(torch.nn.Module):
    """`½ Σ |p − q|`; `liger_kernel/transformers/tvd.py`.

    The gradient to p is `½ sign(p − q)`: that leaves nothing to fuse, and torch computes it. From
    logits `fastkd.soft_target_loss(s, t, divergence="tvd")` reads them once for the softmax, too.

    Args:
        reduction: `"batchmean"`, `"sum"`, `"mean"` (over rows × classes) or `"none"`, of the rows
            that count. Default: `"batchmean"`.
        ignore_index: the label of rows that do not count. Default: -100.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Of probabilities `(BT, V)`, p the student's, a scalar, or `(BT, V)` with `"none"`."""
        terms = 0.5 * (wide(p) - wide(q.detach())).abs()
        counts = kept(shift_labels, self.ignore_index)
        if counts is None:
            return _reduced(terms, self.reduction, len(p))
        terms = terms.masked_fill(~counts[:, None], 0)
        return _reduced(terms, self.reduction, counts.sum().clamp(min=1))


def _reduced(terms: Tensor, reduction: str, rows: int | Tensor) -> Tensor:
    if reduction == "none":
        return terms
    if reduction == "batchmean":
        return terms.sum() / rows
    if reduction == "mean":
        return terms.sum() / (rows * terms.shape[-1])
    return terms.sum()
