"""Relations between the embeddings of a batch, as RepDistiller writes them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.workload import Workload
from fastkd.reference import rkd as reference


def _distances(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(1)
    found = (squares[:, None] + squares - 2 * (x @ x.t())).clamp(min=1e-12).sqrt()
    # The mean of the positive ones; a mask in the index, which is usual, does not compile.
    found = found.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    return found / (found.sum() / (found > 0).sum())


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(_distances(student.float()), _distances(teacher.float()))


def _cosines(x: Tensor) -> Tensor:
    units = F.normalize(x[None] - x[:, None], p=2, dim=2)
    return torch.bmm(units, units.transpose(1, 2))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(_cosines(student.float()), _cosines(teacher.float()))


def _angles_in_parts(student: Tensor, teacher: Tensor) -> Iterator[Tensor]:
    """The graph of all angles in float64 would take more memory than there is."""
    for vertices in reference.blocks(student, teacher):
        yield reference.angle_loss_at(vertices, student, teacher, delta=1.0)


def _workload(loss: str, samples: int, width: int, **others: Any) -> Workload:
    shapes = ((samples, width),)
    return Workload(
        loss,
        f"relations, {loss.split('_')[1]}s",
        shapes,
        shapes,
        {"rkd_distance_loss": rkd_distance_loss, "rkd_angle_loss": rkd_angle_loss}[loss],
        samples_least=8,
        parts=_angles_in_parts if loss == "rkd_angle_loss" else None,
        **others,
    )


WORKLOADS = (
    _workload("rkd_distance_loss", 128, 128),
    _workload("rkd_distance_loss", 512, 256),
    _workload("rkd_angle_loss", 128, 128),
    _workload("rkd_angle_loss", 512, 256, headline=True),
    _workload("rkd_angle_loss", 1024, 512, devices=("cuda",)),
)
