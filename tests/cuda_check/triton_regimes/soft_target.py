"""Soft targets of one teacher."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64

from fastkd.kernels.triton import soft_target
from fastkd.ops.soft_target import PARTS, STATISTICS, Parameters
from fastkd.reference.precision import compute_dtype

from .regime import MAPS, Narrow, Regime, channels_last, meta


def regimes() -> Iterator[Regime]:
    for name, (student, teacher, dim, names) in _LOGITS.items():
        for use, launch, narrow in _uses_of_logits(student, teacher, dim):
            if use in names:
                is_wide = name not in _NARROW_LOGITS
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)


def _uses_of_logits(student: Tensor, teacher: Tensor, dim: int) -> list[Regime]:
    """Of student and teacher; each is named after the use."""
    dtype = compute_dtype(student, teacher)
    gradient, to_teacher = torch.empty_like(student), torch.empty_like(teacher)
    labels = student.new_empty(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), torch.empty_like(labels, dtype=dtype)
    statistics = student.new_empty(labels.numel() * STATISTICS + PARTS, dtype=dtype)
    soft = Parameters(4.0, 16.0, 0.0, 0.0, -100, "batchmean", dim, "triton")
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)
    by_row = soft._replace(reduction="none")
    both = student, teacher

    def forward(*args: Any) -> Callable[[], None]:
        return functools.partial(soft_target.soft_target_forward, *both, *args)

    def backward(upstream: Tensor, *args: Any) -> Callable[[], None]:
        return functools.partial(soft_target.soft_target_backward, upstream, *both, *args)

    return [
        # Narrow are a label, its logit, the rows that count and the first logit, and statistics
        # and sums.
        Regime("hard", forward(labels, scalar, statistics, gradient, hard), Narrow(4, 10)),
        Regime("soft", forward(None, scalar, None, gradient, soft), Narrow(0, 3)),
        Regime("loss only", forward(None, scalar, None, None, soft), Narrow(0, 3)),
        Regime("by row", forward(None, row, statistics, None, by_row), Narrow(0, 11)),
        Regime(
            "backward",
            backward(scalar, labels, statistics, gradient, to_teacher, hard),
            Narrow(9, 0),
        ),
        Regime(
            "backward by row",
            backward(row, None, statistics, gradient, to_teacher, by_row),
            Narrow(7, 0),
        ),
        Regime(
            "in place",
            backward(scalar, labels, statistics, gradient, None, hard, True),
            Narrow(9, 0),
        ),
    ]


def _both(*shape: int, dtype: torch.dtype = float32) -> tuple[Tensor, Tensor]:
    x = meta(*shape, dtype=dtype)
    return x, x


_USES = {"hard", "soft", "loss only", "by row", "backward", "backward by row", "in place"}

# Both sides, the dimension of the classes, and the uses that are compiled.
_LOGITS: dict[str, tuple[Tensor, Tensor, int, set[str]]] = {
    "1,000 classes": (*_both(512, 1000), 1, _USES),
    "1,000 classes, bfloat16": (*_both(512, 1000, dtype=bfloat16), 1, {"hard", "in place"}),
    "1,000 classes, float16 and float32": (
        meta(512, 1000, dtype=float16),
        meta(512, 1000),
        1,
        {"hard"},
    ),
    "4,096 classes": (*_both(512, 4096), 1, {"hard", "soft"}),
    "4,096 classes, bfloat16": (*_both(512, 4096, dtype=bfloat16), 1, {"hard"}),
    "32,000 classes": (*_both(512, 32000), 1, {"hard", "loss only"}),
    "32,000 classes, bfloat16": (*_both(512, 32000, dtype=bfloat16), 1, {"hard", "backward"}),
    "2,048 classes, float64": (*_both(512, 2048, dtype=float64), 1, {"hard", "backward"}),
    "5,000 classes, float64": (*_both(512, 5000, dtype=float64), 1, {"hard"}),
    "10 classes": (*_both(512, 10), 1, {"hard", "backward"}),
    "33 classes, bfloat16": (*_both(512, 33, dtype=bfloat16), 1, {"hard"}),
    "50,257 classes, bfloat16": (*_both(512, 50257, dtype=bfloat16), 1, {"hard"}),
    "rows side by side": (MAPS, MAPS, 1, {"hard", "soft", "backward"}),
    "rows side by side, bfloat16": (*_both(8, 150, 65, 65, dtype=bfloat16), 1, {"hard"}),
    "rows side by side and apart": (MAPS, channels_last(MAPS), 1, {"hard"}),
    "far apart": (
        meta(9, 2**31, dtype=bfloat16)[:, :500],
        meta(500, 2**31)[:, :9].t(),
        1,
        {"hard"},
    ),
}
# Of which some elements are accessed less than 16 bytes at a time.
_NARROW_LOGITS = {
    "10 classes",
    "33 classes, bfloat16",
    "50,257 classes, bfloat16",
    "rows side by side",
    "rows side by side, bfloat16",
    "rows side by side and apart",
    "far apart",
}
