"""A teacher that kept 32 classes of each row, in each tail."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.workloads.workload import Inputs, Workload

FAMILY = "soft targets, top-k teachers"
_SHAPE, _K = (1024, 32000), 32


def _with_rest(logs: Tensor) -> Tensor:
    """The rest of the mass as one class more."""
    rest = torch.log(-torch.expm1(logs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)))
    return torch.cat([logs, rest], -1)


def top_k_loss(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    lse: Tensor,
    *,
    tail: str,
    divergence: str = "forward_kl",
) -> Tensor:
    """As users write it: the k classes are gathered from a log-softmax, or from the logits."""
    values = values.float()
    if tail == "renormalize_both":
        log_q = F.log_softmax(student.gather(-1, indices).float(), dim=-1)
    else:
        log_q = F.log_softmax(student.float(), dim=-1).gather(-1, indices)
    if tail == "bucket":
        log_p, log_q = _with_rest(values - lse[:, None]), _with_rest(log_q)
    else:
        log_p = F.log_softmax(values, dim=-1)
    if divergence == "reverse_kl":
        log_p, log_q = log_q, log_p
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def fused_top_k_loss(
    student: Tensor, values: Tensor, indices: Tensor, lse: Tensor, *, tail: str, **keywords: Any
) -> Tensor:
    kept = fastkd.TopK(values, indices, tail=tail, lse=lse if tail == "bucket" else None)
    return fastkd.soft_target_loss(student, kept, **keywords)


def add_classes(inputs: Inputs) -> None:
    """Which the teacher kept, and the log-sum-exp of all of its logits."""
    student, values = inputs.batch
    assert isinstance(student, Tensor)
    assert isinstance(values, Tensor)
    generator = torch.Generator(student.device).manual_seed(1)
    scores = torch.rand(student.shape, generator=generator, device=student.device)
    inputs.batch += (scores.topk(values.shape[-1]).indices, 1 + values.float().logsumexp(-1))


_workload = partial(
    Workload,
    "soft_target_loss",
    FAMILY,
    (_SHAPE,),
    ((_SHAPE[0], _K),),
    top_k_loss,
    fused=fused_top_k_loss,
    prepare=add_classes,
)

WORKLOADS = (
    _workload(title="top-32, renormalised", keywords={"tail": "renormalize"}),
    _workload(title="top-32, a bucket", keywords={"tail": "bucket"}),
    _workload(
        title="top-32, a bucket, reverse KL",
        keywords={"tail": "bucket", "divergence": "reverse_kl"},
    ),
    _workload(
        title="top-32, both renormalised",
        keywords={"tail": "renormalize_both"},
        student_reads=0,
        student_reads_on_chip=0,
    ),
)
