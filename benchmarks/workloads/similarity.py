"""Similarities between the samples of a batch, as RepDistiller writes them."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.workload import Shape, Workload


def _similarities(features: Tensor) -> Tensor:
    rows = features.float().reshape(len(features), -1)
    return F.normalize(rows @ rows.t(), p=2, dim=1)


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    difference = _similarities(teacher) - _similarities(student)
    return difference.pow(2).sum() / len(student) ** 2


def _workload(shape: Shape) -> Workload:
    return Workload(
        "similarity_preserving_loss",
        "relations, similarities",
        (shape,),
        (shape,),
        similarity_preserving_loss,
        samples_least=8,
    )


WORKLOADS = (_workload((64, 64, 8, 8)), _workload((128, 256, 8, 8)))
