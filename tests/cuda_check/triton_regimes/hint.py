"""Hints."""

from collections.abc import Iterator

import torch
from torch import Tensor, bfloat16, float16

from fastkd.kernels.triton import hint
from fastkd.parameters import Hint
from fastkd.precision import compute_dtype

from .regime import CROPPED, DOUBLE, FEW, HALF, Regime, X, channels_last, meta


def regimes() -> Iterator[Regime]:
    for pairs in (_WIDE, _OTHERS):
        for layout, pair in pairs.items():
            for use, launch, narrow in _uses(*pair)[: None if layout in _THOROUGHLY else 3]:
                yield Regime(f"{layout}, {use}", launch, narrow if pairs is _WIDE else None)


def _uses(student: Tensor, teacher: Tensor) -> list[Regime]:
    """Of a pair; each is named after the use."""
    dtype = compute_dtype(student, teacher)
    gradient, to_teacher = torch.empty_like(student), torch.empty_like(teacher)
    scalar, row = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((), (1, len(student)))
    )

    def forward(loss: Tensor, reduction: str, *gradients: Tensor) -> None:
        p = Hint(0.5, reduction, "triton")
        hint.hint_forward([student], [teacher], loss, gradients, p)

    def backward(
        upstream: Tensor, reduction: str, *gradients: Tensor, in_place: bool = False
    ) -> None:
        p = Hint(0.5, reduction, "triton")
        hint.hint_backward(upstream, [student], [teacher], gradients, p, in_place)

    return [
        Regime("forward", lambda: forward(scalar, "batchmean", gradient), FEW),
        Regime("backward", lambda: backward(scalar, "sum", gradient, to_teacher), FEW),
        Regime("per sample", lambda: forward(row, "none"), FEW),
        Regime("in place", lambda: backward(scalar, "sum", gradient, in_place=True), FEW),
        Regime("loss only", lambda: forward(scalar, "mean"), FEW),
        Regime("per sample, backward", lambda: backward(row, "none", gradient, to_teacher)),
    ]


# Pairs whose every element is accessed 16 bytes at a time.
_WIDE = {
    "float32": (X, X),
    "bfloat16": (HALF, HALF),
    "float16": (HALF.to(float16), HALF.to(float16)),
    "float64": (DOUBLE, DOUBLE),
    "bfloat16 and float32": (HALF, X),
    "bfloat16 and float64": (HALF, DOUBLE),
    "channels_last": (channels_last(X), channels_last(X)),
    "slices of channels": (HALF, meta(64, 512, 56, 56, dtype=bfloat16)[:, :256]),
}
_OTHERS = {
    "channels_last and NCHW": (channels_last(X), X),
    "NCHW and channels_last, bfloat16": (HALF, channels_last(HALF)),
    "channels_last and NCHW, bfloat16 and float32": (channels_last(HALF), X),
    "channels_last and NCHW, float64": (channels_last(DOUBLE), DOUBLE),
    "cropped": (CROPPED, meta(64, 256, 7, 7)),
    "stepped": (meta(64, 512, 14, 14)[:, ::2, ::2, ::2], meta(64, 256, 7, 7)),
    "expanded": (meta(1, 256, 56, 56).expand_as(X), X),
    "permuted": (
        meta(6, 10, 3, 18, 35).permute(3, 1, 4, 0, 2),
        meta(18, 35, 10, 3, 6).permute(0, 2, 1, 4, 3),
    ),
    "unaligned": (meta(3, 33, 7, 7), meta(3, 33, 7, 7)),
    "far apart": (meta(9, 2**31, dtype=bfloat16)[:, :4096], meta(9, 4096)),
}
# All uses of these pairs are compiled, and the first three of the others.
_THOROUGHLY = {"float32", "bfloat16", "channels_last and NCHW", "cropped"}
