"""The logit losses of NVIDIA's Model-Optimizer (`modelopt.torch.distill`, 0.47) on fastkd.

`LogitsDistillationLoss` and `MFTLoss` of `losses.py`, and of the plugin for Megatron
(`plugins/megatron.py`) `LogitsKLLoss`, `TopKLogitsKLLoss` and, of the branch that follows 0.47,
`TopLogitsKLLoss`. Its losses of features stay Model-Optimizer's. All are losses to `torch`
(`torch.nn.modules.loss._Loss`), as `modelopt.torch.distill.convert` demands of a criterion. See
`fastkd.compat` for what all modules share.

The teacher receives no gradient. The losses for Megatron have no factor T².

Example:
    >>> from fastkd.compat.modelopt import LogitsDistillationLoss, LogitsKLLoss
    >>> student, teacher = torch.randn(6, 2, 100, requires_grad=True), torch.randn(6, 2, 100)
    >>> LogitsDistillationLoss(temperature=2.0, reduction="batchmean")(student, teacher).backward()
    >>> loss, tp_reduce, is_sequence_parallel = LogitsKLLoss(None)(student, teacher)
    >>> loss.shape
    torch.Size([2, 6])
"""

from fastkd.compat.modelopt.logits import LogitsDistillationLoss, MFTLoss
from fastkd.compat.modelopt.megatron import LogitsKLLoss, TopKLogitsKLLoss, TopLogitsKLLoss

__all__ = [
    "LogitsDistillationLoss",
    "LogitsKLLoss",
    "MFTLoss",
    "TopKLogitsKLLoss",
    "TopLogitsKLLoss",
]
