"""Similarities between samples."""

import functools
from collections.abc import Iterator

from torch import float32, float64

from fastkd.kernels.triton import similarity

from .regime import Regime, meta


def regimes() -> Iterator[Regime]:
    for dtype in (float32, float64):
        loss, grams = meta(dtype=dtype), meta(500, 500, dtype=dtype)
        for uses, slopes in (("slopes", grams), ("loss only", None)):
            call = functools.partial(similarity.similarity, grams, grams, loss, slopes)
            yield Regime(f"{dtype}, similarity, {uses}", call)
