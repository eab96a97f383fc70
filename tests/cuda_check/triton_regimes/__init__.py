"""Calls of each launcher of Triton kernels that between them take every way through the kernels."""

from collections.abc import Iterator

from . import attention, hint, metrics, multiply, rkd, similarity, soft_target, top_k
from .regime import Narrow, Regime

__all__ = ["Narrow", "Regime", "regimes"]

_LOSSES = (hint, metrics, multiply, soft_target, top_k, attention, rkd, similarity)


def regimes() -> Iterator[Regime]:
    for loss in _LOSSES:
        yield from loss.regimes()
