"""Distances and angles between samples."""

import functools
from collections.abc import Callable, Iterator

from torch import float32, float64

from fastkd.kernels.triton import rkd

from .regime import Regime, meta


def regimes() -> Iterator[Regime]:
    for dtype in (float32, float64):
        loss, squares = meta(dtype=dtype), meta(500, 500, dtype=float64)
        rows = meta(500, 70, dtype=dtype)
        call: Callable[..., None] = functools.partial(rkd.squared_distances, rows, squares)
        yield Regime(f"{dtype}, squared distances", call)
        for uses, slopes in (("slopes", squares), ("loss only", None)):
            for kind in (rkd.rkd_distance, rkd.rkd_angle):
                call = functools.partial(kind, squares, squares, loss, slopes, 1.0)
                yield Regime(f"{dtype}, {kind.__name__}, {uses}", call)
