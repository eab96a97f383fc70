"""Soft targets of several teachers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64

from fastkd.kernels.triton import soft_target_ensemble
from fastkd.ops.soft_target import PARTS, Parameters
from fastkd.reference.precision import compute_dtype

from .regime import MAPS, Narrow, Regime, channels_last, meta


def regimes() -> Iterator[Regime]:
    for name, (sides, dim, names) in _ENSEMBLES.items():
        for use, launch, narrow in _uses_of_ensembles(sides, dim):
            if use in names:
                is_wide = name not in _NARROW_ENSEMBLES
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)


def _uses_of_ensembles(sides: Sequence[Tensor], dim: int) -> list[Regime]:
    """Of a student and teachers; each is named after the use."""
    student, *teachers = sides
    dtype = compute_dtype(*sides)
    weights = (1 / len(teachers),) * len(teachers)
    gradient = torch.empty_like(student)
    labels = student.new_empty(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), torch.empty_like(labels, dtype=dtype)
    parts = student.new_empty(PARTS, dtype=dtype)
    soft = Parameters(4.0, 16.0, 0.0, 0.0, -100, "batchmean", dim, "triton")
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)
    by_row = soft._replace(reduction="none")

    def call(*args: Any) -> Callable[[], None]:
        function = soft_target_ensemble.soft_target_ensemble
        return functools.partial(function, student, teachers, weights, *args)

    return [
        # Narrow are labels, their logits, the rows that count, first logits, and sums.
        Regime("hard", call(labels, scalar, parts, gradient, None, hard), Narrow(7, 3)),
        Regime("soft", call(None, scalar, None, gradient, None, soft), Narrow(0, 3)),
        Regime("loss only", call(None, scalar, None, None, None, soft), Narrow(0, 3)),
        Regime("by row", call(None, row, None, None, None, by_row), Narrow(0, 4)),
        Regime("backward", call(labels, None, None, gradient, scalar, hard, True), Narrow(4, 0)),
        Regime("backward by row", call(None, None, None, gradient, row, by_row), Narrow(1, 0)),
    ]


_LOGITS_OF_3 = {
    (classes, dtype): [meta(512, classes, dtype=dtype)] * 3
    for classes in (10, 1000, 4096, 32000)
    for dtype in (float32, bfloat16)
}

# A student and its teachers, the dimension of the classes, and the uses that are compiled.
_ENSEMBLES: dict[str, tuple[list[Tensor], int, set[str]]] = {
    "2 teachers, 1,000 classes": (
        _LOGITS_OF_3[1000, float32],
        1,
        {"hard", "soft", "loss only", "by row", "backward", "backward by row"},
    ),
    "2 teachers, 1,000 classes, bfloat16": (_LOGITS_OF_3[1000, bfloat16], 1, {"soft", "backward"}),
    "3 teachers, 1,000 classes, of each dtype": (
        [meta(512, 1000, dtype=dtype) for dtype in (bfloat16, float16, float32, bfloat16)],
        1,
        {"hard"},
    ),
    "2 teachers, 4,096 classes": (_LOGITS_OF_3[4096, float32], 1, {"hard"}),
    "2 teachers, 4,096 classes, bfloat16": (_LOGITS_OF_3[4096, bfloat16], 1, {"hard"}),
    "2 teachers, 32,000 classes": (_LOGITS_OF_3[32000, float32], 1, {"backward"}),
    "2 teachers, 32,000 classes, bfloat16": (
        _LOGITS_OF_3[32000, bfloat16],
        1,
        {"hard", "loss only"},
    ),
    "2 teachers, 5,000 classes, float64": (
        [meta(512, 5000, dtype=float64)] * 2 + [meta(512, 5000)],
        1,
        {"hard"},
    ),
    "2 teachers, 10 classes": (_LOGITS_OF_3[10, float32], 1, {"hard"}),
    "2 teachers, rows side by side": ([MAPS, MAPS, channels_last(MAPS)], 1, {"hard"}),
}
# Of which some elements are accessed less than 16 bytes at a time.
_NARROW_ENSEMBLES = {"2 teachers, 10 classes", "2 teachers, rows side by side"}
