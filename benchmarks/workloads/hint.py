"""Hints between feature maps, `F.mse_loss` as users write it."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.workload import Argument, Shape, Workload, tensors, total


def hint_loss(
    student: Argument,
    teacher: Argument,
    *,
    regressor_weight: Tensor | None = None,
    regressor_bias: Tensor | None = None,
    reduction: str,
    half: bool,
) -> Tensor:
    assert reduction == "mean" and not half
    students = [s.float() for s in tensors(student)]
    if regressor_weight is not None:
        weight = regressor_weight.float()
        bias = None if regressor_bias is None else regressor_bias.float()
        students = [F.conv2d(s, weight, bias) for s in students]
    pairs = zip(students, tensors(teacher), strict=True)
    return total([F.mse_loss(s, t.float()) for s, t in pairs])


def _hint(
    *shapes: Shape, title: str = "", regressed: Shape | None = None, headline: bool = False
) -> Workload:
    return Workload(
        "hint_loss",
        "hints",
        shapes,
        (regressed,) if regressed else shapes,
        hint_loss,
        title=title,
        keywords={"reduction": "mean", "half": False},
        headline=headline,
        regressor=regressed is not None,
    )


_CIFAR: tuple[Shape, ...] = ((64, 128, 16, 16), (64, 64, 16, 16), (64, 256, 8, 8))

WORKLOADS = (
    *map(_hint, _CIFAR),
    _hint(*_CIFAR, title="three in one call"),
    _hint((32, 1024, 14, 14)),
    _hint((32, 2048, 7, 7)),
    _hint((64, 256, 56, 56), headline=True),
    _hint((64, 64, 16, 16), title="1×1 regressor to 128 channels", regressed=(64, 128, 16, 16)),
)
