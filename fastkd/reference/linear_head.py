"""The logits of a linear head, in plain PyTorch."""

import torch
import torch.nn.functional as F
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
    weight, bias = head.weight[:num_classes], head.bias
    if bias is not None:
        bias = bias[:num_classes].to(dtype)
    found = F.linear(hidden.to(dtype), weight.to(dtype), bias) * head.scale
    return found if head.softcap is None else head.softcap * (found / head.softcap).tanh()
