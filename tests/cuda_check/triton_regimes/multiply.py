"""Gradients times `grad_output`."""

import functools
from collections.abc import Iterator

from fastkd.kernels.triton import multiply

from .regime import CROPPED, DOUBLE, FEW, Regime, X, channels_last, meta

_GRADIENTS = {"float32": X, "float64": DOUBLE, "channels_last": channels_last(X)}


def regimes() -> Iterator[Regime]:
    for name, gradient in {**_GRADIENTS, "cropped": CROPPED}.items():
        call = functools.partial(multiply.multiply, [gradient], meta())
        yield Regime(f"{name}, multiply", call, FEW if name in _GRADIENTS else None)
