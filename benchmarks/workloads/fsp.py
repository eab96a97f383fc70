"""The flow between two layers of a network, as torchdistill writes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.workload import Shape, Workload


def _flow(first: Tensor, second: Tensor) -> Tensor:
    if first.shape[2:] != second.shape[2:]:
        first = F.adaptive_max_pool2d(first, second.shape[2:])
    first, second = first.float().flatten(2), second.float().flatten(2)
    return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


def fsp_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    difference = _flow(*teacher) - _flow(*student)
    return difference.pow(2).sum() / len(student[0])


def _workload(title: str, first: Shape, second: Shape) -> Workload:
    shapes = (first, second)
    return Workload("fsp_loss", "relations, layers", shapes, shapes, fsp_loss, title=title)


WORKLOADS = (
    _workload("16 to 32 channels", (64, 16, 32, 32), (64, 32, 16, 16)),
    _workload("32 to 64 channels", (64, 32, 16, 16), (64, 64, 8, 8)),
)
