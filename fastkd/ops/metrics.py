"""The operator of `distillation_metrics`, which has no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.operators import define, kernels
from fastkd.parameters import Metrics, in_schema
from fastkd.precision import compute_dtype

# Of each row: both log-sum-exps and entropies, forward KL, reverse KL, overlap.
VALUES = 7


def _outputs(
    student: Tensor, teacher: Tensor, mask: Tensor | None, p: Metrics
) -> tuple[Tensor, Tensor]:
    rows: Sequence[int] = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    return (
        student.new_empty((VALUES, *rows), dtype=compute_dtype(student, teacher)),
        student.new_empty((2, *rows), dtype=torch.int64),
    )


@define(
    "distillation_metrics(Tensor student, Tensor teacher, Tensor? mask, "
    f"{in_schema(Metrics)}) -> (Tensor values, Tensor argmax)",
    _outputs,
    Metrics,
)
def metrics(
    student: Tensor, teacher: Tensor, mask: Tensor | None, p: Metrics
) -> tuple[Tensor, Tensor]:
    """The values of each row, one after another, and both arg-maxima."""
    outputs = _outputs(student, teacher, mask, p)
    kernels(p.backend, "metrics").distillation_metrics(student, teacher, mask, *outputs, p)
    return outputs
