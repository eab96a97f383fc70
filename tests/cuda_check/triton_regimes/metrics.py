"""Metrics of rows of logits."""

import functools
from collections.abc import Iterator

import torch
from torch import bfloat16, float32, float64

from fastkd.kernels.triton import metrics
from fastkd.parameters import Metrics

from .regime import Narrow, Regime, meta

# Student and teacher, and the classes' dimension.
_LOGITS = {
    "few classes": (meta(256, 100), meta(256, 100), 1),
    "one block": (meta(256, 1000), meta(256, 1000), 1),
    "whole": (meta(64, 4096), meta(64, 4096), 1),
    "blocks": (meta(64, 32000), meta(64, 32000), 1),
    "blocks, bfloat16": (meta(64, 32000, dtype=bfloat16),) * 2 + (1,),
    "blocks, two dtypes": (meta(64, 32000, dtype=bfloat16), meta(64, 32000), 1),
    "float64": (meta(64, 32000, dtype=float64),) * 2 + (1,),
    "odd": (meta(64, 32001)[:, 1:], meta(64, 32003)[:, :32000], 1),
    "pixels": (meta(2, 19, 64, 64), meta(2, 19, 64, 64), 1),
}
# A byte a row; values and arg-maxima are of one row each, too.
_WIDE = Narrow(1, 9)


def regimes() -> Iterator[Regime]:
    p = Metrics(temperature=2.0, teacher_temperature=3.0, dim=1, backend="triton")
    for name, (student, teacher, dim) in _LOGITS.items():
        is_double = float64 in (student.dtype, teacher.dtype)
        rows = student.shape[:dim] + student.shape[dim + 1 :]
        values = meta(7, *rows, dtype=float64 if is_double else float32)
        argmax, mask = meta(2, *rows, dtype=torch.int64), meta(*rows, dtype=torch.bool)
        narrow = _WIDE if name.startswith("blocks") else None
        for uses, kept in (("", None), (", mask", mask)):
            sides = student, teacher, kept
            call = functools.partial(metrics.distillation_metrics, *sides, values, argmax, p)
            yield Regime(f"{name}, metrics{uses}", call, narrow)
