"""Liger-Kernel's distillation losses (liger-kernel 0.8) on fastkd.

`LigerKLDIVLoss`, `LigerJSD` and `LigerTVDLoss` of probabilities or their logarithms, and of hidden
states and the weights of linear layers `LigerFusedLinearJSD`, `LigerFusedLinearKLDivLoss` and, of
the chunked losses, `LigerFusedLinearJSDLoss`. See `fastkd.compat` for what all modules share.

None has a factor T², and the student alone receives a gradient. Where the library takes
log-probabilities, the gradient is that of the formula by each of them, without a softmax. Without a
row that counts a loss is 0, also where the library divides by 0.

Example:
    >>> from fastkd.compat.liger import LigerFusedLinearJSDLoss, LigerJSD
    >>> log_q, log_p = (torch.randn(8, 100).log_softmax(-1) for _ in range(2))
    >>> loss = LigerJSD(beta=0.1)(log_q, log_p)
    >>> hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16)
    >>> teacher, labels = (torch.randn(8, 32), torch.randn(100, 32)), torch.randint(100, (8,))
    >>> LigerFusedLinearJSDLoss(temperature=2.0)(hidden, weight, *teacher, labels).backward()
"""

from fastkd.compat.liger.linear import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKLDivLoss,
)
from fastkd.compat.liger.probabilities import LigerJSD, LigerKLDIVLoss, LigerTVDLoss

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
]
