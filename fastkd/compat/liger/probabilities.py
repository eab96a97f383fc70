"""Liger-Kernel's losses of probabilities and of their logarithms."""

from typing import Any

import torch
from torch import Tensor

from fastkd.compat.liger import terms
from fastkd.compat.liger.linear import kept


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """`Σ p (log max(p, eps) − log q)`; `liger_kernel/transformers/kl_div.py`.

    The gradient to log q is −p: there is no softmax to fuse, and torch computes it in chunks of
    rows. From the student's logits `fastkd.soft_target_loss(logits, fastkd.Probabilities(p))` reads
    them once for the softmax, too.

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
        formula = terms.KL_OF_LOGS if self.log_target else terms.kl(self.eps)
        return _reduced(formula, y_pred, y_true, self.reduction)


class LigerJSD(torch.nn.Module):
    """`beta KL(P‖M) + (1 − beta) KL(Q‖M)`, `M = beta P + (1 − beta) Q`; `transformers/jsd.py`.

    The gradient to log q is `(1 − beta) q log(q/m)`: there is no softmax to fuse, and torch
    computes it in chunks of rows. From logits `fastkd.soft_target_loss(s, t, divergence="jsd",
    beta=beta, scale_t2=False)` computes both softmaxes as well, in one pass.

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
        counts = kept(shift_labels, self.ignore_index)
        return _reduced(terms.jsd(self.beta), log_q, log_p, "batchmean", counts)


class LigerTVDLoss(torch.nn.Module):
    """`½ Σ |p − q|`; `liger_kernel/transformers/tvd.py`.

    The gradient to p is `½ sign(p − q)`: there is no softmax to fuse, and torch computes it in
    chunks of rows. From logits `fastkd.soft_target_loss(s, t, divergence="tvd")` reads them once
    for the softmax, too.

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
        return _reduced(terms.TVD, p, q, self.reduction, kept(shift_labels, self.ignore_index))


def _reduced(
    formula: terms.Formula,
    student: Tensor,
    teacher: Tensor,
    reduction: str,
    counts: Tensor | None = None,
) -> Tensor:
    """Over the rows that count, which divide as 1 at least."""
    if counts is not None and counts.shape != student.shape[:1]:
        raise ValueError(f"shift_labels must have the shape (BT,), got {tuple(counts.shape)}")
    if reduction == "none":
        found = terms.compute(formula, student, teacher, summed=False)
        return found if counts is None else found.masked_fill(~counts[:, None], 0)
    losses = terms.compute(formula, student, teacher, summed=True)
    rows: int | Tensor = max(len(student), 1)
    if counts is not None:
        losses, rows = losses.masked_fill(~counts, 0), counts.sum().clamp(min=1)
    if reduction == "batchmean":
        return losses.sum() / rows
    if reduction == "mean":
        return losses.sum() / (rows * student.shape[-1])
    if reduction == "sum":
        return losses.sum()
    raise ValueError(f"reduction must be 'batchmean', 'mean', 'sum' or 'none', got {reduction!r}")
