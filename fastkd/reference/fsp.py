"""The flow of solution procedure (Yim et al. 2017)."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.product import product
from fastkd.reference.hint import hint_loss

Pair = tuple[Tensor, Tensor]


def fsp_loss(flows: Sequence[Tensor], targets: Sequence[Tensor], *, scale: float) -> Tensor:
    """`‖G_T − G_S‖_F²` of each sample, averaged over the batch and summed over the pairs."""
    return hint_loss(flows, targets, reduction="batchmean", scale=scale)


def max_pool(features: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The maxima of as many bins, as adaptive pooling has them. At ties the first in memory wins.

    Widened first, so that what several bins give to one element is rounded once. Bins that overlap
    are taken in one dimension after the other: an element then is in two at most, and the order in
    which it receives their gradients does not matter.
    """
    features = features.to(dtype)
    rows, columns = features.shape[2:]
    if rows % height or columns % width:
        return _winners(_winners(features, rows, width), height, width)
    if features.requires_grad:
        return _winners(features, height, width)
    for dim, size in ((2, height), (3, width)):
        parts = features.unflatten(dim, (size, features.shape[dim] // size)).unbind(dim + 1)
        features = functools.reduce(torch.maximum, parts)
    return features


def flow(pair: Pair, dtype: torch.dtype, pool: Callable[..., Tensor] = max_pool) -> Tensor:
    """`F₁ᵀ F₂ / (h·w)` of each sample, `(B, C₁, C₂)`; `pool` does what `max_pool` does."""
    first, second = pair
    height, width = (min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True))
    first, second = (pool(x, height, width, dtype).flatten(2) for x in pair)
    return product(first, second.mT) / (height * width)


def _winners(features: Tensor, height: int, width: int) -> Tensor:
    """By their indices, because the gradient of torch's pooling has no fixed order on a GPU."""
    if features.shape[2:] == (height, width):
        return features
    # Channels last: torch then searches several at a time.
    interleaved = features.detach().movedim(1, -1).contiguous().movedim(-1, 1)
    _, indices = F.adaptive_max_pool2d(interleaved, (height, width), return_indices=True)
    return features.flatten(2).gather(2, indices.flatten(2)).unflatten(2, (height, width))
