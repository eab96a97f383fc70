"""What a regime is, and the tensors that several losses are called on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, bfloat16, float32, float64


class Narrow(NamedTuple):
    """How many accesses may move less than 16 bytes: those of numbers that are not elements."""

    loads: int
    stores: int
    has_elements: bool = True  # among the loads


class Regime(NamedTuple):
    name: str
    launch: Callable[[], None]  # on tensors without memory
    narrow: Narrow | None = None  # None where nothing is demanded


# Of grad_output, and of a sum.
FEW = Narrow(1, 1)


def meta(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_SHAPE = 64, 256, 56, 56
X, HALF, DOUBLE = (meta(*_SHAPE, dtype=dtype) for dtype in (float32, bfloat16, float64))
CROPPED = meta(64, 256, 9, 9)[..., 1:-1, 1:-1]
MAPS = meta(8, 19, 64, 64)
