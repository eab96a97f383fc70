"""Soft targets, alone and with the hard labels, on logits."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads.workload import Shape, Workload, total


def soft_target_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, dim: int = -1
) -> Tensor:
    log_q = F.log_softmax(student.float() / temperature, dim=dim)
    p = F.softmax(teacher.float() / temperature, dim=dim)
    rows = student.numel() // student.shape[dim]
    return F.kl_div(log_q, p, reduction="sum") / rows * temperature**2


def ensemble_loss(student: Tensor, teachers: list[Tensor], *, temperature: float) -> Tensor:
    """The target is the mean of the teachers' probabilities."""
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    p = total([F.softmax(t.float() / temperature, dim=-1) for t in teachers]) / len(teachers)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    soft_weight: float = 0.9,
    hard_weight: float = 0.1,
) -> Tensor:
    hard = F.cross_entropy(student.float(), labels)
    return hard_weight * hard + soft_weight * soft_target_loss(
        student, teacher, temperature=temperature
    )


def _logits(
    family: str, temperature: float, shape: Shape, *, dim: int = -1, **others: Any
) -> Workload:
    return Workload(
        "soft_target_loss",
        f"soft targets, {family}",
        (shape,),
        (shape,),
        soft_target_loss,
        title="" if dim == -1 else f"dim={dim}",
        keywords={"temperature": temperature, "dim": dim},
        **others,
    )


def _distillation(shape: Shape, **others: Any) -> Workload:
    return Workload(
        "distillation_loss",
        "soft and hard targets",
        (shape,),
        (shape,),
        distillation_loss,
        keywords={"temperature": 4.0},
        labels=True,
        **others,
    )


def _ensemble(shape: Shape, temperature: float, **others: Any) -> Workload:
    return Workload(
        "soft_target_loss",
        "soft targets, ensemble",
        (shape,),
        (shape,) * 3,
        ensemble_loss,
        title="3 teachers",
        keywords={"temperature": temperature},
        **others,
    )


_vision = partial(_logits, "vision", 4.0)
_language = partial(_logits, "language", 2.0)

_CPU: dict[str, Any] = {"devices": ("cpu",)}
_GPU: dict[str, Any] = {"devices": ("cuda",)}
# Training at this size has its logits in bfloat16.
_LARGE: dict[str, Any] = {**_GPU, "dtypes": (torch.bfloat16,)}

# Vocabularies of language models. On the CPU those beyond the first have fewer rows than in
# training, so that eager PyTorch works within 8 GB; a GPU gets the rows of a training step, and
# needs 43 GB for the largest.
WORKLOADS = (
    _vision((64, 100)),
    _vision((128, 100)),
    _vision((256, 1000), headline=True),
    _vision((512, 1000)),
    _vision((128, 21841)),
    _vision((2, 19, 64, 128), dim=1),
    _language((1024, 32000), headline=True, **_CPU),
    _language((4096, 32000), **_CPU),
    _language((512, 128256), **_CPU),
    _language((256, 151936), headline=True, **_CPU),
    _language((128, 262144), **_CPU),
    _language((4096, 32000), headline=True, **_GPU),
    _language((8192, 128256), headline=True, **_LARGE),
    _language((8192, 151936), **_LARGE),
    _language((2048, 262144), **_LARGE),
    _distillation((128, 100)),
    _distillation((256, 1000), headline=True),
    _distillation((1024, 32000), **_CPU),
    _distillation((4096, 32000), **_GPU),
    _distillation((8192, 128256), **_LARGE),
    _ensemble((256, 1000), 4.0),
    _ensemble((1024, 32000), 2.0, headline=True, **_CPU),
    _ensemble((4096, 32000), 2.0, headline=True, **_GPU),
)
