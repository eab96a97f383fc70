"""The logits of a linear head, in plain PyTorch."""

import torch
from torch import Tensor

from fastkd.logits import LinearHead


def logits(
    head: LinearHead, counts: Tensor | None, dtype: torch.dtype, num_classes: int | None
) -> Tensor:
    """`softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, with products in a dtype.

    The hidden states of rows that do not count may hold anything, and are taken for 0. So may the
    weights of classes that do not exist, which have no logits.
    """
    hidden = head.hidden
    if counts is not None:
        hidden = hidden.masked_fill(~counts[..., None], 0)
    found = hidden.to(dtype) @ head.weight[:num_classes].to(dtype).T
    if head.bias is not None:
        found = found + head.bias[:num_classes].to(dtype)
    found = found * head.scale
    return found if head.softcap is None else head.softcap * (found / head.softcap).tanh()
